"""Generate: from a request to whole networks on disk.

    Source --opened--> Maker --one Sample after another--> networks, each tensor by tensor

A source is a trained model, or the tokens of a zoo and a trivial way of making networks. Sample i of seed S for
a task draws from the stream named (S, task, i) and is computed by itself, so it does not depend on how many others are
asked for, nor on their order.

A model runs its core once for each network, and then takes one block of rows after another from noise to values: what
is in memory beside the weights are the prototypes and one block, however large the network.

Letters: L tokens of a network, R rows of width D that it is sampled as (RPG: the tokens; p-diff: one latent), r rows of
one block, M = width of a prototype.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from rpgcli import artifact, rng
from rpgcli.artifact import Artifact
from rpgcli.conditions import Asked, Condition, parse_state
from rpgcli.config import Config
from rpgcli.errors import RpgError, UsageError, nearest
from rpgcli.layout import Layout
from rpgcli.methods import LEARNED, METHODS, SHORT
from rpgcli.samplers import DdimConfig, Denoised, SamplerConfig
from rpgcli.samplers import sample as denoise
from rpgcli.tasks import other_tasks
from rpgcli.tokens import Statistics, detokenized
from rpgcli.training import autocast

MANY = 20
"""Networks of a model without tasks, if nobody says how many: one would say nothing of its distribution."""
KEPT_BYTES = 2**28
"""Of prototypes that are kept for other samples of their condition: a request draws its states in any order."""
BLOCK_VALUES = 2**21
"""Of the rows that are denoised together, 8 MiB; a block has noise of its own, so another size means other networks."""
DENOISING = frozenset({"sampler", "num_steps", "temperature", "state"})
"""Settings that only a trained model reads."""


def method_name(name: str) -> str:
    """The whole name of a method.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in METHODS and name not in SHORT:
        raise ValueError(f"unknown method {name!r}{nearest(name, [*METHODS, *SHORT])}")
    return SHORT.get(name, name)


class GenerateConfig(Config):
    """How networks are sampled; what is left out was chosen on validation tasks when the model was trained."""

    method: Annotated[str, AfterValidator(method_name)] | None = None
    """Which model of the run, or which trivial generator; left out: the only model there is."""
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
    num_others: NonNegativeInt = 0
    """Tasks among them that the zoo left out, even; they count as unseen."""

    def num_networks(self, *, has_tasks: bool) -> int:
        """Networks for each task, resolved."""
        return self.count or (1 if has_tasks else MANY)


class Sampling(Config):
    """A sampler with its settings, resolved."""

    sampler: SamplerConfig = Field(default_factory=DdimConfig, discriminator="kind")
    """How x_0 is reached."""
    num_steps: PositiveInt = 20
    """Denoising steps."""
    temperature: NonNegativeFloat = 1.0
    """Scale of the starting noise."""


class Method(Denoised, Protocol):
    """What `Generator` needs of a trained model."""

    def prototypes(self, features: Tensor | None, state: Tensor | None) -> Tensor:
        """Features (B, C) and permutation states (B,) to prototypes (B, R, M)."""
        ...


@dataclass(frozen=True)
class Sample:
    """One network that is asked for."""

    asked: Asked
    index: int
    """Number i among the networks of its request."""


@dataclass(frozen=True)
class Source:
    """Where networks come from: a trained model, or the tokens of a zoo and a trivial way of making networks."""

    method: str
    inputs: Mapping[str, Artifact]
    """What is read, by its folder; the first one knows the zoo's tasks and its target network."""
    condition: Condition | None
    """What can be asked of it."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the zoo: `tasks`, `problem`, `network`, `num_parameters`."""
        return next(iter(self.inputs.values())).facts

    @property
    def answers_nothing(self) -> bool:
        """Whether it was trained without its condition too."""
        return any(found.section.get("diffusion", {}).get("condition_dropout") for found in self.inputs.values())

    @property
    def is_learned(self) -> bool:
        """Whether it is a trained model."""
        return self.method in LEARNED


@dataclass(frozen=True)
class Maker:
    """An opened source."""

    make: Callable[[Sample], tuple[Iterable[tuple[str, Tensor]], int]]
    """The network that is asked for, tensor by tensor, and its permutation state (0 or -1 where there are none)."""
    facts: Mapping[str, Any]
    """`sampling` (of a trained model), `latents` (of p-diff: how it had learned), and `settings` that were chosen on
    validation tasks."""
    training_seconds: float | None
    """What was spent before the first network could be made, the zoo apart."""


