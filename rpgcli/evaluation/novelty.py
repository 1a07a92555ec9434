"""Jointly novel and performant: how many generated networks are both good and far from every training network.

    N&P(m) = #{g : accuracy(g) >= alpha and distance(g) >= m tau} / n

A profile over m, from a self-published audit: not a standard. A generator at 0.9 tau has 0 at m = 1 by construction, so
the distances are shown beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

MULTIPLES = (1, 2, 3, 4, 6)
"""The m of the profile."""
ALPHA = 0.918
"""The accuracy asked for, as a fraction of the zoo's median."""


@dataclass(frozen=True)
class Share:
    """Networks that are good and at least m tau away."""

    m: int
    share: float
    se: float
    """Binomial standard error."""

    def to_json(self) -> dict[str, float]:
        """For the report."""
        return asdict(self)


def alpha(zoo_accuracies: Tensor, fraction: float = ALPHA) -> float:
    """Lowest accuracy that counts as good, from the training networks', (B,): fixed before any generator runs."""
    return fraction * float(zoo_accuracies.double().quantile(0.5))


def profile(
    accuracies: Tensor, distances: Tensor, *, alpha: float, tau: float, multiples: Sequence[int] = MULTIPLES
) -> list[Share]:
    """N&P of n >= 1 networks at each multiple of tau.

    Args:
        accuracies: (n,).
        distances: To the nearest training network, (n,).
        alpha: Lowest accuracy that counts as good.
        tau: The zoo's unit of distance, above 0.
        multiples: The m.
    """
    assert tau > 0, "copies would count as novel"
    good = accuracies >= alpha
    shares = [float((good & (distances >= m * tau)).double().mean()) for m in multiples]
    return [Share(m, p, math.sqrt(p * (1 - p) / len(accuracies))) for m, p in zip(multiples, shares)]
