"""Where networks lie, and how far from the training networks: as standardised parameters and as raw weights.

Where the tokens are aligned (`tokens.align`), hidden units are aligned before anything is compared: all networks are
brought to the training networks' first one. Of very large zoos every so manieth coordinate is looked at.

Letters: K training networks, n networks of a group, P parameters, p of them looked at.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from rpgcli.alignment import Aligner, Neighbours, free
from rpgcli.evaluation import distance
from rpgcli.problem import Problem, State
from rpgcli.tokens import TokenStore, transform
from rpgcli.zoo import Zoo

LOOKED_AT = 2**26
"""Values of all training networks that distances are computed from."""


class Space:
    """The coordinates in which networks are compared, and the training networks in them.

    Args:
        problem: Its target says which hidden units may be exchanged.
        store: The training networks.
        zoo: The same as they were trained, before their hidden units were aligned.
    """

    def __init__(self, problem: Problem, store: TokenStore, zoo: Zoo) -> None:
        self.store, self.zoo = store, zoo
        self.stride = -(-len(store) * store.layout.num_parameters // LOOKED_AT)
        is_aligned = store.artifact.facts.get("align", "none") != "none"
        frozen = [spec.name for spec in store.layout.shared]
        self.groups = free(problem.config.target.symmetries(problem.skeleton), frozen) if is_aligned else ()
        self.first = Aligner(store.state(0), self.groups) if self.groups else None
        self.x = torch.stack([self._some(store.vector(i)) for i in range(len(store))])  # (K, p)
        self.raw = torch.stack([self._some(self.weights(store.state(i))) for i in range(len(store))])  # (K, p)
        trainings = [(checkpoint["task_bits"], checkpoint["run"]) for checkpoint in store.checkpoints]
        numbers = {training: i for i, training in enumerate(dict.fromkeys(trainings))}
        self.trainings = torch.tensor([numbers[training] for training in trainings])  # (K,)
        own = self._leave_one_out()
        self.own: Tensor | None = own[0]
        self.own_raw: Tensor | None = own[1]
        self.tau = distance.tau(self.own) if self.own is not None else None
        self.tau_raw = distance.tau(self.own_raw) if self.own_raw is not None else None

    def weights(self, state: State) -> Tensor:
        """Raw generated values, (P,)."""
        return torch.cat([state[spec.name].reshape(-1).float() for spec in self.store.layout.generated])

    def place(self, state: State) -> tuple[Tensor, Tensor]:
        """Standardised and raw parameters of a finite network, (p,) each, hidden units aligned to the first one's."""
        weights = self.weights(self.first(state).state if self.first else state)
        return self._some(self._standardised(weights)), self._some(weights)

    def distances(self, x: Tensor, states: Sequence[State]) -> Tensor:
        """Of each network to the nearest training network, (n,) float64, in standardised parameters.

        Args:
            x: Where the networks lie, (n, p).
            states: The networks themselves, where hidden units are aligned to the nearest ones' as well.
        """
        return self.neighbours.nearest(states)[0] if self.groups else distance.nearest(x, self.x).distance

    def raw_distances(self, raw: Tensor) -> Tensor:
        """The same of raw weights, hidden units aligned to the first one's alone, (n,) float64."""
        return distance.nearest(raw, self.raw).distance

    def file_distances(self, states: Sequence[State]) -> Tensor:
        """Of networks to the nearest training network as both stand in their files, nothing aligned, (n,) float64."""
        return distance.nearest(torch.stack([self._unaligned(state) for state in states]), self.files).distance

    @cached_property
    def average(self) -> Tensor:
        """Where the mean of the training networks lies, (p,); alignment gives its units the first one's scale."""
        num = len(self.store)
        mean = sum((self.store.vector(i) / num for i in range(1, num)), self.store.vector(0) / num)  # (P,)
        return self.place(self.store.rebuilt(mean))[0]

    @cached_property
    def files(self) -> Tensor:
        """Standardised parameters of the training networks as they stand in their files, (K, p)."""
        return torch.stack([self._unaligned(state) for state in self.zoo.states(self.zoo.select("seen"))])

    @cached_property
    def neighbours(self) -> Neighbours:
        """The training networks, where hidden units may be exchanged."""
        states = [self.store.state(i) for i in range(len(self.store))]
        return Neighbours(states, self.groups, self._unaligned)

    def _leave_one_out(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Distances of the training networks to the nearest of another training, standardised and raw, (K,) each.

        Neighbours on one trajectory are an optimiser step apart, which says nothing of how far networks are: None
        where there is one training.
        """
        if len(self.trainings.unique()) < 2:
            return None, None
        own_raw = distance.nearest(self.raw, runs=self.trainings).distance
        if not self.groups:
            return distance.nearest(self.x, runs=self.trainings).distance, own_raw
        others = self.trainings[:, None] != self.trainings
        return self.neighbours.nearest(self.neighbours.zoo, may_be_near=others)[0], own_raw

    def _unaligned(self, state: State) -> Tensor:
        return self._some(self._standardised(self.weights(state)))

    def _standardised(self, weights: Tensor) -> Tensor:
        layout, statistics = self.store.layout, self.store.statistics
        return layout.ungrid(statistics.standardise(layout.grid(transform(weights, layout, statistics.references))))

    def _some(self, values: Tensor) -> Tensor:
        return values[:: self.stride].clone()