@dataclass(frozen=True)
class Model:
    """A trained method with what turns its samples into networks; all on one device, in evaluation mode."""

    name: str
    method: Method
    mask: Tensor
    """What varies and is sampled, (R, D)."""
    decode: Callable[[Tensor], Tensor]
    """Samples (B, R, D) to standardised tokens (B, L, token_dim); of RPG any R, for one gives the other."""
    condition: Condition | None
    num_states: int
    layout: Layout
    statistics: Statistics
    constants: Mapping[str, Tensor]


class Generator:
    """Samples networks from a trained model.

    Args:
        model: Trained.
        dtype: Of matrix products and convolutions (autocast); the scan and the sampler's state stay float32.
    """

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.device = model.mask.device
        self.dtype = dtype
        self._prototypes: dict[tuple[Asked, int], Tensor] = {}

    def tokens(self, sample: Sample, sampling: Sampling, *, seed: int, state: str) -> tuple[Tensor, int]:
        """Sample one network.

        Returns:
            Its standardised tokens, (L, token_dim) on the CPU, and its permutation state (-1: none).
        """
        blocks, chosen = self.blocks(sample, sampling, seed=seed, state=state)
        return torch.cat(list(blocks)), chosen

    def blocks(self, sample: Sample, sampling: Sampling, *, seed: int, state: str) -> tuple[Iterator[Tensor], int]:
        """Sample one network, block after block.

        Returns:
            Its standardised tokens, (r, token_dim) on the CPU, in order, and its permutation state (-1: none).
        """
        name = (seed, "generate", sample.asked.words, sample.index)
        generator = rng.stream(*name)
        chosen = parse_state(state, self.model.num_states)
        drawn = int(torch.randint(self.model.num_states, (), generator=generator))
        chosen = drawn if chosen is None else chosen

        def sampled() -> Iterator[Tensor]:
            c = self.prototypes(sample.asked, chosen)  # (R, M)
            for number, mask in enumerate(self.model.mask.split(rows_at_once(self.model.mask.shape[1]))):
                # The first block goes on with the stream that the state was drawn from.
                yield self.block(c, mask, sampling, generator if number == 0 else rng.stream(*name, number))
                c = c[len(mask) :]

        return sampled(), chosen

    def block(self, c: Tensor, mask: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """Standardised tokens, (r, token_dim) on the CPU, of what varies (r, D), from the first prototypes of c."""

        def noise() -> Tensor:
            return torch.randn(mask.shape, generator=generator).to(self.device)  # (r, D)

        x_T = sampling.temperature * noise()  # (r, D)
        return self._decoded(self._denoised(c[: len(mask)], x_T, mask, sampling, noise)[None])[0]

    @torch.no_grad()
    def prototypes(self, asked: Asked, state: int) -> Tensor:
        """Prototypes of one network, (R, M); kept, so that further samples of the same condition reuse them."""
        if (asked, state) not in self._prototypes:
            with autocast(self.device, self.dtype):
                (c,) = self.model.method.prototypes(self.features([asked]), torch.tensor([state], device=self.device))
            if (1 + len(self._prototypes)) * c.nbytes > KEPT_BYTES and self._prototypes:
                self._prototypes.pop(next(iter(self._prototypes)))  # The oldest.
            self._prototypes[asked, state] = c
        return self._prototypes[asked, state]

    def features(self, asked: Sequence[Asked]) -> Tensor | None:
        """Of the condition, (B, C)."""
        condition = self.model.condition
        return None if condition is None else condition.features(asked).to(self.device)

    def network(self, tokens: Tensor) -> dict[str, Tensor]:
        """A state dict from standardised tokens, (L, token_dim).

        Raises:
            RpgError: If it is not finite.
        """
        self.model.layout.check_tokens(tokens)
        return dict(self.tensors([tokens]))

    def tensors(self, blocks: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a network, each as soon as the blocks of standardised tokens (r, token_dim) hold all of it.

        Raises:
            RpgError: If one is not finite.
        """
        model = self.model
        learned = {spec.name for spec in model.layout.generated}
        for name, value in detokenized(blocks, model.layout, model.statistics, model.constants):
            if name in learned and not bool(value.isfinite().all()):
                raise RpgError(
                    f"a generated network has NaN or infinity in {name}.",
                    "The model diverges when sampled: lower the temperature, take more steps, or train it longer.",
                )
            yield name, value

    def batch(self, asked: Sequence[Asked], sampling: Sampling, *, seed: int) -> Tensor:
        """One network for each at once, (B, L, token_dim) on the CPU: a quick look, equal to `tokens` to rounding.

        That holds for networks of one block; larger ones get other noise of the same kind.
        """
        drawn = [rng.stream(seed, "generate", one.words, 0) for one in asked]
        states = torch.tensor([int(torch.randint(self.model.num_states, (), generator=g)) for g in drawn])
        shape = self.model.mask.shape

        def noise() -> Tensor:
            return torch.cat([torch.randn(shape, generator=g) for g in drawn]).to(self.device)  # (B * R, D)

        mask = self.model.mask.repeat(len(asked), 1)  # (B * R, D)
        with torch.no_grad(), autocast(self.device, self.dtype):
            c = self.model.method.prototypes(self.features(asked), states.to(self.device))
        x_0 = self._denoised(c.flatten(0, 1), sampling.temperature * noise(), mask, sampling, noise)
        return self._decoded(x_0.unflatten(0, (len(asked), -1)))

    def _denoised(
        self, c: Tensor, x_T: Tensor, mask: Tensor, sampling: Sampling, noise: Callable[[], Tensor]
    ) -> Tensor:
        with autocast(self.device, self.dtype):
            return denoise(
                self.model.method, c, x_T, mask, sampler=sampling.sampler, num_steps=sampling.num_steps, noise=noise
            )

    @torch.no_grad()
    def _decoded(self, x_0: Tensor) -> Tensor:
        return self.model.decode(x_0).float().cpu()


def rows_at_once(width: int) -> int:
    """Rows r of a block."""
    return max(1, BLOCK_VALUES // width)


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What networks are asked for."""

    name: str
    asked: Sequence[Asked]
    count: int
    """Networks for each."""

    def samples(self) -> Iterator[Sample]:
        """All of them."""
        return (Sample(one, index) for one in self.asked for index in range(self.count))


def condition_of(trained: Artifact) -> Condition | None:
    """The condition of a trained model."""
    stored = trained.facts["condition"]
    return Condition.from_json(stored) if stored is not None else None


def default_request(source: Source, config: GenerateConfig) -> Request:
    """What a source is asked for when nobody says.

    Task bits: all validation and unseen tasks, some of the seen, and of those that the zoo left out. Labels and levels:
    each, and levels also nothing if the model learned that. An accuracy: its mean, and a deviation below and above. An
    unconditional model: nothing.
    """
    condition = source.condition
    count = config.num_networks(has_tasks=condition is not None and condition.kind == "task-bits")
    if condition is None:
        return Request("all", [Asked()], count)
    if condition.kind == "task-bits":
        tasks = source.facts["tasks"]
        chosen = [Asked("seen", bits) for bits in tasks["seen"][: config.num_seen]]
        chosen += [Asked(split, bits) for split in ("validation", "unseen") for bits in tasks[split]]
        if config.num_others:
            known = [bits for side in tasks.values() for bits in side]
            chosen += [Asked("unseen", bits) for bits in other_tasks(known, config.num_others)]
        return Request("tasks", chosen, count)
    if condition.kind == "label":
        return Request("labels", [Asked(label=label) for label in condition.labels], count)
    if condition.kind == "accuracy-level":
        middles = [round((low + high) / 2, 6) for low, high in condition.levels]
        nothing = [Asked()] if source.answers_nothing else []
        return Request("levels", [*(Asked(accuracy=middle) for middle in middles), *nothing], count)
    around = dict.fromkeys(round(min(1.0, max(0.0, condition.mean + k * condition.std)), 4) for k in (-1, 0, 1))
    return Request("accuracies", [Asked(accuracy=accuracy) for accuracy in around], count)


def request_of(source: Source, config: GenerateConfig, asked: Sequence[Asked], name: str) -> Request:
    """A request for given tasks, a label, or an accuracy; a task that is not in the zoo is unseen.

    Raises:
        UsageError: If the source cannot be asked for that.
    """
    condition = source.condition
    if condition is None:
        raise UsageError(
            f"{source.method} is unconditional: nothing can be asked of it.",
            "Leave out --task-bits, --classes, --tasks, --label and --accuracy.",
        )
    sides = {bits: split for split, side in source.facts["tasks"].items() for bits in side}
    for one in asked:
        condition.check(one)
    placed = [
        replace(one, split=sides.get(one.task_bits, "unseen")) if one.task_bits is not None else one for one in asked
    ]
    return Request(name, placed, config.num_networks(has_tasks=condition.kind == "task-bits"))


def request_folder(request: Request, config: GenerateConfig, method: str) -> str:
    """`[method-]<bits, label, accuracy or tasks>-s<seed>-n<count>[-<hash of the other settings that were given>]`."""
    named = {"seed", "count", "method"} | (set() if method in LEARNED else DENOISING)
    rest = config.model_dump(mode="json", exclude=named, exclude_defaults=True)
    suffix = f"-{artifact.digest(rest)[:8]}" if rest else ""
    prefix = "" if method == "rpg" else f"{method}-"
    return f"{prefix}{request.name}-s{config.seed}-n{request.count}{suffix}"
