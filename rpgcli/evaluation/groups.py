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
    failed: Sequence[str] = ()
    """Files of those that do not work, which count nowhere else."""

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
            "accuracy": accuracy, "seconds_per_network": self.seconds_per_network, "failed": list(self.failed),
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Accuracy of one group minus that of another, paired over tasks on the same test images."""

    name: str
    against: str
    difference: float
    se: float
    num_pairs: int
    has_error: bool = True
    """Whether a standard error is known: not of a single network or task."""
    comparable: bool = True
    """Whether the other group is one that the first has to beat."""
    why: str = ""
    """Why it is, or is not."""

    @property
    def above(self) -> bool:
        """Whether the first is better by more than two standard errors."""
        return self.has_error and self.difference > 2 * self.se

    @property
    def words(self) -> str:
        """`+0.12 ± 0.07 points, 1.7 standard errors`."""
        if not self.has_error:
            return f"{100 * self.difference:+.2f} points, standard error unknown"
        count = f", {self.difference / self.se:.1f} standard errors" if self.se > 0 else ""
        return f"{100 * self.difference:+.2f} ± {100 * self.se:.2f} points{count}"

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**vars(self), "above": self.above}


def compare(a: Group, b: Group, comparable: bool = True, why: str = "") -> Comparison:
    """Paired over the tasks that both hold; a task and its complement count as one observation.

    Without tasks the groups are independent samples; one network that is the same whatever is drawn has no error.
    """
    mine, other = a.by_task(), b.by_task()
    if not mine or not other:
        se = math.hypot(standard_error(a.accuracies), standard_error(b.accuracies))
        count = min(len(a.accuracies), len(b.accuracies))
        return Comparison(a.name, b.name, a.mean - b.mean, se, count, len(a.accuracies) > 1, comparable, why)
    differences = by_pair({task: mine[task] - other[task] for task in mine if task in other})
    mean, se, count = sum(differences) / len(differences), standard_error(differences), len(differences)
    return Comparison(a.name, b.name, mean, se, count, count > 1, comparable, why)


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


# --- the verdict ------------------------------------------------------------------------------------------------------

NO_EVIDENCE = "no evidence that it is better"
OF_TASKS = "asked for the same tasks"
"""Why all trivial generators of zoos of tasks are comparable."""
NUM_NAMED = 3
"""Groups named in the verdict at most."""


def verdict(
    generated: Group,
    trained: Group | None,
    baselines: Sequence[Group],
    *,
    comparable: Mapping[str, tuple[bool, str]] | None = None,
    what: str = "",
    instead: str = "",
) -> tuple[str, bool, list[Comparison]]:
    """One sentence on how the generated networks do, whether every comparable trivial generator is beaten by more than
    two standard errors, and all comparisons.

    Args:
        generated: The group that is judged.
        trained: Networks trained for the same.
        baselines: Trivial generators.
        comparable: Of each by name, whether it is as novel as the generated networks, and why (not); left out: all
            are, as the task decides what is new.
        what: What the generated set is, in a few words.
        instead: What would do as well as such a set, whatever the comparisons say.
    """
    total = len(generated.accuracies) + len(generated.failed)
    if not generated.accuracies and generated.failed:
        return f"all {counted(total)} of {generated.name} failed (NaN or infinity): {NO_EVIDENCE}.", False, []
    if not generated.accuracies:
        return f"{generated.name} generated no network to be judged ({generated.split}).", False, []
    tasks = generated.by_task()
    sentence = f"{generated.name} reaches {generated.mean:.4f} on "
    sentence += f"{len(tasks)} {generated.split} tasks" if tasks else counted(len(generated.accuracies))
    remarks = [f"{len(generated.failed)} more failed: NaN or infinity"] if generated.failed else []
    if remarks or what:
        sentence += f" ({'; '.join(filter(None, [what, *remarks]))})"
    if trained is not None and trained.accuracies:
        gap = 100 * compare(generated, trained).difference
        side = "below" if gap < 0 else "above"
        num = len(trained.by_task())
        peers = f"networks trained for {num} of them" if num < len(tasks) else "trained networks"
        sentence += f", {abs(gap):.2f} points {side} {peers} ({trained.mean:.4f})"
    baselines = [b for b in baselines if b.accuracies]
    all_are = dict.fromkeys((b.name for b in baselines), (True, OF_TASKS))
    comparisons = [compare(generated, b, *(comparable or all_are)[b.name]) for b in baselines]
    if instead:
        return f"{sentence}: {NO_EVIDENCE} than {instead}.", False, comparisons
    if not comparisons:
        return sentence + "; nothing trivial to compare with.", False, []
    rivals = [(b, c) for b, c in zip(baselines, comparisons) if c.comparable]
    others = [b.name for b, c in zip(baselines, comparisons) if not c.comparable and b.mean > generated.mean]
    more = f" and {len(others) - NUM_NAMED} more" if len(others) > NUM_NAMED else ""
    aside = f"; more accurate but less novel: {', '.join(others[:NUM_NAMED])}{more}" if others else ""
    if not rivals:
        return f"{sentence}: {NO_EVIDENCE}, as no trivial generator is as novel{aside}.", False, comparisons
    unbeaten = [(b, c) for b, c in rivals if not c.above]
    strongest, against = max(unbeaten or rivals, key=lambda rival: rival[0].mean)
    rank = "the strongest" if strongest.mean == max(b.mean for b, _ in rivals) else "a"
    named = f"{rank} trivial generator{' that is as novel' if len(rivals) < len(baselines) else ''}"
    named += f" ({strongest.name}, {strongest.mean:.4f})"
    amount = against.words.replace(" points", " points (paired)" if tasks else " points")
    if unbeaten:
        return f"{sentence}: {NO_EVIDENCE} than {named}, {amount}{aside}.", False, comparisons
    return f"{sentence}, and beats {named} by {amount}{aside}.", True, comparisons


def counted(num: int) -> str:
    """`20 networks`."""
    return "1 network" if num == 1 else f"{num} networks"
