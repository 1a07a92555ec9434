"""RPG: it trains, and what it learns goes through condition, positions, core and state."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rpgcli.artifact import Draft, read_json
from rpgcli.collection import OptimiserConfig, SeedsConfig, TasksConfig, collect
from rpgcli.conditions import Asked, Condition, state_indices
from rpgcli.cores import CoreConfig
from rpgcli.cores.mamba2 import Mamba2Config
from rpgcli.denoisers import DenoiserConfig
from rpgcli.denoisers.conv import ConvDenoiserConfig
from rpgcli.denoisers.mlp import MlpDenoiserConfig
from rpgcli.generation import Generator, Sample, Sampling
from rpgcli.methods.rpg import RPG, RpgConfig, Tokens, build, make_loss
from rpgcli.models import assemble
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.progress import silent
from rpgcli.ranks import Ranks
from rpgcli.samplers import DdimConfig
from rpgcli.targets import Mlp3Config
from rpgcli.tasks import MultiClassConfig
from rpgcli.tokens import TokenStore
from rpgcli.training import METRICS, TrainingConfig, fit
from rpgcli.zoo import Zoo
from tests.helpers import draw, make, token_store, total

SMALL = RpgConfig(
    core=Mamba2Config(d_model=64, headdim=16, d_state=16),
    denoiser=MlpDenoiserConfig(width=128, depth=2),
    training=TrainingConfig(num_steps=200, batch_size=32, learning_rate=2e-3, ema_decay=0.98),
)
DIGITS_TASKS = Condition("task-bits", 10)
FOUR_BITS = Condition("task-bits", 4)


def train(folder: Path, config: RpgConfig, store: TokenStore, condition: Condition | None) -> RPG:
    kept: list[RPG] = []

    def body(draft: Draft) -> Mapping[str, Any]:
        model = build(config, store, condition)
        loss = make_loss(model, config, store, condition, torch.device("cpu"))
        kept.append(fit(model, loss, config.training, draft, dtype=torch.float32, on_step=silent))
        return {}

    make(folder, body, stage="train-rpg")
    return kept[0]


def sampled(model: RPG, condition: Condition | None, num_states: int, store: TokenStore) -> Generator:
    return Generator(assemble(model, None, condition, num_states, store.layout, store.statistics, store.constants(0)))


def collect_store(folder: Path, problem: Problem, config: Any) -> tuple[Zoo, TokenStore]:
    def body(draft: Draft) -> Mapping[str, Any]:
        networks = collect(problem, config, 0, draft, download=False, on_step=silent)
        return {"networks": [n.to_json() for n in networks]}

    zoo = Zoo(make(folder / "zoo", body))
    seen = zoo.select("seen")
    states = [{name: zoo.state(n)[name] for name in problem.reference} for n in seen]
    checkpoints = [{"task_bits": n.task_bits, "run": n.run, "step": n.step} for n in seen]
    return zoo, token_store(folder / "tokens", states, checkpoints, token_dim=64)


# --- a zoo of tasks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A model trained on real digits, with the tasks that it never saw."""

    model: RPG
    store: TokenStore
    problem: Problem
    unseen: list[str]
    trained_accuracy: float

    def accuracy(self, model: RPG) -> float:
        """Mean test accuracy of generated networks over the unseen tasks."""
        generator = sampled(model, DIGITS_TASKS, 1, self.store)
        sampling = Sampling(sampler=DdimConfig(), num_steps=5, temperature=0.5)
        asked = [Asked("unseen", bits) for bits in self.unseen]
        states = [generator.network(x) for x in generator.batch(asked, sampling, seed=0)]
        return float(self.problem.accuracy(states, self.unseen, "test").mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """256 seen and 64 unseen tasks on digits, 806 parameters each, 200 steps of training."""
    folder = tmp_path_factory.mktemp("tasks")
    problem = Problem(ProblemConfig(target=Mlp3Config(hidden=(12,))), None, False, torch.device("cpu"))
    config = TasksConfig(
        num_seen=256, num_validation=0, num_unseen=64, snapshots=1, block=512,
        training=OptimiserConfig(epochs=12, learning_rate=5e-3),
        pretrain=OptimiserConfig(epochs=20, learning_rate=5e-3),
    )  # fmt: skip
    zoo, store = collect_store(folder, problem, config)
    unseen = zoo.select("unseen")
    accuracy = sum((n.accuracy or {})["test"] for n in unseen) / len(unseen)
    model = train(folder / "rpg", SMALL, store, DIGITS_TASKS)
    return Trained(model, store, problem, [str(n.task_bits) for n in unseen], accuracy)


def ablate(model: RPG, change: Callable[[RPG], None]) -> RPG:
    model = copy.deepcopy(model)
    change(model)
    return model


class NoCondition(nn.Module):
    """Tells the model nothing of the task."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.zeros(len(features), 64)


def forget_condition(model: RPG) -> None:
    model.condition = NoCondition()  # type: ignore[assignment]


def shuffle_positions(model: RPG) -> None:
    order = torch.randperm(len(model.position), generator=torch.Generator().manual_seed(0))
    model.position.copy_(model.position[order])


def bypass_core(model: RPG) -> None:
    model.core = nn.Identity()  # type: ignore[assignment]


def test_networks_of_unseen_tasks_work(trained):
    """The prototype's ridge on the bits reaches 0.84 here, the networks trained for the tasks 0.89, guessing 0.62."""
    assert trained.trained_accuracy > 0.87
    assert trained.accuracy(trained.model) > 0.75


@pytest.mark.parametrize("part", [forget_condition, shuffle_positions, bypass_core])
def test_without_a_part_of_the_model_unseen_tasks_fail(trained, part):
    """A per-coordinate regression in disguise would not need positions or the core; a copy not the condition.

    Each ablation brings the accuracy (above 0.75) close to chance: 64 tasks of 360 images have a standard error of
    about a point, so 0.1 is ten of them.
    """
    assert trained.accuracy(ablate(trained.model, part)) < trained.accuracy(trained.model) - 0.1


# --- a zoo of seeds ---------------------------------------------------------------------------------------------------


def test_samples_of_a_state_lie_nearer_to_its_run_than_to_the_others(tmp_path):
    """Four independent trainings on digits, five snapshots each; 16 samples of each state.

    By chance a sample is nearest to its own run with probability 1/4; 32 or more of 64 then have probability 1e-5.
    """
    config = ProblemConfig(target=Mlp3Config(hidden=(12,)), task=MultiClassConfig())
    problem = Problem(config, None, False, torch.device("cpu"))
    seeds = SeedsConfig(num_networks=4, snapshots=5, training=OptimiserConfig(epochs=8, learning_rate=5e-3))
    _, store = collect_store(tmp_path, problem, seeds)
    training = SMALL.training.model_copy(update={"num_steps": 80, "batch_size": 16})
    model = train(tmp_path / "rpg", SMALL.model_copy(update={"training": training}), store, None)
    generator = sampled(model, None, 4, store)
    runs = state_indices(store.checkpoints, "run")
    centres = torch.stack(
        [torch.stack([store.network(i) for i in range(20) if runs[i] == r]).mean(0) for r in range(4)]
    )
    hits = 0
    for state in range(4):
        for index in range(16):
            x, _ = generator.tokens(Sample(Asked(), index), Sampling(num_steps=5), seed=0, state=str(state))
            hits += int((centres - x).square().sum((1, 2)).argmin() == state)
    assert sum(math.comb(64, k) * 0.25**k * 0.75 ** (64 - k) for k in range(32, 65)) < 2e-5
    assert hits >= 32


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    states = [{"w": draw(6, 4, seed=i), "b": draw(6, seed=i), "v": draw(3, 5, seed=i)} for i in range(6)]
    checkpoints = [{"task_bits": format(5 + i // 2, "04b"), "run": i % 2, "step": i} for i in range(6)]
    return token_store(tmp_path_factory.mktemp("small") / "tokens", states, checkpoints, token_dim=16)


SIZES: dict[str, dict[str, Any]] = {
    "mamba2": {"headdim": 8, "d_state": 8},
    "transformer": {"num_heads": 4, "feedforward_dim": 32},
    "mlp": {"width": 32, "depth": 1},
    "conv": {"channels": (1, 4, 8, 4, 1)},
}
"""Sizes that make a test quick; a new member of a union is tried with its own."""


def members(union: Any, **common: Any) -> list[Any]:
    kinds = get_args(get_args(union)[0])
    return [kind(**common, **SIZES.get(kind.model_fields["kind"].default, {})) for kind in kinds]


FEW_STEPS = TrainingConfig(num_steps=4, batch_size=4, log_every=2, schedule="constant", ema_decay=0.0)


@pytest.mark.parametrize("denoiser", members(DenoiserConfig), ids=lambda c: str(c.kind))
@pytest.mark.parametrize("core", members(CoreConfig, d_model=32), ids=lambda c: str(c.kind))
def test_every_core_with_every_denoiser_trains_and_samples(tmp_path, store, core, denoiser):
    config = RpgConfig(core=core, denoiser=denoiser, training=FEW_STEPS)
    model = train(tmp_path / "rpg", config, store, FOUR_BITS)
    lines = (tmp_path / "rpg" / METRICS).read_text().splitlines()
    assert len(lines) == 2
    assert read_json(tmp_path / "rpg" / "manifest.json")["stage"] == "train-rpg"
    generator = sampled(model, FOUR_BITS, 2, store)
    tokens, _ = generator.tokens(Sample(Asked("unseen", "0110"), 0), Sampling(num_steps=2), seed=0, state="random")
    state = generator.network(tokens)
    assert {n: tuple(v.shape) for n, v in state.items()} == {"w": (6, 4), "b": (6,), "v": (3, 5)}
    fresh = dict(build(config, store, FOUR_BITS).named_parameters())
    still = [n for n, p in model.named_parameters() if torch.equal(p, fresh[n])]
    assert not still  # layers that start at zero hold the others back for two steps, not for four


@pytest.mark.parametrize("position", ["2d", "1d", "learned", "none"])
def test_positions_are_learned_only_where_asked(store, position):
    config = RpgConfig(core=Mamba2Config(d_model=32, headdim=8, d_state=8), position=position)
    model = build(config, store, FOUR_BITS)
    names = dict(model.named_parameters())
    assert ("position" in names) == (position == "learned")
    assert ("position" in dict(model.named_buffers())) == (position != "learned")
    assert "position" in model.state_dict()
    if position == "learned":
        with torch.no_grad():
            model.denoiser.output.weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr,operator]
            model.denoiser.modulation.weight.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr,operator]
        total(make_loss(model, config, store, FOUR_BITS, torch.device("cpu"))(0)).backward()
        gradient = model.position.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_tokens_per_step_denoises_a_subset_and_the_core_sees_whole_networks(store, monkeypatch):
    config = RpgConfig(core=Mamba2Config(d_model=32, headdim=8, d_state=8), training=FEW_STEPS)
    num_tokens = store.layout.num_tokens
    seen: list[tuple[int, ...]] = []
    for given, expected in [(None, 4 * num_tokens), (3, 3), (10_000, 4 * num_tokens)]:
        some = config.model_copy(update={"tokens_per_step": given})
        model = build(some, store, FOUR_BITS)
        model.core.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
        model.denoiser.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
        total(make_loss(model, some, store, FOUR_BITS, torch.device("cpu"))(0))
        assert seen[-2:] == [(4, num_tokens, 32), (expected, 16)]


def test_tokens_that_never_vary_are_not_trained_on(tmp_path):
    """Most of a network may be frozen: a few tokens drawn from all would often hold nothing to learn, and 0 / 0."""
    states = [{"frozen": torch.ones(100), "w": draw(20, seed=i), "still": torch.ones(9)} for i in range(3)]
    store = token_store(tmp_path / "tokens", states, token_dim=8)
    config = RpgConfig(core=Mamba2Config(d_model=32, headdim=8, d_state=8), training=FEW_STEPS)
    whole = make_loss(build(config, store, None), config, store, None, torch.device("cpu"))
    few = config.model_copy(update={"tokens_per_step": 1})
    model = build(few, store, None)
    seen: list[int] = []
    model.denoiser.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    some = make_loss(model, few, store, None, torch.device("cpu"))
    assert all(bool(total(loss(step)).isfinite()) for loss in (whole, some) for step in range(10))
    assert seen == [1] * 10


@pytest.mark.parametrize("tokens_per_step", [None, 7, 1])
@pytest.mark.parametrize(("micro_batch", "size"), [(1, 1), (2, 1), (None, 2), (2, 3)])
def test_the_parts_of_a_batch_give_its_loss_and_gradients(store, tokens_per_step, micro_batch, size):
    """Whatever falls into a part: tokens are drawn from the whole batch, padding differs from token to token."""
    config = RpgConfig(
        core=Mamba2Config(d_model=32, headdim=8, d_state=8), tokens_per_step=tokens_per_step,
        training=FEW_STEPS.model_copy(update={"batch_size": 5}),
    )  # fmt: skip
    model = build(config, store, FOUR_BITS)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(draw(*parameter.shape, seed=i), alpha=0.1)
    passed: list[int] = []
    model.core.register_forward_hook(lambda _, args, out: passed.append(len(args[0])))

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(model.parameters()))
        return dict(zip(dict(model.named_parameters()), found))

    cut = config.model_copy(update={"micro_batch": micro_batch})
    for step in range(3):
        (whole,) = make_loss(model, config, store, FOUR_BITS, torch.device("cpu"))(step)
        passed.clear()
        parts = [
            part
            for rank in range(size)
            for part in make_loss(model, cut, store, FOUR_BITS, torch.device("cpu"), Ranks(rank, size))(step)
        ]
        assert sum(passed) == 5
        assert max(passed) <= (micro_batch or 3)
        torch.testing.assert_close(total(parts), whole, rtol=1e-6, atol=0)  # the order of float32 sums
        ours, theirs = gradients(total(parts)), gradients(whole)
        for name, value in ours.items():
            scale = float(theirs[name].abs().max())
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4 * scale)  # sums that cancel


