"""p-diff: the split, the losses, the conditions, and the checks that tell a working run from a lucky one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rpgcli import rng
from rpgcli.artifact import Draft
from rpgcli.autoencoder import Autoencoder, MlpAutoencoderConfig, NoisyAutoencoder, Pca, PcaConfig, VaeConfig
from rpgcli.conditions import Asked, Condition, asked_of, make_condition
from rpgcli.denoisers.mlp import MlpDenoiserConfig
from rpgcli.diffusion import DiffusionConfig, Target
from rpgcli.evaluation.reconstruction import judge_autoencoder, warn_of_poor
from rpgcli.generation import Generator, Sample, Sampling
from rpgcli.methods import pdiff
from rpgcli.methods.pdiff import (
    AutoencoderStageConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
    Vectors,
    autoencoder_loss,
    build_autoencoder,
    build_diffusion,
    compare_latents,
    diffusion_loss,
    encode,
    features_of,
    split_checkpoints,
    training_of,
    what_is_odd,
)
from rpgcli.models import assemble
from rpgcli.problem import Problem
from rpgcli.progress import silent
from rpgcli.samplers import sample
from rpgcli.targets import Mlp3Config
from rpgcli.tokens import TokenStore
from rpgcli.training import TrainingConfig, fit
from tests.helpers import State, draw, make, tiny_problem, token_store, total

CPU = torch.device("cpu")
SMALL = LatentDiffusionConfig(
    condition_dim=32,
    denoiser=MlpDenoiserConfig(width=64, depth=2),
    diffusion=DiffusionConfig(schedule="cosine", num_steps=200),
    training=TrainingConfig(num_steps=200, batch_size=96, learning_rate=3e-3, ema_decay=0.95),
)


def with_training(config: LatentDiffusionConfig, **training: Any) -> LatentDiffusionConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def train(
    folder: Path, config: LatentDiffusionConfig, latents: Tensor, condition: Condition | None, features: Tensor | None
) -> LatentDiffusion:
    kept: list[LatentDiffusion] = []

    def body(draft: Draft) -> Mapping[str, Any]:
        model = build_diffusion(config, latents, condition)
        loss = diffusion_loss(model, config, latents, features, CPU)
        kept.append(fit(model, loss, config.training, draft, dtype=torch.float32, on_step=silent))
        return {}

    make(folder, body, stage="train-diffusion")
    return kept[0]


def randomise(model: torch.nn.Module) -> None:
    """Random weights everywhere: a fresh denoiser outputs zeros."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng.stream(0, "weights", i)), alpha=0.2)


# --- has the diffusion learned? ---------------------------------------------------------------------------------------

NUM_LATENTS, LATENT_DIM, RANK = 200, 12, 2
ONE_RUN = [0] * NUM_LATENTS


@pytest.fixture(scope="module")
def mixture() -> Tensor:
    """Latents (200, 12) of four clusters in a plane, far from zero and on no common scale."""
    cluster = torch.arange(NUM_LATENTS) % 4
    plane = 3 * draw(4, RANK, seed=1)[cluster] + 0.8 * draw(NUM_LATENTS, RANK, seed=2)
    return plane @ draw(RANK, LATENT_DIM, seed=3) * torch.logspace(-2, 2, LATENT_DIM) + 5


def test_a_trained_diffusion_is_accepted(tmp_path, mixture):
    model = train(tmp_path / "diffusion", SMALL, mixture, None, None)
    found = compare_latents(model, mixture, None, ONE_RUN, seed=0)
    assert found["learned"], found
    assert found["num_samples"] == NUM_LATENTS
    assert compare_latents(model, mixture, None, ONE_RUN, seed=0) == found


@pytest.mark.parametrize(
    ("target", "ratio", "distance"),
    [("v", (0.8, 1.2), (2, 100)), ("x0", (0, 0.01), (0, torch.inf)), ("eps", (10, torch.inf), (100, torch.inf))],
    ids=["noise", "collapsed", "exploded"],
)
def test_an_untrained_diffusion_is_named(mixture, target: Target, ratio, distance):
    """A fresh denoiser answers zero.

    As v that keeps the starting noise, whose deviation is right and whose place is wrong; as x0 it is the mean latent;
    as eps it only rescales the noise, by 1 / sqrt(alpha_bar), which is 158 at the last step.
    """
    config = SMALL.model_copy(update={"diffusion": SMALL.diffusion.model_copy(update={"target": target})})
    found = compare_latents(build_diffusion(config, mixture, None), mixture, None, ONE_RUN, seed=0)
    assert not found["learned"]
    assert ratio[0] <= found["deviation_ratio"] <= ratio[1]
    assert distance[0] <= found["nearest_distance"] <= distance[1]


