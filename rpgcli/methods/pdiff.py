"""p-diff: neural network diffusion (arXiv 2402.13144), and with a condition Cond P-Diff (arXiv 2408.01415).

    mu   = encode(x)                        the parameters of a network as one short latent
    x_0  = (mu - mean) / deviation          per dimension: diffusion starts from unit noise
    x_0  ~ diffusion(x_t, t | c)            the diffusion of RPG, with one token: the latent; c is the condition's
    x    = decode(x_0 * deviation + mean)   a whole network

First the autoencoder is trained (`rpg train-ae`), then, on its latents, the diffusion (`rpg train-diffusion`). A good
autoencoder hides a diffusion that never learned: `compare_latents` looks at the samples themselves.

Letters: B networks, K checkpoints, P parameters, Z = latent_dim, C features, M = condition_dim.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

import torch
from pydantic import AfterValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn

from rpgcli import rng
from rpgcli.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    ConvAutoencoderConfig,
    LatentScale,
    NoisyAutoencoder,
    noise,
)
from rpgcli.conditions import Condition, ConditionKind, ConditionNet, Levels, asked_of, check_levels
from rpgcli.config import Config
from rpgcli.denoisers import DenoiserConfig
from rpgcli.denoisers.mlp import MlpDenoiserConfig
from rpgcli.diffusion import Diffusion, DiffusionConfig
from rpgcli.errors import ArtifactError, RpgError
from rpgcli.ranks import ALONE, Ranks
from rpgcli.samplers import DdimConfig, SelectionConfig, sample
from rpgcli.tokens import TokenStore
from rpgcli.training import TrainingConfig, check_norm, loader, parts_of

AT_ONCE = 2**25
"""Parameters that are encoded together."""
CHECK_STEPS = 50
"""DDIM steps with which a trained diffusion is looked at."""
RATIOS = (0.7, 1.1)
"""Between these the deviation of sampled latents over that of training latents lies where the diffusion has learned."""
FARTHEST = 2.0
"""Sampled latents lie at most so many times as far from the nearest training latent as those lie from each other."""
NEAREST = 0.5
"""Where they lie less, they repeat training latents."""


class AutoencoderStageConfig(Config):
    """The parameter autoencoder and its training."""

    seed: int = 0
    """Of initialisation, batches and noise."""
    network: AutoencoderConfig = Field(default_factory=ConvAutoencoderConfig, discriminator="kind")
    """Its kind and shape."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Fraction of the trainings (of the checkpoints, where that is less than one training) that it never sees and is
    judged on."""
    micro_batch: PositiveInt | None = None
    """Networks that pass at once; a step sums the gradients of as many as its batch needs. Default: all."""
    training: TrainingConfig = TrainingConfig(num_steps=250, batch_size=50, learning_rate=1e-2, ema_decay=0.95)
    """Steps, rates, average."""

    @model_validator(mode="after")
    def _parts_are_exact(self) -> Self:
        check_norm(self.micro_batch, self.network)
        return self


class LatentDiffusionConfig(Config):
    """The diffusion on latents and its training."""

    seed: int = 0
    """Of initialisation, batches and noise."""
    condition: ConditionKind = "auto"
    """What the diffusion is told of a network; `auto`: the task bits where the zoo has them."""
    levels: Annotated[Levels, AfterValidator(check_levels)] = ()
    """Ranges of validation accuracy that `accuracy-level` tells apart: [[0.5, 0.7], [0.9, 1]]."""
    condition_dim: PositiveInt = 64
    """Width M of the embedded condition."""
    condition_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of training networks whose condition is left out, so that one can be sampled without."""
    denoiser: DenoiserConfig = Field(default=MlpDenoiserConfig(width=128, depth=3), discriminator="kind")
    """The network that denoises a latent."""
    diffusion: DiffusionConfig = DiffusionConfig(schedule="cosine")
    """Noise schedule and target."""
    micro_batch: PositiveInt | None = None
    """Networks that pass at once; a step sums the gradients of as many as its batch needs. Default: all."""
    training: TrainingConfig = TrainingConfig(num_steps=2000, batch_size=64, learning_rate=2e-3, ema_decay=0.995)
    """Steps, rates, average."""
    selection: SelectionConfig = SelectionConfig()
    """How sampler, steps and temperature are chosen on validation tasks, where the condition is the task."""

    @model_validator(mode="after")
    def _parts_are_exact(self) -> Self:
        check_norm(self.micro_batch, self.denoiser)
        return self


