"""Conditions: what is asked of a generated network, as features that enter every token.

    task-bits        the task: -1 or +1 for each class
    label            a name that the networks of a zoo carry: one-hot
    accuracy-level   which of several ranges the network's validation accuracy lies in: one-hot (p-diff Tab. 6)
    accuracy         that accuracy itself, standardised over the seen checkpoints
    state            the permutation state: which of several independent, equivalent trainings is meant

A network that a kind says nothing of has only zeros there, which is also how one is sampled without a condition.

Letters: B networks in the batch, C features, M = d_model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpgcli.errors import UsageError

ConditionKind = Literal["auto", "task-bits", "label", "accuracy-level", "accuracy", "none"]
StateKind = Literal["run", "checkpoint", "none"]
Levels = tuple[tuple[float, float], ...]
"""Ranges of accuracy, each from a smallest value to below a largest one (1 included)."""


@dataclass(frozen=True)
class Asked:
    """What one network is asked for; for one that was trained, what it is."""

    split: str = "all"
    """`seen`, `validation` or `unseen` task; `all` where tasks do not matter."""
    task_bits: str | None = None
    label: str | None = None
    accuracy: float | None = None

    @property
    def words(self) -> str:
        """For names of files and folders; empty if nothing is asked."""
        accuracy = None if self.accuracy is None else f"accuracy-{self.accuracy:g}"
        return "-".join(word for word in (self.task_bits, self.label, accuracy) if word is not None)


@dataclass(frozen=True)
class Condition:
    """How what is asked becomes features."""

    kind: Literal["task-bits", "label", "accuracy-level", "accuracy"]
    num_features: int
    labels: tuple[str, ...] = ()
    levels: Levels = ()
    mean: float = 0.0
    std: float = 1.0

    def features(self, asked: Sequence[Asked]) -> Tensor:
        """(B, C) float32."""
        rows = torch.zeros(len(asked), self.num_features)
        for row, one in zip(rows, asked):
            if self.kind == "task-bits" and one.task_bits is not None:
                row += torch.tensor([2.0 * int(bit) - 1 for bit in one.task_bits])
            elif self.kind == "label" and one.label is not None:
                row[self.labels.index(one.label)] = 1
            elif self.kind == "accuracy" and one.accuracy is not None:
                row[0] = (one.accuracy - self.mean) / self.std
            elif self.kind == "accuracy-level" and (level := self.level(one.accuracy)) is not None:
                row[level] = 1
        return rows

    def level(self, accuracy: float | None) -> int | None:
        """Which range an accuracy lies in."""
        if accuracy is None:
            return None
        return next(
            (i for i, (low, high) in enumerate(self.levels) if low <= accuracy < high or accuracy == high == 1), None
        )

    def check(self, asked: Asked) -> None:
        """Raise a UsageError if this condition cannot express what is asked."""
        given = {"--task-bits": asked.task_bits, "--label": asked.label, "--accuracy": asked.accuracy}
        mine = {"task-bits": "--task-bits", "label": "--label"}.get(self.kind, "--accuracy")
        for option, value in given.items():
            if value is not None and option != mine:
                raise UsageError(f"this model knows no {option}.", f"It was trained with {mine} as its condition.")
        if asked.label is not None and asked.label not in self.labels:
            raise UsageError(f"--label {asked.label!r} is unknown.", f"This model knows: {', '.join(self.labels)}.")
        if self.kind == "accuracy-level" and asked.accuracy is not None and self.level(asked.accuracy) is None:
            raise UsageError(
                f"--accuracy {asked.accuracy:g} lies in no level.", f"This model knows: {spoken(self.levels)}."
            )

    def to_json(self) -> dict[str, Any]:
        """For the facts of a trained model."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Condition":
        """Inverse of `to_json`."""
        levels = tuple((low, high) for low, high in value["levels"])
        return cls(**{**value, "labels": tuple(value["labels"]), "levels": levels})


def asked_of(checkpoint: Mapping[str, Any]) -> Asked:
    """What a training checkpoint is, from the facts of the token store; its accuracy is that on validation images."""
    measured = checkpoint.get("accuracy")
    return Asked("seen", checkpoint.get("task_bits"), checkpoint.get("label"), measured and measured["validation"])