@dataclass
class Planted:
    """Answers with given standardised latents, whatever it is asked."""

    sampled: Tensor

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return self.sampled


def slow_figures(sampled: Tensor, x: Tensor, groups: Sequence[int]) -> tuple[float, float]:
    """The oracle of `compare_latents`: one pair of latents at a time, of different groups among training latents."""
    pairs = list(zip(x, groups))
    among = [min(float((a - b).norm()) for b, other in pairs if one != other) for a, one in pairs]
    nearest = [min(float((s - a).norm()) for a in x) for s in sampled]
    ratios = [float(s.std() / a.std()) for s, a in zip(sampled.T, x.T)]
    return lower_median(ratios), lower_median(nearest) / lower_median(among)


def lower_median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


@pytest.mark.parametrize("num_trainings", [1, 3])
def test_latents_are_compared_with_those_of_other_trainings(monkeypatch, num_trainings):
    """Snapshots of one training lie close together and must not make every sample seem far; one alone has no others."""
    trainings = [i % num_trainings for i in range(15)]
    latents = 4 * draw(num_trainings, 5, seed=1)[trainings] + 0.01 * draw(15, 5, seed=2)
    model = build_diffusion(SMALL, latents, None)
    sampled = 0.8 * draw(15, 5, seed=3)
    monkeypatch.setattr(pdiff, "sample", Planted(sampled))
    found = compare_latents(model, latents, None, trainings, seed=0)
    groups = trainings if num_trainings > 1 else list(range(15))
    ratio, distance = slow_figures(sampled, model.scale.standardise(latents), groups)
    assert found["deviation_ratio"] == pytest.approx(ratio, abs=1e-4)  # it is rounded to four digits
    assert found["nearest_distance"] == pytest.approx(distance, abs=1e-4, rel=1e-3)  # cdist of close float32 vectors


@pytest.mark.parametrize(("factor", "learned"), [(1.0, True), (0.75, True), (0.65, False), (1.15, False)])
def test_deviations_from_70_to_110_percent_count_as_learned(monkeypatch, factor, learned):
    """The training latents themselves, shrunk or stretched a little: all lie near enough."""
    latents = draw(NUM_LATENTS, LATENT_DIM)
    model = build_diffusion(SMALL, latents, None)
    monkeypatch.setattr(pdiff, "sample", Planted(factor * model.scale.standardise(latents)))
    found = compare_latents(model, latents, None, ONE_RUN, seed=0)
    assert found["deviation_ratio"] == pytest.approx(factor, abs=1e-4)  # it is rounded to four digits
    assert found["nearest_distance"] < 0.5
    assert found["learned"] == learned


