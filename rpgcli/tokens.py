"""Tokenize and detokenize: checkpoints to standardised tokens and back.

    state dict --flatten--> (P,) --transform--> (P,) --grid--> (L, D) --standardise--> tokens

Statistics are taken over the seen checkpoints in float64, pooled (one mean and one deviation over everything counted),
with a floor, so that a coordinate that never varies neither divides by zero nor drifts: it is generated as its mean.
Tokens are stored before standardisation, which is applied when they are loaded. Each checkpoint is read once, tensor by
tensor, and statistics come from what was stored, one tensor of all checkpoints at a time: memory depends neither on the
size of the networks nor on their number.

Letters: N checkpoints, L = num_tokens, D = token_dim, P generated parameters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from rpgcli.alignment import Group
from rpgcli.artifact import Artifact, Draft, ahead, read_tensors, writing_tensors
from rpgcli.config import Config
from rpgcli.errors import ArtifactError, LayoutError, RecipeError
from rpgcli.layout import DTYPES, Granularity, Layout, Rows, check_finite
from rpgcli.progress import OnStep, Step

FLOOR = 1e-3
"""Smallest deviation of a coordinate, as a fraction of its tensor's pooled deviation."""
ABSOLUTE_FLOOR = 1e-6
"""Smallest deviation where a whole tensor never varies."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Smallest deviation of all: float32 would make 0 of a smaller one."""
SHARED = "shared.safetensors"
"""The tensors that are the same in all networks, once."""
STATISTICS = "statistics.safetensors"
"""What standardisation needs."""
NUM_AHEAD = 3
"""Tensors whose statistics are computed while those of one are written: a large one, and small ones beside it."""
BLOCK_VALUES = 2**15
"""Coordinates whose moments are computed together: they stay in the cache, and torch wakes no other thread for them."""
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

    def restore(self, tokens: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Inverse of `standardise`, (..., len(rows), D): a coordinate that never varied becomes its mean."""
        if self.raw:
            return tokens
        mean = self.mean[rows]
        return torch.where(self.varies[rows], tokens * self.scale[rows] + mean, mean)

    def tensors(self) -> dict[str, Tensor]:
        """For `statistics.safetensors`."""
        return vars(self)


def moments(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each coordinate of N rows (P,), (P,) each in float64; a block of coordinates at a time."""
    (num_values,) = rows[0].shape
    mean, variance = (torch.zeros(num_values, dtype=torch.float64) for _ in range(2))
    for start in range(0, num_values, BLOCK_VALUES):
        here = slice(start, start + BLOCK_VALUES)
        m, v = mean[here], variance[here]
        for row in rows:
            m.add_(row[here])
        m.div_(len(rows))
        for row in rows:
            difference = row[here] - m
            v.addcmul_(difference, difference)
        v.div_(len(rows))
    return mean, variance


def standardisation(mean: Tensor, variance: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """What standardises one tensor, from the moments (numel,) of its elements over all checkpoints in float64.

    Args:
        mean: Of each element.
        variance: Of each element.
        how: As `TokensConfig.standardise`.

    Returns:
        Mean, scale and whether it varies, of each element.
    """
    varies = variance > 0
    if how == "none":
        return torch.zeros_like(mean).float(), torch.ones_like(mean).float(), torch.ones_like(varies)
    spread = (mean - mean[0]).var(correction=0)  # Keeps digits, and is exactly zero where all elements are equal.
    deviation = (variance.mean() + spread).sqrt()  # Over elements and checkpoints.
    if how == "layer":
        scale = deviation.clamp(min=ABSOLUTE_FLOOR).float().expand(len(mean))
        return torch.where(varies, mean.mean(), mean).float(), scale, varies
    floor = max(FLOOR * float(deviation), SMALLEST_SCALE) if deviation > 0 else ABSOLUTE_FLOOR
    return mean.float(), variance.sqrt_().clamp_(min=floor).float(), varies


def write_statistics(
    draft: Draft, checkpoints: Sequence[Tensor], layout: Layout, how: str, references: Tensor
) -> Statistics:
    """Statistics of checkpoints, (L, D) each, one tensor of all of them at a time."""
    grid = torch.empty(layout.num_tokens, layout.token_dim, device="meta")
    like = {"mean": grid, "scale": grid, "varies": grid.bool(), "references": references, "raw": torch.tensor(False)}
    rows = {"mean": Rows(layout), "scale": Rows(layout, fill=1.0), "varies": Rows(layout)}

    def of_tensor(i: int) -> tuple[Tensor, Tensor, Tensor]:
        return standardisation(*moments([layout.of_tensor(tokens, i) for tokens in checkpoints]), how)

    with draft.saving_tensors(STATISTICS, like) as append:
        append("references", references)
        append("raw", torch.tensor(how == "none"))
        for found in ahead(of_tensor, range(len(layout.generated)), NUM_AHEAD):
            for name, values in zip(rows, found):
                for block in rows[name].add(values):
                    append(name, block)
    return Statistics(**read_tensors(draft.path / STATISTICS))


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def variance_references(state: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The mean running variance of each log-variance tensor of one checkpoint: the unit of its logarithm."""
    means = [state[spec.name].double().mean() for spec in layout.generated if spec.transform == "log-variance"]
    return torch.stack(means).clamp(min=1e-12).float() if means else torch.zeros(0)


def units(layout: Layout, references: Tensor) -> list[Tensor | None]:
    """Of each generated tensor the unit of its logarithm; None where it is left alone."""
    given = iter(VARIANCE_SHARE * references)
    return [next(given) if spec.transform == "log-variance" else None for spec in layout.generated]


def to_logarithm(values: Tensor, unit: Tensor | None) -> Tensor:
    """Map running variances to logarithms; all else (`unit` None) is left alone.

    A variance below zero, which no network computes but a file may hold, counts as zero.
    """
    if unit is None:
        return values
    return torch.log((values / unit).clamp(0, torch.finfo(values.dtype).max) + VARIANCE_SHIFT)


def from_logarithm(values: Tensor, unit: Tensor | None) -> Tensor:
    """Inverse of `to_logarithm`, never below a thousandth of the unit."""
    return values if unit is None else (values.exp() - VARIANCE_SHIFT).clamp(min=VARIANCE_MIN) * unit


def transform(flat: Tensor, layout: Layout, references: Tensor, *, inverse: bool = False) -> Tensor:
    """Map running variances to logarithms or back; everything else is left alone. (..., P) to (..., P)."""
    if not len(references):
        return flat
    pieces, change = (
        flat.split([spec.numel for spec in layout.generated], -1),
        from_logarithm if inverse else to_logarithm,
    )
    return torch.cat([change(piece, unit) for piece, unit in zip(pieces, units(layout, references))], -1)


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
        State dict in the target's order, each tensor in its original dtype; constants are not copied.

    Raises:
        LayoutError: If `tokens` is not (layout.num_tokens, layout.token_dim).
    """
    layout.check_tokens(tokens)
    return dict(detokenized([tokens], layout, statistics, constants))


def detokenized(
    blocks: Iterable[Tensor], layout: Layout, statistics: Statistics, constants: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """`detokenize` of blocks of tokens (r, D), one tensor after another as soon as it is whole."""

    def raw() -> Iterator[Tensor]:
        row = 0
        for block in blocks:
            yield statistics.restore(block, slice(row, row + len(block)))
            row += len(block)

    values, unit_of = layout.values(raw()), iter(units(layout, statistics.references))
    for spec in layout.specs:
        if spec.role == "generated":
            value = from_logarithm(next(values), next(unit_of))
            yield spec.name, value.view(spec.shape).to(DTYPES[spec.dtype])
        else:
            yield spec.name, constants[spec.name]


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
    per_shard = max(1, SHARD_BYTES // (4 * layout.num_tokens * layout.token_dim))
    references, shared = torch.zeros(0), dict[str, Tensor]()
    every, names = enumerate(states), list[str]()
    with ThreadPoolExecutor(1) as aside:  # Syncs and hashes a shard while the next one is written.
        added = []
        for first in range(0, num_states, per_shard):
            size = min(per_shard, num_states - first)
            like = {"tokens": torch.empty(size, layout.num_tokens, layout.token_dim, device="meta")}
            for spec in layout.constants:
                like[f"constant.{spec.name}"] = torch.empty(size, *spec.shape, dtype=DTYPES[spec.dtype], device="meta")
            names.append(f"tokens-{first // per_shard:05d}.safetensors")
            with writing_tensors(draft.path / names[-1], like, sync=False) as append:
                for i, state in islice(every, size):
                    layout.check(state)
                    if i == 0:
                        references = variance_references(state, layout)
                        shared = keep_shared(draft, state, layout)
                    check_shared(state, shared)
                    append_tokens(append, state, layout, references)
                    on_step(Step(i + 1, num_states, unit="checkpoint"))
            added.append(aside.submit(draft.add, names[-1]))
        for done in added:
            done.result()
    shards = [read_tensors(draft.path / name)["tokens"] for name in names]
    checkpoints = [tokens for shard in shards for tokens in shard]
    statistics = write_statistics(draft, checkpoints, layout, config.standardise, references)
    if not statistics.varies.any():
        raise ArtifactError(
            f"the {num_states} seen checkpoints hold the same values: there is nothing to learn.",
            "Collect several snapshots, runs or tasks.",
        )
    draft.save_json("layout.json", layout.to_json())
    return statistics


def append_tokens(
    append: Callable[[str, Tensor], None], state: Mapping[str, Tensor], layout: Layout, references: Tensor
) -> None:
    """Write one checkpoint to a shard, one tensor after another."""
    rows = Rows(layout)
    for spec, unit in zip(layout.generated, units(layout, references)):
        for block in rows.add(to_logarithm(state[spec.name].reshape(-1).float(), unit)):
            append("tokens", block)
    for spec in layout.constants:
        append(f"constant.{spec.name}", state[spec.name])


def check_shared(state: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
    """Raise a LayoutError unless a checkpoint has the tensors that all share."""
    for name, value in shared.items():
        if state[name] is not value and not torch.equal(state[name], value):
            raise LayoutError(
                f"{name} is frozen but not the same in all networks.", "Collect them from one base network."
            )


def keep_shared(draft: Draft, state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Write what is the same in all networks, from the first."""
    shared = {spec.name: state[spec.name] for spec in layout.shared}
    for name, value in shared.items():
        check_finite(name, value)
    if shared:
        draft.save_tensors(SHARED, shared)
    return shared


class TokenStore:
    """The tokens of all seen checkpoints, memory-mapped; standardised as they are loaded."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.layout = Layout.from_json(artifact.json("layout.json"))
        self.statistics = Statistics(**artifact.tensors(STATISTICS))
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
