"""Trivial generators of zoos of tasks: what a learned one has to beat.

Each learns from the same seen checkpoints (all snapshots, in the generator's own standardised coordinates), chooses its
settings on validation tasks, and predicts the parameters of a network from its task bits.

    average       the mean of all seen checkpoints, whatever the task
    average-trunk the same, but its last layer drawn as at initialisation
    nearest       the seen task's network with the fewest different bits
    ridge         ridge regression on the bits;  ridge-pairs: and on their pairwise products
    mlp           a multi-layer perceptron from bits to parameters

Letters: N seen tasks, S snapshots of each, C bits, P parameters.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from rpgcli import rng
from rpgcli.config import Config
from rpgcli.methods.resampling import Fresh, last_layer, no_layer, with_last_layer
from rpgcli.problem import Problem
from rpgcli.progress import OnStep, Step
from rpgcli.tasks import bits_tensor
from rpgcli.tokens import TokenStore

RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)


class Predict(Protocol):
    """What makes networks of tasks."""

    def __call__(self, tasks: Sequence[str], i: int = 0, /) -> Tensor:
        """Standardised parameters, (n, P), of network i of each of n tasks; most are the same for every i."""
        ...


Score = Callable[[Predict], float]
"""Mean accuracy on validation tasks and images."""


class MlpSetting(Config):
    """One setting tried for the MLP regression."""

    width: PositiveInt = 512
    """Units of its two hidden layers."""
    num_steps: PositiveInt = 1500
    """Optimizer steps of 64 tasks."""
    weight_decay: NonNegativeFloat = 1e-2
    """AdamW's."""


@dataclass(frozen=True)
class Known:
    """The seen checkpoints."""

    tasks: Sequence[str]
    parameters: Tensor  # (N, S, P) standardised
    fresh: Fresh = no_layer
    """The last layer as at initialisation."""

    @property
    def bits(self) -> Tensor:
        """-1 and +1, (N, C)."""
        return signs(self.tasks)

    @property
    def mean(self) -> Tensor:
        """Mean over snapshots, (N, P)."""
        return self.parameters.mean(1)


@dataclass(frozen=True)
class Fitted:
    """A trivial generator with the settings that did best on validation tasks."""

    name: str
    predict: Predict
    validation: float
    settings: dict[str, Any]
    seconds: float
    """Of fitting all settings that were tried."""


def signs(tasks: Sequence[str]) -> Tensor:
    """Bits as -1 and +1, (n, C)."""
    return bits_tensor(tasks).float() * 2 - 1


def known_of(store: TokenStore) -> Known:
    """The checkpoints of a token store, task by task."""
    rows: dict[str, list[Tensor]] = {}
    for i, checkpoint in enumerate(store.checkpoints):
        rows.setdefault(str(checkpoint["task_bits"]), []).append(store.vector(i))
    return Known(list(rows), torch.stack([torch.stack(row) for row in rows.values()]), last_layer(store))


def validation_score(problem: Problem, store: TokenStore, tasks: Sequence[str]) -> Score:
    """Mean accuracy on validation images of networks for the validation tasks `tasks`; 0 where there are none."""

    def score(predict: Predict) -> float:
        if not tasks:
            return 0.0
        states = [store.rebuilt(x) for x in predict(tasks)]
        return float(problem.accuracy(states, tasks, "validation").mean())

    return score


Candidates = Sequence[tuple[dict[str, Any], Callable[[], Predict]]]
"""Settings and how to fit with them."""


def best(name: str, candidates: Candidates, score: Score) -> Fitted:
    """Fit every candidate and keep the one with the highest validation score (the first among equals)."""
    begun, found = time.perf_counter(), None
    for settings, fit in candidates:
        predict = fit()
        value = score(predict)
        if found is None or value > found[0]:
            found = (value, predict, settings)
    assert found is not None, "a baseline has at least one setting"
    return Fitted(name, found[1], found[0], found[2], time.perf_counter() - begun)


