"""Jointly novel and performant: how many generated networks are both good and far from every training network.

    N&P(m) = #{g : accuracy(g) >= alpha and distance(g) >= m tau} / n

A profile over m, from a self-published audit: not a standard. A generator at 0.9 tau has 0 at m = 1 by construction, so
the distances are shown beside it.

Near-copies of good networks are good, so a generator is compared with the trivial generators that are as novel: their
mean distance to the nearest training network is not smaller by more than two standard errors of the difference. Where
tau means nothing, as in a zoo of one training, the error IoU with the nearest training network must not be higher.
Bad networks are new to no avail (noise is, and low accuracy alone lowers the error IoU): where the mean accuracy of the
generated networks is below alpha, all trivial generators are compared.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from rpgcli.evaluation.groups import standard_error

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


@dataclass(frozen=True)
class Novelty:
    """How new the networks of a group are, one value for each."""

    iou: Sequence[float]
    """Error IoU with the nearest training network: lower is newer."""
    distance: Sequence[float] | None
    """To the nearest training network, in tau; None where tau means nothing."""


def as_novel(other: Novelty, generated: Novelty) -> tuple[bool, str]:
    """Whether another group is at least as novel as the generated one, and why (not)."""
    what, sign = "error IoU with the nearest training network", 1
    theirs, ours = other.iou, generated.iou
    if other.distance is not None and generated.distance is not None:
        what, sign = "tau from the nearest training network", -1
        theirs, ours = other.distance, generated.distance
    mean, own = (sum(values) / len(values) for values in (theirs, ours))
    is_so = sign * (mean - own) <= 2 * math.hypot(standard_error(theirs), standard_error(ours))
    return is_so, f"{'as' if is_so else 'less'} novel: {mean:.3f} {what}, generated networks {own:.3f}"