# --- the autoencoder --------------------------------------------------------------------------------------------------


class Vectors:
    """The standardised parameters of all seen checkpoints as vectors, read from the token store."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store
        self.num_parameters = store.layout.num_parameters

    def __len__(self) -> int:
        return len(self.store)

    def rows(self, index: Sequence[int]) -> Tensor:
        """(len(index), P)."""
        return torch.stack([self.store.vector(i) for i in index])

    def blocks(self, index: Sequence[int]) -> Iterator[Tensor]:
        """`rows(index)`, some at a time."""
        size = max(1, AT_ONCE // self.num_parameters)
        return (self.rows(index[i : i + size]) for i in range(0, len(index), size))


def training_of(checkpoint: dict[str, Any]) -> Hashable:
    """Which training a checkpoint is a snapshot of."""
    return checkpoint.get("task_bits"), checkpoint.get("label"), checkpoint["run"]


def split_checkpoints(store: TokenStore, config: AutoencoderStageConfig) -> tuple[list[int], list[int]]:
    """Checkpoints to train on and checkpoints held out, drawn by whole trainings where there are enough of them."""

    def num_held(num: int) -> int:
        return min(round(config.holdout * num), num - 1)

    groups: list[Hashable] = [training_of(checkpoint) for checkpoint in store.checkpoints]
    if num_held(len(set(groups))) == 0:
        groups = list(range(len(store)))
    names = list(dict.fromkeys(groups))
    order = torch.randperm(len(names), generator=rng.stream(config.seed, "holdout")).tolist()
    held = {names[i] for i in order[: num_held(len(names))]}
    return [i for i, g in enumerate(groups) if g not in held], [i for i, g in enumerate(groups) if g in held]


def build_autoencoder(config: AutoencoderStageConfig, num_parameters: int) -> Autoencoder:
    """The autoencoder, initialised from its seed."""
    with rng.initialising(config.seed, "autoencoder"):
        return config.network.build(num_parameters)


class Vector(NamedTuple):
    """b networks with their noise: a part of a batch."""

    x: Tensor  # (b, P)
    eps_x: Tensor  # (b, P)
    eps_z: Tensor  # (b, Z)
    share: float  # of the batch


def autoencoder_loss(
    model: NoisyAutoencoder,
    config: AutoencoderStageConfig,
    vectors: Vectors,
    known: Sequence[int],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Callable[[int], Iterator[Tensor]]:
    """The loss of step s in this rank's parts: checkpoints and noise are drawn from streams named by s."""
    size = min(config.training.batch_size, len(known))
    held = torch.tensor(known)
    matrix = (
        vectors.rows(known) if len(known) * vectors.num_parameters <= AT_ONCE else None
    )  # Small zoos stay in memory.
    parts = parts_of(size, config.micro_batch, ranks)

    def draw(step: int) -> Iterator[Vector]:
        batch = torch.randperm(len(known), generator=rng.stream(config.seed, "batch", step))[:size]  # (B,)
        generator = rng.stream(config.seed, "noise", step)
        for _ in range(parts[0].start):  # The ranks before this one draw theirs; vector by vector takes no memory.
            noise(torch.empty(1, vectors.num_parameters), model.latent_dim, generator)
        for part in parts:
            chosen = batch[part]
            x = matrix[chosen] if matrix is not None else vectors.rows(held[chosen].tolist())  # (b, P)
            yield Vector(x, *noise(x, model.latent_dim, generator), share=len(chosen) / size)

    load = loader(draw, device, config.training.num_steps)
    return lambda step: (model.loss_at(part.x, part.eps_x, part.eps_z) * part.share for part in load(step))


