"""Groups of networks with their test accuracies, and paired comparisons between them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpgcli.tasks import complement


@dataclass(frozen=True)
class Group:
    """Networks that are judged together."""

    name: str
    kind: str
    """trained, generated, or baseline."""
    split: str
    accuracies: Sequence[float]
    """Fraction of test images answered right, one for each network."""
    tasks: Sequence[str | None]
    """The task of each."""
    seconds_per_network: float | None

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return sum(self.accuracies) / len(self.accuracies)

    def by_task(self) -> dict[str, float]:
        """Mean accuracy of each task."""
        rows: dict[str, list[float]] = {}
        for task, accuracy in zip(self.tasks, self.accuracies):
            if task is not None:
                rows.setdefault(task, []).append(accuracy)
        return {task: sum(values) / len(values) for task, values in rows.items()}

    def to_json(self) -> dict[str, Any]:
        """A row of the report; the standard error counts a task and its complement as one observation."""
        accuracy = None
        if self.accuracies:
            tasks = self.by_task()
            units = by_pair(tasks) if tasks else list(self.accuracies)
            low, high = min(self.accuracies), max(self.accuracies)
            accuracy = {"mean": self.mean, "se": standard_error(units), "min": low, "max": high}
        return {
            "name": self.name, "kind": self.kind, "split": self.split, "count": len(self.accuracies),
            "accuracy": accuracy, "seconds_per_network": self.seconds_per_network,
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Accuracy of one group minus that of another, paired over tasks on the same test images."""

    name: str
    against: str
    difference: float
    se: float
    num_pairs: int

    @property
    def above(self) -> bool:
        """Whether the first is better by more than two standard errors."""
        return self.difference > 2 * self.se

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**vars(self), "above": self.above}


def compare(a: Group, b: Group) -> Comparison:
    """Paired over the tasks that both hold; a task and its complement count as one observation.

    Without tasks the groups are independent samples.
    """
    mine, other = a.by_task(), b.by_task()
    if not mine or not other:
        se = math.hypot(standard_error(a.accuracies), standard_error(b.accuracies))
        return Comparison(a.name, b.name, a.mean - b.mean, se, min(len(a.accuracies), len(b.accuracies)))
    differences = by_pair({task: mine[task] - other[task] for task in mine if task in other})
    return Comparison(
        a.name, b.name, sum(differences) / len(differences), standard_error(differences), len(differences)
    )


def by_pair(values: Mapping[str, float]) -> list[float]:
    """Means over each complement pair: the two tasks of a pair are one problem."""
    pairs: dict[str, list[float]] = {}
    for task, value in values.items():
        pairs.setdefault(min(task, complement(task)), []).append(value)
    return [sum(pair) / len(pair) for pair in pairs.values()]


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def verdict(generated: Group, trained: Group | None, baselines: Sequence[Group]) -> tuple[str, bool, list[Comparison]]:
    """One sentence on how the generated networks do, whether every trivial generator is beaten, and all comparisons."""
    if not generated.accuracies:
        return f"{generated.name} generated no network to be judged ({generated.split}).", False, []
    baselines = [b for b in baselines if b.accuracies]
    tasks = generated.by_task()
    what = f"{len(tasks)} {generated.split} tasks" if tasks else f"{len(generated.accuracies)} networks"
    sentence = f"{generated.name} reaches {generated.mean:.4f} on {what}"
    if trained is not None and trained.accuracies:
        gap = 100 * (generated.mean - trained.mean)
        side = "below" if gap < 0 else "above"
        sentence += f", {abs(gap):.2f} points {side} trained networks ({trained.mean:.4f})"
    comparisons = [compare(generated, baseline) for baseline in baselines]
    if not comparisons:
        return sentence + "; nothing trivial to compare with.", False, []
    unbeaten = [b for b, c in zip(baselines, comparisons) if not c.above]
    beats = not unbeaten
    strongest = max(unbeaten or baselines, key=lambda b: b.mean)
    against = next(c for c in comparisons if c.against == strongest.name)
    paired = " (paired)" if tasks else ""
    amount = f"{100 * against.difference:+.2f} ± {100 * against.se:.2f} points{paired}"
    rank = "the strongest" if strongest.mean == max(b.mean for b in baselines) else "a"
    named = f"{rank} trivial generator ({strongest.name}, {strongest.mean:.4f})"
    if beats:
        return f"{sentence}, and beats {named} by {amount}.", True, comparisons
    return f"{sentence}: no better than {named}, {amount}.", False, comparisons
