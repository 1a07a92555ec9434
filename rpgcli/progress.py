"""How the library reports progress: one callback, called between two steps.

The callback may raise `errors.Interrupted`; every long loop then makes its state safe and lets the exception pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """`done` of `total` units are finished; `facts` are numbers worth showing (loss, accuracy)."""

    done: int
    total: int
    facts: Mapping[str, float | str] = field(default_factory=dict)
    phase: str = ""
    """Part of the stage, where it has several; a new one starts a new bar."""
    unit: str = "step"
    """What is counted, in the singular."""


OnStep = Callable[[Step], None]


def silent(step: Step) -> None:
    """Report nothing."""


def in_phase(on_step: OnStep, phase: str, unit: str = "step") -> OnStep:
    """Report further steps as those of a part of the stage."""
    return lambda step: on_step(Step(step.done, step.total, step.facts, phase, unit))
