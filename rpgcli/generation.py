"""Generate: from a request to whole networks on disk.

Sample i of seed S for a task draws from the stream named (S, task, i) and is computed by itself, so it does not depend
on how many others are asked for, nor on their order.

Letters: L tokens, D = token_dim, M = width of a prototype.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from rpgcli import rng
from rpgcli.conditions import parse_state
from rpgcli.config import Config
from rpgcli.errors import RpgError
from rpgcli.layout import Layout
from rpgcli.methods.rpg import RPG
from rpgcli.samplers import DdimConfig, SamplerConfig
from rpgcli.tasks import bits_tensor
from rpgcli.tokens import Statistics, detokenize

UNCONDITIONAL_COUNT = 20
"""Networks of a model without tasks, if nobody says how many: one would say nothing of its distribution."""
KEPT_PROTOTYPES = 16
"""Conditions whose prototypes are kept: a request draws its states in any order."""


class GenerateConfig(Config):
    """How networks are sampled; what is left out was chosen on validation tasks when the model was trained."""

    seed: int = 0
    """Names the noise of every sample."""
    count: PositiveInt | None = None
    """Networks for each task; left out: 1, and 20 of a model that knows no tasks."""
    sampler: SamplerConfig | None = Field(None, discriminator="kind")
    """ddim, ddpm, or dpm-solver++."""
    num_steps: PositiveInt | None = None
    """Denoising steps."""
    temperature: NonNegativeFloat | None = None
    """Scale of the starting noise; 0 starts at the centre."""
    state: str = "random"
    """Permutation state: `random`, `none`, or a number."""
    num_seen: PositiveInt = 102
    """Seen tasks among the networks generated when no task is asked for."""

    def num_networks(self, *, conditional: bool) -> int:
        """Networks for each task, resolved."""
        return self.count or (1 if conditional else UNCONDITIONAL_COUNT)


class Sampling(Config):
    """A sampler with its settings, resolved."""

    sampler: SamplerConfig = Field(default_factory=DdimConfig, discriminator="kind")
    """How x_0 is reached."""
    num_steps: PositiveInt = 20
    """Denoising steps."""
    temperature: NonNegativeFloat = 1.0
    """Scale of the starting noise."""


@dataclass(frozen=True)
class Sample:
    """One network that is asked for."""

    split: str
    task_bits: str | None
    index: int
    """Number i among the networks of its task."""


class Generator:
    """A trained RPG with what turns its tokens into networks.

    Args:
        model: On its device, in evaluation mode.
        layout: Of the tokens.
        statistics: Of the tokens.
        constants: Tensors that are not generated.
        num_states: Permutation states to choose from.
    """

    def __init__(
        self, model: RPG, layout: Layout, statistics: Statistics, constants: Mapping[str, Tensor], num_states: int
    ) -> None:
        self.model, self.layout, self.statistics, self.constants = model, layout, statistics, constants
        self.num_states = num_states
        self.device = model.position.device
        self.mask = statistics.varies.to(self.device)  # (L, D)
        self._prototypes: dict[tuple[str | None, int], Tensor] = {}

    def tokens(self, sample: Sample, sampling: Sampling, *, seed: int, state: str) -> tuple[Tensor, int]:
        """Sample one network.

        Returns:
            Its standardised tokens, (L, D) on the CPU, and its permutation state (-1: none).
        """
        generator = rng.stream(seed, "generate", sample.task_bits or "", sample.index)
        chosen = parse_state(state, self.num_states)
        drawn = int(torch.randint(self.num_states, (), generator=generator))
        chosen = drawn if chosen is None else chosen

        def noise() -> Tensor:
            return torch.randn(self.mask.shape, generator=generator).to(self.device)  # (L, D)

        x_T = sampling.temperature * noise()  # (L, D)
        c = self.prototypes(sample.task_bits, chosen)  # (L, M)
        x_0 = self.model.sample(
            c, x_T, self.mask, sampler=sampling.sampler, num_steps=sampling.num_steps, noise=noise
        )  # (L, D)
        return x_0.float().cpu(), chosen

    @torch.no_grad()
    def prototypes(self, task_bits: str | None, state: int) -> Tensor:
        """Prototypes of one network, (L, M); kept, so that further samples of the same condition reuse them."""
        if (task_bits, state) not in self._prototypes:
            bits = bits_tensor([task_bits]).float().to(self.device) if task_bits is not None else None
            c = self.model.prototypes(bits, torch.tensor([state], device=self.device))[0]
            if len(self._prototypes) == KEPT_PROTOTYPES:
                self._prototypes.pop(next(iter(self._prototypes)))  # The oldest.
            self._prototypes[task_bits, state] = c
        return self._prototypes[task_bits, state]

    def network(self, tokens: Tensor) -> dict[str, Tensor]:
        """A state dict from standardised tokens, (L, D).

        Raises:
            RpgError: If it is not finite.
        """
        state = detokenize(tokens, self.layout, self.statistics, self.constants)
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise RpgError(
                    f"a generated network has NaN or infinity in {name}.",
                    "The model diverges when sampled: lower the temperature, take more steps, or train it longer.",
                )
        return state

    def batch(self, task_bits: Sequence[str], sampling: Sampling, *, seed: int) -> Tensor:
        """One network for each task at once, (B, L, D) on the CPU: a quick look, equal to `tokens` to rounding."""
        drawn = [rng.stream(seed, "generate", bits, 0) for bits in task_bits]
        states = torch.tensor([int(torch.randint(self.num_states, (), generator=g)) for g in drawn])

        def noise() -> Tensor:
            return torch.cat([torch.randn(self.mask.shape, generator=g) for g in drawn]).to(self.device)  # (B * L, D)

        mask = self.mask.repeat(len(task_bits), 1)  # (B * L, D)
        with torch.no_grad():
            c = self.model.prototypes(bits_tensor(task_bits).float().to(self.device), states.to(self.device))
        x_0 = self.model.sample(
            c.flatten(0, 1), sampling.temperature * noise(), mask,
            sampler=sampling.sampler, num_steps=sampling.num_steps, noise=noise,
        )  # fmt: skip
        tokens: Tensor = x_0.float().cpu().unflatten(0, (len(task_bits), -1))
        return tokens


def expand(tasks: Sequence[tuple[str, str | None]], count: int) -> Iterator[Sample]:
    """The samples of a request: `count` networks for each (split, task bits)."""
    for split, bits in tasks:
        for index in range(count):
            yield Sample(split, bits, index)