@torch.no_grad()
def encode(model: Autoencoder, vectors: Vectors, device: torch.device) -> Tensor:
    """Latents of all checkpoints, (K, Z) on the CPU."""
    model.eval()
    return torch.cat([model.encode(x.to(device)).float().cpu() for x in vectors.blocks(range(len(vectors)))])


# --- the diffusion ----------------------------------------------------------------------------------------------------


class LatentDiffusion(nn.Module):
    """Condition and denoiser on latents of unit deviation.

    Args:
        config: The parts.
        latent_dim: Z.
        num_features: Of the condition, 0 for an unconditional model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: LatentDiffusionConfig, *, latent_dim: int, num_features: int) -> None:
        super().__init__()
        self.condition = ConditionNet(num_features, config.condition_dim) if num_features else None
        self.denoiser = config.denoiser.build(latent_dim, config.condition_dim)
        self.diffusion = Diffusion(config.diffusion)
        self.condition_dim = config.condition_dim
        self.register_buffer("mean", torch.zeros(latent_dim))
        self.register_buffer("std", torch.ones(latent_dim))

    @property
    def scale(self) -> LatentScale:
        """What latents are standardised by."""
        return LatentScale(self.mean, self.std)

    @property
    def mask(self) -> Tensor:
        """Dimensions that vary, (1, Z)."""
        return (self.std > 0)[None]

    def prototypes(self, features: Tensor | None, state: Tensor | None) -> Tensor:
        """The embedded condition, (B, C) to (B, 1, M): a latent is a single token. States have no meaning here."""
        num = next((len(x) for x in (features, state) if x is not None), 1)
        if self.condition is None:
            return torch.zeros(num, 1, self.condition_dim, device=self.std.device)
        assert features is not None, "a conditional model needs its features"
        return self.condition(features)[:, None]  # type: ignore[no-any-return]


def build_diffusion(config: LatentDiffusionConfig, latents: Tensor, condition: Condition | None) -> LatentDiffusion:
    """The diffusion for latents (K, Z), initialised from its seed."""
    with rng.initialising(config.seed, "pdiff"):
        num_features = condition.num_features if condition is not None else 0
        model = LatentDiffusion(config, latent_dim=latents.shape[1], num_features=num_features)
    scale = LatentScale.of(latents)
    if not bool((scale.std > 0).any()):
        raise ArtifactError(
            "the autoencoder gives every network the same latent: there is nothing to learn.",
            "Train it longer (autoencoder.training.num_steps), or lower its noise.",
        )
    model.mean.copy_(scale.mean)
    model.std.copy_(scale.std)
    return model


def features_of(store: TokenStore, condition: Condition | None) -> Tensor | None:
    """What the condition says of each checkpoint, (K, C)."""
    return condition.features([asked_of(c) for c in store.checkpoints]) if condition is not None else None


class Latents(NamedTuple):
    """b latents with their noise: a part of a batch."""

    row: Tensor  # (b,) which of the K latents
    features: Tensor | None  # (b, C) of the condition
    t: Tensor  # (b,)
    eps: Tensor  # (b, Z)


def diffusion_loss(
    model: LatentDiffusion,
    config: LatentDiffusionConfig,
    latents: Tensor,
    features: Tensor | None,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Callable[[int], Iterator[Tensor]]:
    """The loss of step s in this rank's parts: latents and noise are drawn from streams named by s."""
    x = model.scale.standardise(latents.to(device))  # (K, Z)
    mask, batch_size = model.mask, config.training.batch_size
    num_learned = batch_size * int(mask.sum())
    parts = parts_of(batch_size, config.micro_batch, ranks)

    def draw(step: int) -> Iterator[Latents]:
        stream = rng.stream(config.seed, "batch", step)
        batch = torch.randint(len(x), (batch_size,), generator=stream)  # (B,)
        f = None
        if features is not None:
            kept = torch.rand(batch_size, 1, generator=stream) >= config.condition_dropout
            f = features[batch] * kept  # (B, C)
        t, eps = model.diffusion.draw((batch_size, x.shape[1]), rng.stream(config.seed, "noise", step))
        for part in parts:
            yield Latents(batch[part], None if f is None else f[part], t[part], eps[part])

    def loss(part: Latents) -> Tensor:
        c = model.prototypes(part.features, part.row)[:, 0]  # (b, M)
        x_0, own = x[part.row], mask.expand(len(part.row), -1)  # (b, Z)
        return model.diffusion.loss_at(model.denoiser, x_0, c, own, part.t, part.eps, num_learned)

    load = loader(draw, device, config.training.num_steps)
    return lambda step: map(loss, load(step))