def make_condition(
    kind: ConditionKind, levels: Levels, checkpoints: Sequence[Mapping[str, Any]], *, section: str
) -> Condition | None:
    """The condition of a model that learns from `checkpoints`; None for an unconditional one.

    Args:
        kind: `auto` is task-bits where the zoo has them, else none.
        levels: Of `accuracy-level`.
        checkpoints: Facts of the token store.
        section: Of the recipe, for messages.

    Raises:
        UsageError: If the zoo does not say what the condition needs.
    """
    known = [asked_of(checkpoint) for checkpoint in checkpoints]
    if kind == "none" or (kind == "auto" and known[0].task_bits is None):
        return None
    if kind in {"auto", "task-bits"}:
        if known[0].task_bits is None:
            raise UsageError(
                f"{section}.condition is task-bits, but the networks of this zoo have no task.",
                "Set it to none or auto.",
            )
        return Condition("task-bits", len(known[0].task_bits))
    if kind == "label":
        labels = tuple(sorted({one.label for one in known if one.label is not None}))
        if not labels:
            raise UsageError(
                f"{section}.condition is label, but the networks of this zoo have none.",
                "Collect them with `--from DIR`, one sub-folder for each label.",
            )
        return Condition("label", len(labels), labels=labels)
    accuracies = torch.tensor([one.accuracy for one in known if one.accuracy is not None], dtype=torch.float64)
    if len(accuracies) == 0:
        raise UsageError(f"{section}.condition is {kind}, but nobody measured the networks of this zoo.")
    if kind == "accuracy":
        std = float(accuracies.std(correction=0))
        return Condition("accuracy", 1, mean=float(accuracies.mean()), std=std if std > 1e-9 else 1.0)  # Or rounding.
    if not levels:
        raise UsageError(
            f"{section}.condition is accuracy-level without {section}.levels.", "Give some: [[0.5, 0.7], [0.9, 1]]."
        )
    condition = Condition("accuracy-level", len(levels), levels=levels)
    held = [sum(condition.level(a) == i for a in accuracies.tolist()) for i in range(len(levels))]
    if 0 in held:
        low, high = accuracies.min(), accuracies.max()
        raise UsageError(
            f"no network of this zoo has a validation accuracy in level {spoken([levels[held.index(0)]])}.",
            f"They reach {low:.3f} to {high:.3f}; networks in each level: {', '.join(map(str, held))}.",
        )
    return condition


def check_levels(levels: Levels) -> Levels:
    """Raise a ValueError unless levels are ranges within [0, 1], in order, that do not overlap."""
    ends = [end for level in levels for end in level]
    if ends != sorted(ends) or any(low >= high for low, high in levels) or (ends and not 0 <= ends[0] <= ends[-1] <= 1):
        raise ValueError(f"levels {spoken(levels)} must be ranges in [0, 1] from low to high that do not overlap")
    return levels


def spoken(levels: Sequence[tuple[float, float]]) -> str:
    """Levels in words."""
    return ", ".join(f"{low:g}-{high:g}" for low, high in levels)


class ConditionNet(nn.Module):
    """Features of a condition through a small network, `d_model` wide inside or `d_condition`."""

    def __init__(self, num_features: int, d_model: int, d_condition: int | None = None) -> None:
        super().__init__()
        self.num_features = num_features
        inside = d_condition or d_model
        self.net = nn.Sequential(nn.Linear(num_features, inside), nn.SiLU(), nn.Linear(inside, d_model))

    def forward(self, features: Tensor) -> Tensor:  # (B, C)
        """(B, M)."""
        return self.net(features)  # type: ignore[no-any-return]


def state_indices(checkpoints: Sequence[dict[str, Any]], kind: StateKind) -> Tensor:
    """The permutation state of each training checkpoint, (N,) int64.

    `run`: checkpoints of one independent training share a state; `checkpoint`: each has its own (the paper's).
    """
    if kind == "checkpoint":
        return torch.arange(len(checkpoints))
    if kind == "run":
        runs = sorted({int(checkpoint["run"]) for checkpoint in checkpoints})
        return torch.tensor([runs.index(int(checkpoint["run"])) for checkpoint in checkpoints])
    return torch.zeros(len(checkpoints), dtype=torch.int64)


def parse_state(text: str, num_states: int) -> int | None:
    """`random` -> None, `none` -> -1, a number -> that state.

    Raises:
        UsageError: If it is none of these, or the model has no such state.
    """
    if text in {"random", "none"}:
        return None if text == "random" else -1
    if not text.isdecimal() or int(text) >= num_states:
        raise UsageError(
            f"--state {text!r} does not exist.", f"Give random, none, or a number from 0 to {num_states - 1}."
        )
    return int(text)
