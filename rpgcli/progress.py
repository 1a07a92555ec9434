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


OnStep = Callable[[Step], None]


def silent(step: Step) -> None:
    """Report nothing."""