# --- has it learned? --------------------------------------------------------------------------------------------------


def what_is_odd(latents: Mapping[str, Any]) -> str:
    """What `compare_latents` found to be wrong, as a sentence; empty where nothing is."""
    ratio, distance = latents["deviation_ratio"], latents["nearest_distance"]
    if not latents["learned"]:
        return (
            f"the diffusion has not learned: its samples deviate {ratio:.2f} times as much as training latents "
            f"(expected {RATIOS[0]} to {RATIOS[1]}) and lie {distance:.2f} times as far from them as those lie apart "
            f"(at most {FARTHEST:g})."
        )
    if distance < NEAREST:
        return (
            f"the diffusion repeats training latents: its samples lie {distance:.2f} times as far from them as those "
            f"lie apart (less than {NEAREST:g}). Train it shorter, or on more networks."
        )
    return ""


def compare_latents(
    model: LatentDiffusion, latents: Tensor, features: Tensor | None, trainings: Sequence[Hashable], seed: int
) -> dict[str, Any]:
    """Sample as many latents as there are, at temperature 1 and under their conditions, and compare.

    Returns:
        `deviation_ratio`: of sampled over training latents, median over dimensions; `nearest_distance`: from a sampled
        latent to the nearest training latent, median, in units of `training_distance`: the same of training latents
        among those of other trainings (of all others, where there is only one); `learned`: whether both are as they
        should be.
    """
    x = model.scale.standardise(latents.to(model.std.device)).cpu()  # (K, Z)
    num_latents, _ = x.shape
    generator = rng.stream(seed, "compare latents")

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator).to(model.std.device)

    device = model.std.device
    with torch.no_grad():
        c = model.prototypes(None if features is None else features.to(device), torch.zeros(num_latents))[:, 0]
    mask = model.mask.expand(num_latents, -1)
    steps = min(CHECK_STEPS, model.diffusion.num_steps)
    sampled = sample(model, c, noise(), mask, sampler=DdimConfig(), num_steps=steps, noise=noise).cpu()  # (K, Z)
    if not bool(sampled.isfinite().all()):
        raise RpgError("the diffusion samples NaN or infinity.", "Train it longer, or lower its learning rate.")
    live = model.mask[0].cpu()
    ratio = float((sampled.std(0) / x.std(0))[live].median())
    names = list(dict.fromkeys(trainings))
    group = torch.tensor([names.index(t) for t in trainings]) if len(names) > 1 else torch.arange(num_latents)
    among = torch.cdist(x, x).masked_fill(group[:, None] == group[None], torch.inf).amin(1).median()
    nearest = torch.cdist(sampled, x).amin(1).median()
    distance = float(nearest / among)
    learned = RATIOS[0] <= ratio <= RATIOS[1] and distance <= FARTHEST
    return {
        "deviation_ratio": round(ratio, 4), "nearest_distance": round(distance, 4),
        "training_distance": round(float(among), 6), "num_samples": num_latents, "learned": learned,
    }  # fmt: skip