def test_micro_batches_and_batch_norm_are_refused():
    with pytest.raises(ValidationError, match="micro_batch and norm: batch do not go together"):
        RpgConfig(micro_batch=2, denoiser=ConvDenoiserConfig(norm="batch"))


class Spied:
    """A shard that notes how many rows are read of it."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.read = tokens, 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Tensor:
        found = self.tokens[index]
        self.read += found.numel() // self.tokens.shape[-1]
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokens, name)


@pytest.mark.parametrize(("tokens_per_step", "size"), [(None, 1), (7, 1), (None, 2), (7, 2)])
def test_only_the_tokens_of_the_parts_are_read(store, monkeypatch, tokens_per_step, size):
    config = RpgConfig(
        core=Mamba2Config(d_model=32, headdim=8, d_state=8), tokens_per_step=tokens_per_step, training=FEW_STEPS
    )
    shard = Spied(store.shards[0]["tokens"])
    monkeypatch.setattr(store, "shards", [{"tokens": shard}])
    model = build(config, store, FOUR_BITS)
    entered: list[int] = []
    model.denoiser.register_forward_hook(lambda _, args, out: entered.append(len(args[0])))
    for rank in range(size):
        total(make_loss(model, config, store, FOUR_BITS, torch.device("cpu"), Ranks(rank, size))(0))
    assert len(entered) == size
    assert shard.read == sum(entered) == (tokens_per_step or 4 * store.layout.num_tokens)


def test_the_loss_of_a_subset_pairs_each_token_with_its_own_prototype(store):
    """The oracle: whole networks through `loss`, one row at a time, with the same noise."""
    config = RpgConfig(core=Mamba2Config(d_model=32, headdim=8, d_state=8))
    model = build(config, store, FOUR_BITS)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(draw(*parameter.shape, seed=i), alpha=0.1)
    features = FOUR_BITS.features([Asked(task_bits="0110"), Asked(task_bits="1001")])
    state = torch.tensor([1, 0])
    num_tokens = store.layout.num_tokens
    token = torch.tensor([num_tokens + 1, 0, 2 * num_tokens - 1])
    x_0 = store.rows(torch.tensor([3, 2, 3]), token % num_tokens)
    mask = store.statistics.varies[token % num_tokens]
    t, eps = model.diffusion.draw((3, 16), torch.Generator().manual_seed(0))
    found = model.loss(Tokens(x_0, mask, features, state, token, t, eps, int(mask.sum())))
    c = model.prototypes(features, state)
    own = torch.stack([c[t // num_tokens, t % num_tokens] for t in token.tolist()])
    expected = model.diffusion.loss(model.denoiser, x_0, own, mask, torch.Generator().manual_seed(0))
    assert torch.equal(found, expected)


def test_prototypes_add_condition_and_state_to_every_position(store):
    model = build(RpgConfig(core=Mamba2Config(d_model=32, headdim=8, d_state=8)), store, FOUR_BITS)
    entered: list[Tensor] = []
    model.core.register_forward_hook(lambda _, args, out: entered.append(args[0]))
    features = FOUR_BITS.features([Asked(task_bits="0110"), Asked(task_bits="1001")])
    model.prototypes(features, torch.tensor([1, -1]))
    assert model.condition is not None
    assert model.state is not None
    condition = model.condition(features)
    torch.testing.assert_close(entered[0][0], model.position + condition[0] + model.state.weight[1])
    torch.testing.assert_close(entered[0][1], model.position + condition[1])


def test_states_follow_the_runs_or_the_checkpoints(store):
    checkpoints = [{"run": r} for r in (7, 3, 7, 9)]
    assert state_indices(checkpoints, "run").tolist() == [1, 0, 1, 2]
    assert state_indices(checkpoints, "checkpoint").tolist() == [0, 1, 2, 3]
    assert state_indices(checkpoints, "none").tolist() == [0, 0, 0, 0]
    sizes = {}
    for kind in ("run", "checkpoint", "none"):
        model = build(RpgConfig(core=Mamba2Config(d_model=32, headdim=8, d_state=8), state=kind), store, None)
        sizes[kind] = model.state.num_embeddings if model.state is not None else None
        assert model.condition is None
    assert sizes == {"run": 2, "checkpoint": 6, "none": None}


def test_the_loss_of_a_step_depends_on_its_number_alone(store):
    config = RpgConfig(core=Mamba2Config(d_model=32, headdim=8, d_state=8), tokens_per_step=5)
    model = build(config, store, FOUR_BITS)
    loss = make_loss(model, config, store, FOUR_BITS, torch.device("cpu"))
    first = [float(total(loss(s)).detach()) for s in (0, 1, 2)]
    assert [float(total(loss(s)).detach()) for s in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert len(set(first)) == 3
    other = make_loss(model, config.model_copy(update={"seed": 1}), store, FOUR_BITS, torch.device("cpu"))
    assert float(total(other(0)).detach()) != first[0]
