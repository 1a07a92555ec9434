"""Euclidean distance of networks to the nearest of others: are they copies?

    |x - y|^2 = |x|^2 + |y|^2 - 2 x y        for all pairs, in float64, around the mean of the others
    |x - y|                                  again from the differences, for the few nearest of each

The expansion loses digits where x is close to y, and a copy must be at distance 0: so it only chooses candidates.
Coordinates come in blocks, each read once and once more for the candidates: memory-mapped tensors stay on the disk.

Letters: A networks, B others, P coordinates. Raw or standardised is the caller's choice; all must be finite.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_VALUES = 2**22
"""Values of all networks held in float64 at once."""
NUM_CANDIDATES = 4
"""Nearest ones whose distance is computed from the differences."""


@dataclass(frozen=True)
class Nearest:
    """The nearest of the others to each network."""

    distance: Tensor  # (A,) float64
    index: Tensor  # (A,)


def nearest(x: Tensor, others: Tensor | None = None, *, runs: Tensor | None = None) -> Nearest:
    """The nearest of `others` to each row of `x`.

    Args:
        x: (A, P).
        others: (B, P). Default: the other rows of `x` (leave one out).
        runs: Without `others`: the training that each row comes from, (A,); rows of one run are no neighbours of each
            other, as they are an optimiser step apart. There must be two runs. Default: each row is a run.
    """
    y = x if others is None else others
    squares = x.new_zeros(len(x), len(y), dtype=torch.float64)
    norms_x, norms_y = squares.new_zeros(len(x), 1), squares.new_zeros(len(y))
    num_columns = max(1, BLOCK_VALUES // (len(x) + len(y)))
    for a, b in zip(x.split(num_columns, 1), y.split(num_columns, 1)):
        centre = b.mean(0, dtype=torch.float64)  # (n,)
        a, b = a - centre, b - centre  # (A, n), (B, n)
        norms_x += a.square().sum(1, keepdim=True)
        norms_y += b.square().sum(1)
        squares.addmm_(a, b.T, alpha=-2)  # (A, B)
    squares += norms_x
    squares += norms_y
    num_others = len(y)
    if others is None:
        runs = torch.arange(len(x), device=x.device) if runs is None else runs
        same = runs[:, None] == runs  # (A, A)
        squares.masked_fill_(same, torch.inf)
        num_others -= int(same.sum(1).max())
    assert num_others > 0, "a network has no neighbour"
    num_candidates = min(NUM_CANDIDATES, num_others)
    candidates = squares.topk(num_candidates, largest=False).indices  # (A, candidates)
    exact = torch.zeros_like(candidates, dtype=torch.float64)
    for a, b in zip(x.split(num_columns, 1), y.split(num_columns, 1)):
        for k, index in enumerate(candidates.T):
            exact[:, k] += (a.double() - b[index]).square().sum(1)  # (A,)
    best = exact.argmin(1, keepdim=True)  # (A, 1)
    return Nearest(exact.gather(1, best).squeeze(1).sqrt(), candidates.gather(1, best).squeeze(1))


def tau(zoo: Tensor) -> float | None:
    """The zoo's own unit of distance: the median of how far each of its networks is from the nearest other.

    Args:
        zoo: Distances of its networks with one left out, (B,). In a zoo of one dense trajectory they are the length of
            an optimiser step and mean nothing: take separate runs.

    Returns:
        None where there is none, or where most networks are copies of each other: there is no unit then.
    """
    median = float(zoo.quantile(0.5)) if len(zoo) else 0.0
    return median if median > 0 else None


def extent(zoo: Tensor) -> float:
    """How far a zoo's networks, (B, P), lie from their mean: the root of the mean square distance."""
    return float(zoo.var(0, correction=0).sum(dtype=torch.float64).sqrt())