def average(known: Known) -> Predict:
    """The mean of all checkpoints."""
    mean = known.mean.mean(0)
    return lambda tasks, i=0: mean.expand(len(tasks), -1)


def average_trunk(known: Known, seed: int) -> Predict:
    """The same with a new last layer for each network."""
    mean = known.mean.mean(0)

    def predict(tasks: Sequence[str], i: int = 0) -> Tensor:
        streams = [rng.stream(seed, "baseline", "average-trunk", task, i) for task in tasks]
        return torch.stack([with_last_layer(mean, known.fresh(stream)) for stream in streams])

    return predict


def nearest(known: Known, parameters: Tensor) -> Predict:
    """The network of the seen task with the fewest different bits; the first of several."""
    return lambda tasks, i=0: parameters[torch.cdist(signs(tasks), known.bits, p=1).argmin(1)]


def ridge(known: Known, penalty: float, *, pairs: bool) -> Predict:
    """Ridge regression on a constant, the bits, and their products if `pairs`; solved in float64."""
    i, j = torch.triu_indices(known.bits.shape[1], known.bits.shape[1], 1)

    def features(tasks: Sequence[str]) -> Tensor:
        x = signs(tasks).double()  # (n, C)
        products = [x[:, i] * x[:, j]] if pairs else []
        return torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x, *products], 1)

    x = features(known.tasks)
    weights = torch.linalg.solve(
        x.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.float64), x.T @ known.mean.double()
    )
    return lambda tasks, i=0: (features(tasks) @ weights).float()


def perceptron(known: Known, setting: MlpSetting, seed: int, on_step: OnStep) -> Predict:
    """A two-layer perceptron trained on all snapshots with AdamW and a one-cycle schedule."""
    num_tasks, num_snapshots, num_parameters = known.parameters.shape
    x = known.bits
    with rng.initialising(seed, "baseline", "mlp"):
        net = nn.Sequential(
            nn.Linear(x.shape[1], setting.width), nn.SiLU(),
            nn.Linear(setting.width, setting.width), nn.SiLU(),
            nn.Linear(setting.width, num_parameters),
        )  # fmt: skip
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=setting.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, setting.num_steps)
    generator = rng.stream(seed, "baseline", "mlp")
    phase = f"mlp, width {setting.width}, decay {setting.weight_decay:g}"
    for step in range(setting.num_steps):
        task = torch.randint(num_tasks, (64,), generator=generator)
        snapshot = torch.randint(num_snapshots, (64,), generator=generator)
        loss = (net(x[task]) - known.parameters[task, snapshot]).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        on_step(Step(step + 1, setting.num_steps, phase=phase))
    return torch.no_grad()(lambda tasks, i=0: net(signs(tasks)))


# --- the table --------------------------------------------------------------------------------------------------------

GENERATORS: Mapping[str, Callable[[Known, Sequence[MlpSetting], int, OnStep], Candidates]] = MappingProxyType({
    "average": lambda known, *_: [({}, partial(average, known))],
    "average-trunk": lambda known, _, seed, __: [({}, partial(average_trunk, known, seed))],
    "nearest": lambda known, *_: [
        ({"parameters": "last snapshot"}, partial(nearest, known, known.parameters[:, -1])),
        ({"parameters": "mean of snapshots"}, partial(nearest, known, known.mean)),
    ],
    "ridge": lambda known, *_: [({"penalty": p}, partial(ridge, known, p, pairs=False)) for p in RIDGES],
    "ridge-pairs": lambda known, *_: [({"penalty": p}, partial(ridge, known, p, pairs=True)) for p in RIDGES],
    "mlp": lambda known, mlp, seed, on_step: [
        (s.model_dump(), partial(perceptron, known, s, seed, on_step)) for s in mlp
    ],
})  # fmt: skip
"""What each tries; the settings of the MLP regression, a seed and `on_step` are given to all."""
