"""Tokenize and detokenize: checkpoints to standardised tokens and back.

    state dict --flatten--> (P,) --transform--> (P,) --grid--> (L, D) --standardise--> tokens

Statistics stream over the seen checkpoints in float64, pooled (one mean and one deviation over everything counted),
with a floor, so that a coordinate that never varies neither divides by zero nor drifts: it is generated as its mean.
Tokens are stored before standardisation, which is applied when they are loaded: each checkpoint is read once.

Letters: N checkpoints, L = num_tokens, D = token_dim, P generated parameters.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from rpgcli.alignment import Group
from rpgcli.artifact import Artifact, Draft
from rpgcli.config import Config
from rpgcli.errors import ArtifactError, LayoutError, RecipeError
from rpgcli.layout import Granularity, Layout, check_finite
from rpgcli.progress import OnStep, Step

FLOOR = 1e-3
"""Smallest deviation of a coordinate, as a fraction of its tensor's pooled deviation."""
ABSOLUTE_FLOOR = 1e-6
"""Smallest deviation where a whole tensor never varies."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Smallest deviation of all: float32 would make 0 of a smaller one."""
SHARED = "shared.safetensors"
"""The tensors that are the same in all networks, once."""
SHARD_BYTES = 256 * 2**20
"""A shard of the token store holds as many whole checkpoints as fit here (at least one)."""
VARIANCE_SHARE, VARIANCE_SHIFT, VARIANCE_MIN = 0.95, 0.05, 1e-3
"""Constants of the RPG release's map of running variances: y = log(v / (0.95 m) + 0.05), m a reference mean."""


class TokensConfig(Config):
    """How checkpoints become tokens."""

    token_dim: PositiveInt = 128
    """Slots D of one token; the paper uses 8192 for networks of millions of parameters."""
    granularity: Granularity = "layer"
    """`layer`: each tensor starts a new token; `channel`: whole output channels; `flat`: everything end to end."""
    standardise: Literal["parameter", "layer", "none"] = "parameter"
    """Mean and deviation of each coordinate, of each tensor (the paper's), or the raw values."""
    align: Literal["auto", "none", "weight-matching"] = "auto"
    """`weight-matching` brings the hidden units of all checkpoints into the order and scale of the first one's; `auto`
    does so for a zoo of independent starts (`seeds`)."""

    def exchanged(self, groups: Sequence[Group], *, independent: bool) -> tuple[Group, ...]:
        """The symmetries that are removed before networks become tokens: all of `groups`, or none.

        Args:
            groups: Units that can be exchanged without touching what all networks share.
            independent: Whether every training had a start of its own.

        Raises:
            RecipeError: If `align` asks for weight matching and there is nothing to match.
        """
        if self.align == "none" or (self.align == "auto" and not independent):
            return ()
        if self.align == "weight-matching" and not groups:
            raise RecipeError(
                "tokens.align is weight-matching, but no hidden units of these networks are known to be exchangeable.",
                "Known are those of mlp3, cnn, convnet3, rpg-cnn and timm's plain ResNets and vision transformers,",
                "where everything that enters or leaves a unit is generated. Set tokens.align: none.",
            )
        return tuple(groups)


