"""Conditions: what is asked of a generated network, as vectors added to every token.

    condition   the task, as bits (or nothing)
    state       the permutation state: which of several independent, equivalent trainings is meant

Letters: B networks in the batch, M = d_model.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpgcli.errors import UsageError

ConditionKind = Literal["auto", "task-bits", "none"]
StateKind = Literal["run", "checkpoint", "none"]


class TaskBits(nn.Module):
    """A task's bits, as -1 and +1, through a small network."""

    def __init__(self, num_bits: int, d_model: int) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.net = nn.Sequential(nn.Linear(num_bits, d_model), nn.SiLU(), nn.Linear(d_model, d_model))

    def forward(self, bits: Tensor) -> Tensor:  # (B, num_bits) of 0 and 1
        """(B, M)."""
        return self.net(2 * bits - 1)  # type: ignore[no-any-return]


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
