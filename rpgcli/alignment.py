"""Alignment: bring the hidden units of one network into the order and scale of another's.

A network computes the same when the hidden units of a layer are permuted, with what enters and what leaves each; and,
where ReLU follows, when what enters a unit is multiplied by s > 0 and what leaves it divided by s.

    1. scale      what enters each unit of a ReLU gets norm 1, from input to output
    2. start      each group of units is matched by those of its weights whose other side is matched already
    3. match      one group after the other is matched again by all its weights, until none gains: Git Re-Basin
                  (Ainsworth et al. 2023) Algorithm 1
    4. rescale    to the norms of the reference

Step 2 is ours: the published algorithm starts from the order that the units happen to have. From a start that does not
depend on that order, neither does the result, and a permuted copy is recovered at once. The best of 50 more starts at
random gained 0.008 of cosine at 50 times the cost, and nothing in the accuracy of averages (digits, `cnn`).

Also ours: each tensor counts in units of its own deviation. Raw values, as published, let the running variances of a
ResNet decide alone: averages of two ResNet-18, their statistics taken anew, had 0.63 and 0.38 of the digits right
against 0.92 and 0.77.

Letters: n units of a track, b blocks, r values of a unit along a dimension, P parameters, p of them or functions of
them looked at, A networks, K networks of a zoo.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rpgcli.layout import check_finite

State = Mapping[str, Tensor]

MAX_SWEEPS = 100
"""Rounds of step 3 at most; a few suffice."""
LEAST_GAIN = 1e-6
"""Gain of similarity, as a fraction of its bound, below which units stay as they are: the rounding of float32."""
NUM_CANDIDATES = 5
"""Networks of a zoo that a network is compared with exactly: by distance, and by what no permutation changes."""


@dataclass(frozen=True)
class Axis:
    """Where the units of a track lie in one tensor."""

    name: str
    dim: int
    places: Tensor  # (n, r) along `dim`
    power: int = 0
    """Scaling a unit by s multiplies its values here by s ** power: 1 what enters it, -1 what leaves it."""

    def rows(self, tensor: Tensor) -> Tensor:
        """The values of each unit, (n, values of a unit)."""
        return tensor.movedim(self.dim, 0)[self.places].flatten(1)

    def permute(self, tensor: Tensor, order: Tensor) -> Tensor:
        """A copy with unit `order[i]` in place of unit i."""
        moved = tensor.index_select(self.dim, self.places[order].flatten())
        return tensor.index_copy(self.dim, self.places.flatten(), moved)

    def scale(self, tensor: Tensor, s: Tensor) -> Tensor:
        """A copy with unit i scaled by s[i], (n,)."""
        factors = s.new_ones(tensor.shape[self.dim])
        factors[self.places] = (s**self.power)[:, None]
        return tensor * factors.view(-1, *[1] * (tensor.dim() - 1 - self.dim))


@dataclass(frozen=True)
class Group:
    """Hidden units that can be exchanged.

    The units of a track are permuted together wherever they lie. With several blocks, whole blocks are permuted, in
    all tracks alike, and units inside each block: attention heads, with one track of queries and keys and one of
    values.
    """

    name: str
    tracks: tuple[tuple[Axis, ...], ...]
    num_blocks: int = 1

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those of all tracks."""
        return tuple(axis for track in self.tracks for axis in track)

    @property
    def num_units(self) -> int:
        """Units of all tracks."""
        return sum(len(track[0].places) for track in self.tracks)

    def identity(self) -> tuple[Tensor, ...]:
        """The order that units have, for each track."""
        return tuple(torch.arange(len(track[0].places)) for track in self.tracks)

    def permute(self, tensors: dict[str, Tensor], orders: Sequence[Tensor]) -> None:
        """Put unit `order[i]` of each track in place of unit i, in `tensors`."""
        for track, order in zip(self.tracks, orders):
            for axis in track:
                tensors[axis.name] = axis.permute(tensors[axis.name], order)

    def scale(self, tensors: dict[str, Tensor], s: Tensor) -> None:
        """Multiply what enters unit i by s[i] and divide what leaves it, in `tensors`."""
        for axis in self.axes:
            if axis.power:
                tensors[axis.name] = axis.scale(tensors[axis.name], s)


def places(num_units: int, repeat: int = 1, start: int = 0) -> Tensor:
    """Neighbouring places for each unit from `start` on, (n, repeat), as in a flattened map of `repeat` pixels."""
    return start + torch.arange(num_units * repeat, device="cpu").view(num_units, repeat)  # Also while on `meta`.


def units(
    name: str,
    num_units: int,
    entering: Sequence[str],
    leaving: Sequence[str],
    *,
    repeat: int = 1,
    scaled: Collection[str] = (),
) -> Group:
    """A group of one track.

    Args:
        name: What the group is called.
        num_units: Its size.
        entering: Tensors with a row for each unit: weights, biases, norms.
        leaving: Weights of the next layers, with `repeat` columns for each unit.
        repeat: Pixels in the map of a unit that the next layer takes flattened.
        scaled: Those of `entering` that scale a unit, behind which nothing but ReLU and pooling comes before `leaving`.
    """
    axes = [Axis(each, 0, places(num_units), int(each in scaled)) for each in entering]
    axes += [Axis(each, 1, places(num_units, repeat), -1 if scaled else 0) for each in leaving]
    return Group(name, (tuple(axes),))