@dataclass(frozen=True)
class Statistics:
    """What standardisation subtracts and divides by."""

    mean: Tensor  # (L, D)
    scale: Tensor  # (L, D) deviation, floored; 1 in padding
    varies: Tensor  # (L, D) bool: holds a value that differs between checkpoints, so it is learned
    references: Tensor  # (number of log-variance tensors,)
    raw: Tensor  # () bool: nothing is subtracted or divided, so that every bit survives

    def standardise(self, tokens: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Raw tokens (..., len(rows), D) to zero mean and unit deviation; padding and fixed coordinates become 0."""
        if self.raw:
            return tokens
        return (tokens - self.mean[rows]).div_(self.scale[rows]).mul_(self.varies[rows])

    def restore(self, tokens: Tensor) -> Tensor:
        """Inverse of `standardise`, (..., L, D): a coordinate that never varied becomes its mean."""
        if self.raw:
            return tokens
        return torch.where(self.varies, tokens * self.scale + self.mean, self.mean)

    def tensors(self) -> dict[str, Tensor]:
        """For `statistics.safetensors`."""
        return vars(self)


class Moments:
    """Streaming mean and deviation of (P,) vectors in float64, shifted by the first one to keep digits."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, flat: Tensor) -> None:
        """Count one checkpoint, (P,)."""
        if self.count == 0:
            self.shift = flat.double()
            self.sum, self.squares = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        difference = flat.double() - self.shift
        self.sum += difference
        self.squares.addcmul_(difference, difference)
        self.count += 1

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """(P,) each, over all checkpoints counted; float64."""
        offset = self.sum / self.count
        return self.shift + offset, (self.squares / self.count - offset.square()).clamp(min=0)


def make_statistics(moments: Moments, layout: Layout, standardise: str, references: Tensor) -> Statistics:
    """Turn streamed moments into what standardisation needs."""
    mean, variance = moments.mean_and_variance()  # (P,)
    if standardise == "none":
        ones = layout.grid(torch.ones(layout.num_parameters))
        return Statistics(torch.zeros_like(ones), torch.ones_like(ones), ones.bool(), references, torch.tensor(True))
    sizes = [spec.numel for spec in layout.generated]
    means, scales, varies = [], [], []
    for m, v in zip(mean.split(sizes), variance.split(sizes)):
        off = m - m[0]  # Keeps digits, and is exactly zero where all elements are equal.
        deviation = (v + (off - off.mean()).square()).mean().sqrt()  # Over the tensor's elements and all checkpoints.
        floor = max(FLOOR * float(deviation), SMALLEST_SCALE) if deviation > 0 else ABSOLUTE_FLOOR
        if standardise == "layer":
            means.append(torch.where(v > 0, m.mean(), m))
            scales.append(deviation.clamp(min=ABSOLUTE_FLOOR).expand_as(m))
        else:
            means.append(m)
            scales.append(v.sqrt().clamp(min=floor))
        varies.append(v > 0)
    padding = layout.grid(torch.ones(layout.num_parameters)) == 0
    return Statistics(
        layout.grid(torch.cat(means).float()),
        layout.grid(torch.cat(scales).float()) + padding,
        layout.grid(torch.cat(varies)),
        references,
        torch.tensor(False),
    )


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def variance_references(state: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The mean running variance of each log-variance tensor of one checkpoint: the unit of its logarithm."""
    means = [state[spec.name].double().mean() for spec in layout.generated if spec.transform == "log-variance"]
    return torch.stack(means).clamp(min=1e-12).float() if means else torch.zeros(0)


def transform(flat: Tensor, layout: Layout, references: Tensor, *, inverse: bool = False) -> Tensor:
    """Map running variances to logarithms or back; everything else is left alone. (..., P) to (..., P)."""
    pieces = list(flat.split([spec.numel for spec in layout.generated], -1))
    logs = [i for i, spec in enumerate(layout.generated) if spec.transform == "log-variance"]
    for i, reference in zip(logs, references):
        unit = VARIANCE_SHARE * reference
        if inverse:
            pieces[i] = (pieces[i].exp() - VARIANCE_SHIFT).clamp(min=VARIANCE_MIN) * unit
        else:
            pieces[i] = torch.log(pieces[i] / unit + VARIANCE_SHIFT)
    return torch.cat(pieces, -1) if logs else flat


def tokenize(state: Mapping[str, Tensor], layout: Layout, references: Tensor) -> Tensor:
    """A checkpoint as raw tokens, (L, D), before standardisation."""
    return layout.grid(transform(layout.flatten(state), layout, references))


def detokenize(
    tokens: Tensor, layout: Layout, statistics: Statistics, constants: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rebuild a state dict from standardised tokens.

    Args:
        tokens: (L, D) in units of each coordinate's deviation; padded slots are ignored.
        layout: The layout they were made with.
        statistics: Theirs.
        constants: Tensors that are not generated, by name.

    Returns:
        State dict in the target's order, each tensor in its original dtype.

    Raises:
        LayoutError: If `tokens` is not (layout.num_tokens, layout.token_dim).
    """
    flat = layout.ungrid(statistics.restore(tokens))  # (P,)
    return layout.unflatten(transform(flat, layout, statistics.references, inverse=True), constants)


# --- the token store --------------------------------------------------------------------------------------------------


def write_store(
    draft: Draft,
    states: Iterable[Mapping[str, Tensor]],
    num_states: int,
    layout: Layout,
    config: TokensConfig,
    on_step: OnStep,
) -> Statistics:
    """Stream checkpoints into token shards and statistics; memory does not grow with their number.

    Raises:
        LayoutError: If a checkpoint does not fit the layout, or a shared tensor is not the same in all.
        ArtifactError: If all are the same.
    """
    moments, references = Moments(), torch.zeros(0)
    per_shard = max(1, SHARD_BYTES // (4 * layout.num_tokens * layout.token_dim))
    shard: list[Tensor] = []
    constants: list[dict[str, Tensor]] = []
    shared: dict[str, Tensor] = {}
    for i, state in enumerate(states):
        layout.check(state)
        if i == 0:
            references = variance_references(state, layout)
            shared = {spec.name: state[spec.name] for spec in layout.shared}
            for name, value in shared.items():
                check_finite(name, value)
            if shared:
                draft.save_tensors(SHARED, shared)
        for name, value in shared.items():
            if state[name] is not value and not torch.equal(state[name], value):
                raise LayoutError(
                    f"{name} is frozen but not the same in all networks.", "Collect them from one base network."
                )
        flat = transform(layout.flatten(state), layout, references)
        moments.update(flat)
        shard.append(layout.grid(flat))
        constants.append({spec.name: state[spec.name].clone() for spec in layout.constants})  # Lets go of the file.
        if len(shard) == per_shard or i == num_states - 1:
            kept = {
                f"constant.{spec.name}": torch.stack([c[spec.name] for c in constants]) for spec in layout.constants
            }
            draft.save_tensors(f"tokens-{i // per_shard:05d}.safetensors", {"tokens": torch.stack(shard), **kept})
            shard, constants = [], []
        on_step(Step(i + 1, num_states, unit="checkpoint"))
    statistics = make_statistics(moments, layout, config.standardise, references)
    if not statistics.varies.any():
        raise ArtifactError(
            f"the {num_states} seen checkpoints hold the same values: there is nothing to learn.",
            "Collect several snapshots, runs or tasks.",
        )
    draft.save_tensors("statistics.safetensors", statistics.tensors())
    draft.save_json("layout.json", layout.to_json())
    return statistics


class TokenStore:
    """The tokens of all seen checkpoints, memory-mapped; standardised as they are loaded."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.layout = Layout.from_json(artifact.json("layout.json"))
        self.statistics = Statistics(**artifact.tensors("statistics.safetensors"))
        names = sorted(name for name in artifact.manifest.files if name.startswith("tokens-"))
        self.shards = [artifact.tensors(name) for name in names]
        self.shared = artifact.tensors(SHARED) if SHARED in artifact.manifest.files else {}
        self.per_shard = len(self.shards[0]["tokens"])
        self.checkpoints: list[dict[str, object]] = artifact.facts["checkpoints"]
        """For each checkpoint in the store its facts: task bits, run, step."""

    def __len__(self) -> int:
        return sum(len(shard["tokens"]) for shard in self.shards)

    def rows(self, checkpoint: Tensor, token: Tensor) -> Tensor:
        """Standardised tokens, (K, D): token `token[k]` of checkpoint `checkpoint[k]`."""
        shard, place = checkpoint // self.per_shard, checkpoint % self.per_shard
        raw = self.shards[0]["tokens"].new_empty(len(token), self.layout.token_dim)
        for i in shard.unique().tolist():
            here = shard == i
            raw[here] = self.shards[i]["tokens"][place[here], token[here]]
        return self.statistics.standardise(raw, token)

    def network(self, i: int) -> Tensor:
        """All standardised tokens of checkpoint i, (L, D)."""
        return self.statistics.standardise(self.shards[i // self.per_shard]["tokens"][i % self.per_shard])

    def constants(self, i: int) -> dict[str, Tensor]:
        """The tensors of checkpoint i that are not generated: its own constants, and those that all networks share."""
        shard = self.shards[i // self.per_shard]
        return dict(self.shared) | {
            spec.name: shard[f"constant.{spec.name}"][i % self.per_shard] for spec in self.layout.constants
        }

    def vector(self, i: int) -> Tensor:
        """The standardised parameters of checkpoint i, (P,)."""
        return self.layout.ungrid(self.network(i))

    def vector_of(self, state: Mapping[str, Tensor]) -> Tensor:
        """Those of any network of this layout, (P,)."""
        tokens = tokenize(state, self.layout, self.statistics.references)
        return self.layout.ungrid(self.statistics.standardise(tokens))

    def rebuilt(self, x: Tensor, i: int = 0) -> dict[str, Tensor]:
        """The network with standardised parameters `x`, (P,), and the constants of checkpoint i."""
        return detokenize(self.layout.grid(x), self.layout, self.statistics, self.constants(i))

    def varying(self, x: Tensor) -> dict[str, Tensor]:
        """The generated tensors alone of the network with standardised parameters `x`, (P,)."""
        tokens = self.statistics.restore(self.layout.grid(x))
        flat = transform(self.layout.ungrid(tokens), self.layout, self.statistics.references, inverse=True)
        return self.layout.pieces(flat)

    def state(self, i: int) -> dict[str, Tensor]:
        """Checkpoint i, detokenized."""
        return detokenize(self.network(i), self.layout, self.statistics, self.constants(i))
