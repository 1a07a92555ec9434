"""RPG: recurrent diffusion for large-scale parameter generation (arXiv 2501.11587).

    e    = position + condition + state                 what is asked of each token, no parameters enter
    c    = core(e)                                      recurrent core: one prototype per token
    x_0  ~ diffusion(x_t, t | c)                        each token denoised by itself, given its prototype

The core runs once per network: its prototypes serve every diffusion step and every sample of the same request.

Letters: B networks, L tokens, D = token_dim, M = d_model, K = B * L tokens in one batch (or the subset drawn of them).
"""

from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import AfterValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn

from rpgcli import rng
from rpgcli.conditions import (
    Condition,
    ConditionKind,
    ConditionNet,
    Levels,
    StateKind,
    asked_of,
    check_levels,
    state_indices,
)
from rpgcli.config import Config
from rpgcli.cores import CoreConfig
from rpgcli.cores.mamba2 import Mamba2Config
from rpgcli.cores.none import NoCore
from rpgcli.denoisers import DenoiserConfig
from rpgcli.denoisers.mlp import MlpDenoiserConfig
from rpgcli.diffusion import Diffusion, DiffusionConfig
from rpgcli.positions import PositionKind, position_embedding
from rpgcli.ranks import ALONE, Ranks
from rpgcli.samplers import SelectionConfig
from rpgcli.tokens import TokenStore
from rpgcli.training import TrainingConfig, check_norm, loader, parts_of


class RpgConfig(Config):
    """The recurrent diffusion model and its training."""

    seed: int = 0
    """Of initialisation, batches and noise."""
    position: PositionKind = "2d"
    """Position embedding: tensor and token number (`2d`), running number, learned, or none."""
    condition: ConditionKind = "auto"
    """What enters every token; `auto`: the task bits where the zoo has them."""
    d_condition: PositiveInt | None = None
    """Hidden width of the condition's network; by default d_model. The release uses 1024 for tasks."""
    levels: Annotated[Levels, AfterValidator(check_levels)] = ()
    """Ranges of validation accuracy that `accuracy-level` tells apart: [[0.5, 0.7], [0.9, 1]]."""
    state: StateKind = "run"
    """Permutation state: one for each independent training, for each checkpoint (the paper's), or none."""
    core: CoreConfig = Field(default_factory=Mamba2Config, discriminator="kind")
    """The recurrent core."""
    denoiser: DenoiserConfig = Field(default_factory=MlpDenoiserConfig, discriminator="kind")
    """The network that denoises a token given its prototype."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Noise schedule and target."""
    training: TrainingConfig = TrainingConfig()
    """Steps, rates, average."""
    tokens_per_step: PositiveInt | None = None
    """Tokens denoised in a step, drawn from all of the batch; the core always sees whole networks. Default: all."""
    micro_batch: PositiveInt | None = None
    """Networks that pass at once; a step sums the gradients of as many as its batch needs. Default: all."""
    selection: SelectionConfig = SelectionConfig()
    """How sampler, steps and temperature are chosen, on validation tasks."""

    @model_validator(mode="after")
    def _parts_are_exact(self) -> Self:
        check_norm(self.micro_batch, self.denoiser)
        return self