def free(groups: Sequence[Group], frozen: Collection[str]) -> tuple[Group, ...]:
    """The groups that can be exchanged while the tensors called `frozen` stay as they are."""
    return tuple(group for group in groups if not {axis.name for axis in group.axes} & set(frozen))


def fits(groups: Sequence[Group], state: State) -> bool:
    """Whether the groups' tensors exist, and each dimension that holds units holds nothing else."""
    held: dict[tuple[str, int], int] = {}
    for axis in (axis for group in groups for axis in group.axes):
        place = axis.name, axis.dim
        held[place] = held.get(place, 0) + axis.places.numel()
    return all(name in state and state[name].shape[dim] == count for (name, dim), count in held.items())


# --- one network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aligned:
    """A network in the order and scale of a reference."""

    state: dict[str, Tensor]
    permutations: dict[str, tuple[Tensor, ...]]
    """Of each group and track: unit i is unit `permutation[i]` of the network as it was."""


class Aligner:
    """Brings networks to a reference; the reference itself stays as it is, to rounding.

    Args:
        reference: The state dict in whose order and scale networks are wanted.
        groups: Its symmetries, from input to output.

    Raises:
        LayoutError: If the reference is not finite.
    """

    def __init__(self, reference: State, groups: Sequence[Group]) -> None:
        self.groups = groups
        tensors, self.scales = normalise(reference, groups)
        self.reference = {name: standardise(tensor) for name, tensor in tensors.items()}
        self.rows = {
            group.name: [[axis.rows(self.reference[axis.name]) for axis in track] for track in group.tracks]
            for group in groups
        }
        self.holders = {name: {g.name for g in groups for a in g.axes if a.name == name} for name in self.reference}
        """The groups that have units in each tensor."""

    def __call__(self, state: State) -> Aligned:
        """Align a network.

        Raises:
            LayoutError: If it is not finite.
        """
        tensors, _ = normalise(state, self.groups)
        orders = {group.name: group.identity() for group in self.groups}
        matched: set[str] = set()
        for group in self.groups:
            matched.add(group.name)
            self._match(group, tensors, orders, matched)
        for _ in range(MAX_SWEEPS):
            num_moved = sum(self._match(group, tensors, orders, matched) for group in self.groups)
            if num_moved == 0:
                break
        for group in self.groups:
            if group.name in self.scales:
                group.scale(tensors, self.scales[group.name])
        found = {name: tensors[name].to(v.dtype) if name in tensors else v for name, v in state.items()}
        return Aligned(found, orders)

    def _match(
        self,
        group: Group,
        tensors: dict[str, Tensor],
        orders: dict[str, tuple[Tensor, ...]],
        matched: set[str],
    ) -> bool:
        """Match one group by the tensors that hold units of `matched` groups only; say whether any unit moved."""
        grams = []
        for track, rows in zip(group.tracks, self.rows[group.name]):
            gram = torch.zeros(len(track[0].places), len(track[0].places))
            for axis, row in zip(track, rows):
                if self.holders[axis.name] <= matched:
                    gram.addmm_(row, axis.rows(tensors[axis.name]).T)  # (n, n)
            grams.append(gram)
        new = assign(grams, group.num_blocks)
        gain = sum(float((g.gather(1, order[:, None])[:, 0] - g.diagonal()).sum()) for g, order in zip(grams, new))
        if gain <= LEAST_GAIN * sum(float(g.abs().amax(1).sum()) for g in grams):
            return False
        group.permute(tensors, new)
        orders[group.name] = tuple(old[order] for old, order in zip(orders[group.name], new))
        return True


def aligned(states: Iterable[State], reference: State, groups: Sequence[Group]) -> Iterator[State]:
    """Networks one by one in the order and scale of a reference; as they are where there are no groups."""
    aligner = Aligner(reference, groups)
    return (aligner(state).state for state in states) if groups else iter(states)