def test_latents_are_compared_under_the_conditions_of_their_networks(monkeypatch, mixture):
    condition = Condition("task-bits", 3)
    features = draw(NUM_LATENTS, 3)
    model = build_diffusion(SMALL, mixture, condition)
    asked: list[Tensor] = []

    def spy(model: LatentDiffusion, c: Tensor, x_T: Tensor, mask: Tensor, **_: Any) -> Tensor:
        asked.append(c)
        return x_T

    monkeypatch.setattr(pdiff, "sample", spy)
    compare_latents(model, mixture, features, ONE_RUN, seed=0)
    assert torch.equal(asked[0], model.prototypes(features, None)[:, 0])


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_compared_with_latents_on_the_cpu(mixture: Tensor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_cpu, on_gpu = build_diffusion(SMALL, mixture, None), build_diffusion(SMALL, mixture, None).to("cuda")
    expected, found = (compare_latents(m, mixture, None, ONE_RUN, seed=0) for m in (on_cpu, on_gpu))
    assert found == pytest.approx(expected, rel=1e-2)  # float32 on two devices


# --- has the autoencoder learned? -------------------------------------------------------------------------------------


class Mean(Autoencoder):
    """Collapsed: whatever goes in, the mean of the known networks comes out."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.mean = mean

    def encode(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.mean.expand(len(z), -1)


class Memory(Autoencoder):
    """Memorising: the known network that is nearest comes out."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known

    def encode(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.known).argmin(1)[:, None].float()

    def decode(self, z: Tensor) -> Tensor:
        return self.known[z[:, 0].long()]


@dataclass(frozen=True)
class Judging:
    """A zoo, split, with what judges an autoencoder on it."""

    problem: Problem
    vectors: Vectors
    known: list[int]
    held: list[int]

    def fit(self, config: AutoencoderStageConfig, folder: Path) -> Autoencoder:
        model = build_autoencoder(config, self.vectors.num_parameters)
        if isinstance(model, Pca):
            model.fit(self.vectors.rows(self.known))
            return model
        assert isinstance(model, NoisyAutoencoder)
        loss = autoencoder_loss(model, config, self.vectors, self.known, CPU)
        kept: list[Autoencoder] = []

        def body(draft: Draft) -> Mapping[str, Any]:
            kept.append(fit(model, loss, config.training, draft, dtype=torch.float32, on_step=silent))
            return {}

        make(folder, body, stage="train-ae")
        return kept[0]

    def judge(self, model: Autoencoder) -> dict[str, Any]:
        return judge_autoencoder(self.problem, model, self.vectors, self.known, self.held)


NUM_NETWORKS, DIRECTIONS = 40, 3


def make_judging(folder: Path, network: Callable[[Problem, int], State]) -> Judging:
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    store = token_store(folder, [network(problem, i) for i in range(NUM_NETWORKS)], token_dim=32)
    return Judging(problem, Vectors(store), *split_checkpoints(store, AutoencoderStageConfig(holdout=0.25)))


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory) -> Judging:
    """Networks that differ from one base in three directions: what is learned of some holds for the others."""

    def network(problem: Problem, i: int) -> State:
        amounts = draw(DIRECTIONS, seed=i)
        return {
            name: value + (amounts @ draw(DIRECTIONS, value.numel(), seed=len(name))).reshape(value.shape)
            for name, value in problem.reference.items()
        }

    return make_judging(tmp_path_factory.mktemp("related") / "tokens", network)


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory: pytest.TempPathFactory) -> Judging:
    """Networks that start independently: knowing some says nothing of the others."""
    return make_judging(
        tmp_path_factory.mktemp("unrelated") / "tokens",
        lambda problem, i: dict(problem.build("network", i).state_dict()),
    )


MLP = AutoencoderStageConfig(
    network=MlpAutoencoderConfig(latent_dim=16, widths=(64,), latent_noise=0.01),
    training=TrainingConfig(num_steps=150, batch_size=30, learning_rate=5e-3, ema_decay=0.0),
)
PCA = AutoencoderStageConfig(network=PcaConfig(latent_dim=DIRECTIONS))
WHOLE_PCA = AutoencoderStageConfig(network=PcaConfig(latent_dim=29))
"""As many components as 30 known networks have."""


@pytest.mark.parametrize("config", [PCA, MLP], ids=["pca", "mlp"])
def test_an_autoencoder_that_does_well_on_new_networks_is_not_warned_of(caplog, tmp_path, related, config):
    judged = related.judge(related.fit(config, tmp_path / "autoencoder"))
    assert (judged["known"]["count"], judged["held_out"]["count"]) == (30, 10)
    warn_of_poor(judged)
    assert not caplog.records
    if config is PCA:  # three directions: three components are all there is
        assert judged["held_out"]["explained_variance"] == pytest.approx(1, abs=1e-4)
        assert judged["held_out"]["accuracy"] == pytest.approx(judged["held_out"]["original"])


@pytest.mark.parametrize("config", [WHOLE_PCA, MLP], ids=["pca", "mlp"])
def test_an_autoencoder_that_memorises_is_named(caplog, tmp_path, unrelated, config):
    judged = unrelated.judge(unrelated.fit(config, tmp_path / "autoencoder"))
    assert judged["known"]["explained_variance"] > 0.9
    assert judged["held_out"]["explained_variance"] < 0.3
    warn_of_poor(judged)
    assert "memorises" in caplog.text
    assert "autoencoder.network.latent_dim" in caplog.text