class RPG(nn.Module):
    """Positions, condition, state, core, denoiser.

    Args:
        config: The parts.
        tensor_index: Tensor number of each token, (L,).
        token_index: Token number inside its tensor, (L,).
        token_dim: Slots D of a token.
        num_features: Of the condition, 0 for an unconditional model.
        num_states: Rows of the table of permutation states, 0 for none.
    """

    def __init__(
        self,
        config: RpgConfig,
        tensor_index: Tensor,
        token_index: Tensor,
        *,
        token_dim: int,
        num_features: int,
        num_states: int,
    ) -> None:
        super().__init__()
        d_model = config.core.d_model
        position = position_embedding(config.position, tensor_index, token_index, d_model)  # (L, M)
        self.position: Tensor
        if config.position == "learned":
            self.register_parameter("position", nn.Parameter(position))
        else:
            self.register_buffer("position", position)
        self.condition = ConditionNet(num_features, d_model, config.d_condition) if num_features else None
        self.state = nn.Embedding(num_states, d_model) if num_states > 1 else None
        self.core = config.core.build()
        self.denoiser = config.denoiser.build(token_dim, self.core.out_dim)
        self.diffusion = Diffusion(config.diffusion)

    def prototypes(self, features: Tensor | None, state: Tensor | None) -> Tensor:
        """Run the core.

        Args:
            features: Of the condition, (B, C); None for an unconditional model.
            state: Permutation states, (B,); negative or None adds none.

        Returns:
            One prototype per token, (B, L, core.out_dim).
        """
        num = next((len(x) for x in (features, state) if x is not None), 1)
        e = self.position.expand(num, -1, -1)  # (B, L, M)
        if self.condition is not None:
            assert features is not None, "a conditional model needs its features"
            e = e + self.condition(features)[:, None]
        if self.state is not None and state is not None:
            e = e + self.state(state.clamp(min=0))[:, None] * (state >= 0)[:, None, None]
        return self.core(e)  # type: ignore[no-any-return]

    def keep_denoiser(self) -> None:
        """Let go of the core and its memory, once all prototypes are known.

        What was read from a file is mapped in one piece, which stays as long as any of its tensors: those that are
        kept are copied.
        """
        self.core = NoCore(self.core.d_model)
        del self.position
        for kept in (*self.parameters(), *self.buffers()):
            kept.data = kept.data.clone()

    def loss(self, part: "Tokens") -> Tensor:
        """Diffusion loss of some tokens of B networks."""
        c = self.prototypes(part.features, part.state).flatten(0, 1)[part.token]  # (K, M)
        return self.diffusion.loss_at(self.denoiser, part.x_0, c, part.mask, part.t, part.eps, part.num_learned)


def build(config: RpgConfig, store: TokenStore, condition: Condition | None) -> RPG:
    """The model for a token store, initialised from its seed."""
    states = state_indices(store.checkpoints, config.state)
    tensor_index, token_index = store.layout.indices()
    with rng.initialising(config.seed, "rpg"):
        return RPG(
            config, tensor_index, token_index,
            token_dim=store.layout.token_dim, num_features=condition.num_features if condition else 0,
            num_states=int(states.max()) + 1,
        )  # fmt: skip


class Tokens(NamedTuple):
    """Some tokens of B networks, K of them, with their noise: a part of a batch."""

    x_0: Tensor  # (K, D) standardised
    mask: Tensor  # (K, D) learned slots
    features: Tensor | None  # (B, C) of the condition
    state: Tensor  # (B,) permutation states
    token: Tensor  # (K,) which of the B * L tokens these are
    t: Tensor  # (K,)
    eps: Tensor  # (K, D)
    num_learned: int  # Slots in the whole batch


def make_loss(
    model: RPG,
    config: RpgConfig,
    store: TokenStore,
    condition: Condition | None,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Callable[[int], Iterator[Tensor]]:
    """The loss of step s: a batch of checkpoints, some of their tokens, noise, all drawn from streams named by s.

    It comes in parts, of which this rank's are given; only their tokens are read.
    """
    num_tokens = store.layout.num_tokens
    batch_size = config.training.batch_size
    states = state_indices(store.checkpoints, config.state)
    features = condition.features([asked_of(c) for c in store.checkpoints]) if condition is not None else None

    varies = store.statistics.varies  # (L, D)
    num_varying = varies.sum(1)  # (L,)
    learned = num_varying.nonzero().flatten()  # Tokens of frozen tensors teach nothing.
    candidates = (torch.arange(batch_size)[:, None] * num_tokens + learned).flatten()
    parts = parts_of(batch_size, config.micro_batch, ranks)

    def draw(step: int) -> Iterator[Tokens]:
        batch = torch.randint(len(store), (batch_size,), generator=rng.stream(config.seed, "batch", step))  # (B,)
        token = candidates  # (K,)
        if config.tokens_per_step is not None and config.tokens_per_step < len(token):
            drawn = torch.randperm(len(token), generator=rng.stream(config.seed, "tokens", step))
            token = token[drawn[: config.tokens_per_step]]
        network, row = token // num_tokens, token % num_tokens
        stream = rng.stream(config.seed, "noise", step)
        t, eps = model.diffusion.draw((len(token), store.layout.token_dim), stream)  # (K,), (K, D)
        num_learned = int(num_varying[row].sum())
        for part in parts:
            inside = (network >= part.start) & (network < part.stop)  # (K,)
            here = slice(None) if inside.all() else inside.nonzero().flatten()
            yield Tokens(
                store.rows(batch[network[here]], row[here]), varies[row[here]],
                None if features is None else features[batch[part]], states[batch[part]],
                token[here] - part.start * num_tokens, t[here], eps[here], num_learned,
            )  # fmt: skip

    load = loader(draw, device, config.training.num_steps)
    return lambda step: map(model.loss, load(step))