def normalise(state: State, groups: Sequence[Group]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Step 1.

    Returns:
        The tensors that hold units, float32, and for each group with a scale the norms that its units had, (n,); a
        unit that nothing enters has 1.

    Raises:
        LayoutError: If a tensor is not finite.
    """
    tensors = {axis.name: state[axis.name].float() for group in groups for axis in group.axes}
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    norms = {}
    for group in groups:
        entering = [axis.rows(tensors[axis.name]) for axis in group.axes if axis.power == 1]
        if entering:
            rows = torch.cat(entering, 1)
            norm = rows.norm(dim=1)  # (n,)
            if not norm.isfinite().all():  # The squares are beyond float32, the norms are not.
                norm = rows.double().norm(dim=1).float()
            norms[group.name] = torch.where(norm > 0, norm, 1)
            group.scale(tensors, 1 / norms[group.name])
    return tensors, norms


def standardise(tensor: Tensor) -> Tensor:
    """A reference's tensor around its mean, divided by its variance: its product with another network's tensor counts
    that in units of its deviation, up to a constant. A tensor that does not vary says nothing of units and becomes 0.
    """
    variance, mean = torch.var_mean(tensor, correction=0)
    return torch.where(variance > 0, (tensor - mean) / variance, 0)


def assign(grams: Sequence[Tensor], num_blocks: int = 1) -> list[Tensor]:
    """The order of each track that maximises the sum of `gram[i, order[i]]`; blocks move alike in all tracks.

    Args:
        grams: (n, n) for each track: similarity of the reference's unit i with unit j.
        num_blocks: b; each block of the reference is tried with each block.
    """
    if num_blocks == 1:
        return [torch.from_numpy(linear_sum_assignment(gram.numpy(), maximize=True)[1]) for gram in grams]
    score = torch.zeros(num_blocks, num_blocks)
    inside: list[dict[tuple[int, int], Tensor]] = []
    for gram in grams:
        size = len(gram) // num_blocks
        cells = gram.unflatten(0, (num_blocks, size)).unflatten(2, (num_blocks, size)).transpose(1, 2)
        orders = {(i, j): assign([cells[i, j]])[0] for i in range(num_blocks) for j in range(num_blocks)}
        for (i, j), order in orders.items():
            score[i, j] += cells[i, j].gather(1, order[:, None]).sum()
            orders[i, j] = j * size + order
        inside.append(orders)
    blocks = assign([score])[0].tolist()
    return [torch.cat([orders[i, j] for i, j in enumerate(blocks)]) for orders in inside]


# --- many networks ----------------------------------------------------------------------------------------------------


def invariants(state: State, groups: Sequence[Group]) -> Tensor:
    """What neither permutations nor scales change: the sorted norms of all units in each of their tensors, (p,)."""
    tensors, _ = normalise(state, groups)
    return torch.cat([axis.rows(tensors[axis.name]).norm(dim=1).sort().values for g in groups for axis in g.axes])


class Neighbours:
    """A zoo in which the nearest of other networks is found, whatever the order and scale of their hidden units.

    All are brought to the zoo's first network, and each is then aligned to its five nearest by `invariants` as well:
    two networks that are alike but unlike the first may have been brought to it in different ways. So the number of
    alignments grows with A + K.

    Args:
        zoo: K networks, finite, read as they are asked for; the first is the one that `vector` was made for.
        groups: Their symmetries, from input to output; none leaves networks as they are.
        vector: The coordinates of a network in which distances are measured, (p,) float32.
    """

    def __init__(self, zoo: Sequence[State], groups: Sequence[Group], vector: Callable[[State], Tensor]) -> None:
        self.zoo, self.groups, self.vector = zoo, groups, vector
        self.first = Aligner(zoo[0], groups)
        self.y = self._vectors(zoo)  # (K, p)
        self.invariants = self._invariants(zoo)

    def nearest(self, states: Sequence[State], *, may_be_near: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the nearest of the zoo.

        Args:
            states: A networks, finite.
            may_be_near: Which of the zoo counts as a neighbour of each, (A, K) bool, at least one. Default: all.

        Returns:
            The distance, (A,) float64, and which of the zoo it is from, (A,).
        """
        x, y = self._vectors(states), self.y  # (A, p), (K, p)
        forbidden = torch.zeros(len(x), len(y), dtype=torch.bool) if may_be_near is None else ~may_be_near
        assert not forbidden.all(1).any(), "a network has no neighbour"
        num_candidates = min(NUM_CANDIDATES, len(y))

        # As they were brought to the first. The expansion of `cdist` loses digits: it only chooses candidates.
        candidates = torch.cdist(x, y).masked_fill_(forbidden, torch.inf).topk(num_candidates, largest=False).indices
        exact = torch.stack([(x - y[index]).double().norm(dim=1) for index in candidates.T], 1)  # (A, candidates)
        exact.masked_fill_(forbidden.gather(1, candidates), torch.inf)
        distance, best = exact.min(1)
        nearest = candidates.gather(1, best[:, None])[:, 0]
        if not self.groups:
            return distance, nearest

        # Each aligned to the most similar ones by what no permutation changes.
        unit = self.invariants.std(0, correction=0)
        unit = torch.where(unit > 0, unit, 1)
        candidates = torch.cdist(self._invariants(states) / unit, self.invariants / unit)
        candidates = candidates.masked_fill_(forbidden, torch.inf).topk(num_candidates, largest=False).indices
        for j in candidates.unique().tolist():
            to_it = Aligner(self.first(self.zoo[j]).state, self.groups)
            for i in (candidates == j).any(1).nonzero()[:, 0].tolist():
                found = (self.vector(to_it(states[i]).state) - y[j]).double().norm()
                if found < distance[i] and not forbidden[i, j]:
                    distance[i], nearest[i] = found, j
        return distance, nearest

    def _vectors(self, states: Sequence[State]) -> Tensor:
        return torch.stack([self.vector(self.first(state).state) for state in states])

    def _invariants(self, states: Sequence[State]) -> Tensor:
        return torch.stack([invariants(state, self.groups) for state in states]) if self.groups else torch.zeros(0)