def test_a_planted_memory_is_named(caplog, unrelated):
    judged = unrelated.judge(Memory(unrelated.vectors.rows(unrelated.known)))
    assert judged["known"]["explained_variance"] == pytest.approx(1)
    assert judged["known"]["accuracy"] == judged["known"]["original"]
    warn_of_poor(judged)
    assert "memorises" in caplog.text


COLLAPSING = AutoencoderStageConfig(
    network=VaeConfig(latent_dim=16, kl_weight=10.0),
    training=TrainingConfig(num_steps=60, batch_size=30, learning_rate=5e-3, ema_decay=0.0),
)
"""The divergence outweighs the error: the latents end as noise."""


@pytest.mark.parametrize("zoo", ["related", "unrelated"])
@pytest.mark.parametrize("planted", [True, False], ids=["planted", "vae"])
def test_an_autoencoder_that_collapsed_is_named(caplog, request, tmp_path, zoo, planted):
    """The mean network explains nothing, of known networks and of new ones."""
    judging: Judging = request.getfixturevalue(zoo)
    mean = judging.vectors.rows(judging.known).mean(0)
    judged = judging.judge(Mean(mean) if planted else judging.fit(COLLAPSING, tmp_path / "autoencoder"))
    for group in ("known", "held_out"):
        assert judged[group]["explained_variance"] == pytest.approx(0, abs=1e-5 if planted else 0.1)
    warn_of_poor(judged)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "collapsed to the mean network" in caplog.text


def test_reconstructed_networks_that_lose_accuracy_are_named(caplog):
    figures = {"explained_variance": 0.9, "mean_squared_error": 0.1, "original": 0.9}
    warn_of_poor({"known": {**figures, "accuracy": 0.9}, "held_out": {**figures, "accuracy": 0.86}})
    assert not caplog.records
    warn_of_poor({"known": {**figures, "accuracy": 0.9}, "held_out": {**figures, "accuracy": 0.84}})
    assert "reach 0.840 where their originals have 0.900" in caplog.text


def test_nobody_knows_how_an_autoencoder_does_if_nothing_is_held_out(caplog, related):
    everything = Judging(related.problem, related.vectors, list(range(NUM_NETWORKS)), [])
    judged = everything.judge(Memory(related.vectors.rows(everything.known)))
    assert list(judged) == ["known"]
    warn_of_poor(judged)
    assert "no checkpoint was held out" in caplog.text


# --- a condition that decides the network -----------------------------------------------------------------------------

TASKS = [format(i, "04b") for i in range(16)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Six trainings of each of sixteen tasks; the bits decide the network up to a little noise."""

    def network(i: int) -> State:
        signs = torch.tensor([2.0 * int(bit) - 1 for bit in TASKS[i % 16]])
        return {
            "w": 3 + (signs @ draw(4, 15, seed=1)).reshape(3, 5) + 0.3 * draw(3, 5, seed=i),
            "b": signs @ draw(4, 7, seed=2) + 0.3 * draw(7, seed=i),
            "fixed": torch.tensor([1.0, 2.0]),
        }

    checkpoints = [{"task_bits": TASKS[i % 16], "run": i // 16, "step": 0} for i in range(96)]
    folder = tmp_path_factory.mktemp("tasks") / "tokens"
    return token_store(folder, [network(i) for i in range(96)], checkpoints, token_dim=8)


@dataclass(frozen=True)
class Latents:
    """The tasks' zoo through an autoencoder."""

    store: TokenStore
    autoencoder: Pca
    latents: Tensor

    def generator(self, model: LatentDiffusion, condition: Condition | None) -> Generator:
        store = self.store
        return Generator(
            assemble(model, self.autoencoder, condition, 1, store.layout, store.statistics, store.constants(0))
        )

    def agreement(self, model: LatentDiffusion, condition: Condition | None) -> float:
        """Fraction of generated networks, ten of each task, that are nearest to the mean network of their own."""
        vectors = Vectors(self.store)
        means = torch.stack([vectors.rows(range(i, 96, 16)).mean(0) for i in range(16)])  # (16, P)
        asked = [Asked("seen", bits) for bits in TASKS]
        generator = self.generator(model, condition)
        tokens = torch.cat([generator.batch(asked, Sampling(num_steps=20), seed=seed) for seed in range(10)])
        nearest = torch.cdist(self.store.layout.ungrid(tokens), means).argmin(1)
        return float((nearest == torch.arange(16).repeat(10)).double().mean())


@pytest.fixture(scope="module")
def encoded(tasks: TokenStore) -> Latents:
    autoencoder = Pca(Vectors(tasks).num_parameters, 6)
    autoencoder.fit(Vectors(tasks).rows(range(96)))
    return Latents(tasks, autoencoder, encode(autoencoder, Vectors(tasks), CPU))


def test_shuffled_conditions_are_worth_no_more_than_none(tmp_path, encoded):
    """By chance a network is nearest to its own task with probability 1/16: 30 or more of 160 then have 1e-7."""
    condition = make_condition("auto", (), encoded.store.checkpoints, section="diffusion")
    features = features_of(encoded.store, condition)
    assert features is not None
    order = torch.randperm(96, generator=rng.stream(0, "shuffle"))
    assert (features == features[order]).all(1).double().mean() < 0.1
    models = {
        "conditions": train(tmp_path / "conditions", SMALL, encoded.latents, condition, features),
        "shuffled": train(tmp_path / "shuffled", SMALL, encoded.latents, condition, features[order]),
        "none": train(tmp_path / "none", SMALL, encoded.latents, None, None),
    }
    found = {name: encoded.agreement(m, None if name == "none" else condition) for name, m in models.items()}
    assert found["conditions"] > 0.9, found
    assert found["shuffled"] < 30 / 160, found
    assert found["none"] < 30 / 160, found
    for name, model in models.items():  # all three have learned the distribution of the latents
        told = {"conditions": features, "shuffled": features[order], "none": None}[name]
        trainings = [training_of(checkpoint) for checkpoint in encoded.store.checkpoints]
        assert compare_latents(model, encoded.latents, told, trainings, seed=0)["learned"], name


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(encoded: Latents) -> Generator:
    condition = Condition("task-bits", 4)
    model = build_diffusion(SMALL, encoded.latents, condition)
    randomise(model)
    return encoded.generator(model, condition)


def test_samples_become_tokens_of_the_store_and_whole_networks(generator, tasks):
    layout, asked = tasks.layout, Asked("seen", "0110")
    tokens, state = generator.tokens(Sample(asked, 0), Sampling(num_steps=3), seed=0, state="random")
    assert tokens.shape == (layout.num_tokens, layout.token_dim)
    assert state == 0
    network = generator.network(tokens)
    assert {name: tuple(value.shape) for name, value in network.items()} == {"w": (3, 5), "b": (7,), "fixed": (2,)}
    assert network["fixed"].tolist() == [1, 2]
    others = [Asked("seen", "1001"), Asked("unseen")]
    for other in others:
        assert not torch.equal(
            generator.tokens(Sample(other, 0), Sampling(num_steps=3, temperature=0), seed=0, state="random")[0],
            generator.tokens(Sample(asked, 0), Sampling(num_steps=3, temperature=0), seed=0, state="random")[0],
        )


def test_many_at_once_are_each_alone_to_rounding(generator):
    asked = [Asked("seen", bits) for bits in TASKS[:4]]
    together = generator.batch(asked, Sampling(num_steps=3), seed=7)
    alone = [generator.tokens(Sample(one, 0), Sampling(num_steps=3), seed=7, state="random")[0] for one in asked]
    # other shapes of the same matrix products: float32 rounding, carried through three steps
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_a_latent_dimension_that_never_varies_is_generated_as_its_mean():
    latents = draw(20, 5)
    latents[:, 3] = 7.25
    model = build_diffusion(SMALL, latents, None)
    randomise(model)
    assert model.mask.tolist() == [[True, True, True, False, True]]
    noise = draw(50, 5, seed=1)
    c = model.prototypes(None, torch.zeros(50))[:, 0]
    x_0 = sample(
        model, c, noise, model.mask.expand(50, -1), sampler=Sampling().sampler, num_steps=5, noise=lambda: noise
    )  # fmt: skip
    sampled = model.scale.restore(x_0)
    assert sampled[:, 3].tolist() == [7.25] * 50
    assert (sampled.std(0) > 0).tolist() == model.mask[0].tolist()
    torch.testing.assert_close(model.scale.restore(model.scale.standardise(latents)), latents)


def test_the_loss_of_a_step_depends_on_its_number_alone(mixture):
    condition, features = Condition("task-bits", 3), draw(NUM_LATENTS, 3)
    config = SMALL.model_copy(update={"condition_dropout": 0.3})
    model = build_diffusion(config, mixture, condition)
    randomise(model)
    loss = diffusion_loss(model, config, mixture, features, CPU)
    before = torch.random.get_rng_state()
    first = [float(total(loss(step)).detach()) for step in (0, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [float(total(loss(step)).detach()) for step in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert len(set(first)) == 3
    other = diffusion_loss(model, config.model_copy(update={"seed": 1}), mixture, features, CPU)
    assert float(total(other(0)).detach()) != first[0]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_condition_dropout_leaves_out_the_condition_of_so_many_networks(mixture, share):
    features = draw(NUM_LATENTS, 3)
    config = with_training(SMALL, batch_size=4000).model_copy(update={"condition_dropout": share})
    model = build_diffusion(config, mixture, Condition("task-bits", 3))
    seen: list[Tensor] = []
    assert model.condition is not None
    model.condition.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    total(diffusion_loss(model, config, mixture, features, CPU)(0))
    total(diffusion_loss(model, config.model_copy(update={"condition_dropout": 0.0}), mixture, features, CPU)(0))
    dropped, whole = seen
    left_out = ~dropped.any(1)
    assert abs(float(left_out.double().mean()) - share) <= 5 * (share * (1 - share) / 4000) ** 0.5
    assert torch.equal(dropped[~left_out], whole[~left_out])  # the others keep theirs, whole


def test_a_latent_is_trained_with_the_condition_of_its_own_network(mixture):
    """Conditions that are the latents themselves: `c` then says which latent a noisy one was."""
    model = build_diffusion(SMALL, mixture, Condition("task-bits", LATENT_DIM))
    x = model.scale.standardise(mixture)
    pairs: list[tuple[Tensor, Tensor]] = []

    def loss_at(denoiser: object, x_0: Tensor, c: Tensor, *noise: object) -> Tensor:
        pairs.append((x_0, c))
        return c.sum()

    model.diffusion.loss_at = loss_at  # type: ignore[method-assign,assignment]
    total(diffusion_loss(model, SMALL, mixture, x, CPU)(0))
    x_0, c = pairs[0]
    torch.testing.assert_close(c, model.prototypes(x_0, None)[:, 0])


def facts(trainings: Sequence[tuple[str | None, int]]) -> list[dict[str, Any]]:
    return [{"task_bits": bits, "run": run, "step": step} for step, (bits, run) in enumerate(trainings)]


ONE = [(None, 0)] * 10
SNAPSHOTS = [(bits, run) for bits in ("01", "10", "11") for run in (0, 1) for _ in range(4)]
SEEDS = [(None, run) for run in range(10)]


@pytest.mark.parametrize(
    ("ratio", "distance", "learned", "words"),
    [(0.9, 0.9, True, ""), (0.6, 0.9, False, "has not learned"), (0.9, 12, False, "has not learned"),
     (0.9, 0.14, True, "repeats training latents")],
)  # fmt: skip
def test_a_diffusion_that_did_not_learn_or_only_copies_is_named(ratio, distance, learned, words):
    odd = what_is_odd({"deviation_ratio": ratio, "nearest_distance": distance, "learned": learned})
    assert words in odd and bool(words) == bool(odd)


@pytest.mark.parametrize(
    ("trainings", "holdout", "num_held"),
    [(ONE, 0.1, 1), (ONE, 0.0, 0), (ONE, 0.99, 9), (SEEDS, 0.3, 3), (SNAPSHOTS, 0.3, 8), (SNAPSHOTS, 0.99, 20)],
)
def test_checkpoints_are_held_out_by_whole_trainings(tmp_path, trainings, holdout, num_held):
    store = token_store(tmp_path / "tokens", [{"w": draw(3, seed=i)} for i in range(len(trainings))], facts(trainings))
    config = AutoencoderStageConfig(holdout=holdout)
    known, held = split_checkpoints(store, config)
    assert sorted([*known, *held]) == list(range(len(store)))
    assert len(held) == num_held
    assert known
    if len(set(trainings)) > 1:
        assert not {trainings[i] for i in known} & {trainings[i] for i in held}
    assert split_checkpoints(store, config) == (known, held)
    others = [split_checkpoints(store, config.model_copy(update={"seed": seed}))[1] for seed in range(1, 6)]
    assert (num_held in {0, len(store)}) or any(other != held for other in others)


def test_one_checkpoint_is_never_held_out(tmp_path):
    store = token_store(tmp_path / "tokens", [{"w": draw(3)}, {"w": draw(3, seed=1)}], facts([(None, 0)] * 2))
    store.checkpoints = store.checkpoints[:1]
    store.shards = [{"tokens": store.shards[0]["tokens"][:1]}]
    assert split_checkpoints(store, AutoencoderStageConfig(holdout=0.9)) == ([0], [])


@pytest.mark.parametrize("in_memory", [True, False])
def test_training_an_autoencoder_never_sees_what_is_held_out(monkeypatch, tasks, in_memory):
    vectors = Vectors(tasks)
    config = AutoencoderStageConfig(
        network=MlpAutoencoderConfig(latent_dim=4, widths=(8,), input_noise=0.0), micro_batch=7,
        training=TrainingConfig(batch_size=30, num_steps=1),
    )  # fmt: skip
    known, held = split_checkpoints(tasks, config)
    model = config.network.build(vectors.num_parameters)
    assert isinstance(model, NoisyAutoencoder)
    entered: list[Tensor] = []
    model.encoder.register_forward_hook(lambda _, args, out: entered.append(args[0]))
    monkeypatch.setattr(pdiff, "AT_ONCE", 2**25 if in_memory else 1)
    loss = autoencoder_loss(model, config, vectors, known, CPU)
    for step in range(20):
        assert len(list(loss(step))) == 5  # 7 + 7 + 7 + 7 + 2
    rows = {tuple(row.tolist()) for row in torch.cat(entered)}
    assert rows == {tuple(row.tolist()) for row in vectors.rows(known)}  # 600 draws of 86: all came, and no other
    assert held


def test_micro_batches_sum_to_the_loss_of_the_batch_wherever_vectors_come_from(monkeypatch, tasks):
    vectors = Vectors(tasks)
    config = AutoencoderStageConfig(network=MlpAutoencoderConfig(latent_dim=4, widths=(8,)))
    model = build_autoencoder(config, vectors.num_parameters)
    assert isinstance(model, NoisyAutoencoder)
    known = list(range(60))
    sums = []
    for micro_batch, at_once in ((None, 2**25), (7, 2**25), (7, 1)):
        monkeypatch.setattr(pdiff, "AT_ONCE", at_once)
        parts = config.model_copy(update={"micro_batch": micro_batch})
        loss = autoencoder_loss(model, parts, vectors, known, CPU)
        sums.append([float(sum(part.detach() for part in loss(step))) for step in range(3)])
    assert sums[1] == sums[2]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)  # float32 sums in another order
    assert len(set(sums[0])) == 3


def test_latents_keep_the_order_of_the_checkpoints(monkeypatch, tasks, encoded):
    vectors = Vectors(tasks)
    monkeypatch.setattr(pdiff, "AT_ONCE", 5 * vectors.num_parameters)
    latents = encode(encoded.autoencoder, vectors, CPU)
    assert latents.shape == (96, 6)
    for i in (0, 4, 5, 95):
        one = encoded.autoencoder.encode(tasks.layout.ungrid(tasks.network(i))[None])[0]
        torch.testing.assert_close(latents[i], one, rtol=1e-4, atol=1e-4)  # another shape of the same product
    torch.testing.assert_close(latents, encoded.latents, rtol=1e-4, atol=1e-4)


def test_what_a_condition_says_of_a_zoo_is_what_its_checkpoints_are(tasks):
    condition = Condition("task-bits", 4)
    features = features_of(tasks, condition)
    assert features is not None
    assert [asked_of(checkpoint).task_bits for checkpoint in tasks.checkpoints[:16]] == TASKS
    assert features[6].tolist() == [-1, 1, 1, -1]
    assert features_of(tasks, None) is None
