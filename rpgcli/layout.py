"""The layout: which tensors of a target network are generated, and where each value lies in the grid of tokens.

A checkpoint's generated tensors, flattened in state-dict order, become L tokens of D slots; slots beyond a token's
values are padding (masked, zero). Three granularities (those of the RPG release):

    flat      all tensors end to end, padded once at the very end
    layer     each tensor starts a new token (the paper's default)
    channel   a token holds whole output channels, or whole rows where one channel exceeds D

Letters: L = num_tokens, D = token_dim, P = num_parameters generated.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rpgcli.errors import LayoutError

Granularity = Literal["flat", "layer", "channel"]
DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
}
GENERATED_DTYPES = {"float32", "float16", "bfloat16"}
"""Dtypes that a float32 token holds exactly."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the target's state dict."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Literal["generated", "constant", "shared"]
    """Learned; carried as it is with each checkpoint; or frozen, the same in all networks and stored once."""
    transform: Literal["identity", "log-variance"] = "identity"

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Segment:
    """A run of generated values cut into tokens of `width` values each (the last one may hold fewer)."""

    start: int
    numel: int
    width: int
    first_token: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the segment fills."""
        return -(-self.numel // self.width)

    @property
    def tokens(self) -> slice:
        """Its rows in the grid."""
        return slice(self.first_token, self.first_token + self.num_tokens)


@dataclass(frozen=True)
class Layout:
    """Order, shapes and places of all tensors of one target network."""

    specs: tuple[TensorSpec, ...]
    token_dim: int
    granularity: Granularity

    @cached_property
    def generated(self) -> tuple[TensorSpec, ...]:
        """The tensors that are learned, in state-dict order."""
        return tuple(spec for spec in self.specs if spec.role == "generated")

    @cached_property
    def constants(self) -> tuple[TensorSpec, ...]:
        """The tensors that each checkpoint carries as they are."""
        return tuple(spec for spec in self.specs if spec.role == "constant")

    @cached_property
    def shared(self) -> tuple[TensorSpec, ...]:
        """The tensors that are the same in all networks."""
        return tuple(spec for spec in self.specs if spec.role == "shared")

    @cached_property
    def num_parameters(self) -> int:
        """Generated values P."""
        return sum(spec.numel for spec in self.generated)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The generated values cut into tokens: one segment for each tensor, or one for all when `flat`."""
        pieces = [(self.num_parameters, self.token_dim)]
        if self.granularity != "flat":
            pieces = [(spec.numel, self._width(spec)) for spec in self.generated]
        segments, start, first = [], 0, 0
        for numel, width in pieces:
            segments.append(Segment(start, numel, width, first))
            start, first = start + numel, first + segments[-1].num_tokens
        return tuple(segments)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens L of one checkpoint."""
        return sum(segment.num_tokens for segment in self.segments)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Of each generated tensor the number of its first value."""
        return tuple(accumulate((spec.numel for spec in self.generated), initial=0))

    def indices(self) -> tuple[Tensor, Tensor]:
        """Tensor number and token number inside the tensor, (L,) each: what a position embedding encodes."""
        tensor = torch.cat([torch.full((s.num_tokens,), i) for i, s in enumerate(self.segments)])
        token = torch.cat([torch.arange(s.num_tokens) for s in self.segments])
        return tensor, token

    def mask(self) -> Tensor:
        """True where a slot holds a value, (L, D)."""
        return self.grid(torch.ones(self.num_parameters, dtype=torch.bool))

    def grid(self, flat: Tensor) -> Tensor:
        """Lay P values out as tokens.

        Args:
            flat: (..., P).

        Returns:
            (..., L, D), padding zero.
        """
        if flat.shape[-1] != self.num_parameters:
            raise LayoutError(f"{flat.shape[-1]} values do not fit a layout of {self.num_parameters}.")
        rows = Rows(self)
        parts = flat.split([spec.numel for spec in self.generated], -1)
        return torch.cat([block for values in parts for block in rows.add(values)], -2)

    def ungrid(self, tokens: Tensor) -> Tensor:
        """Inverse of `grid`: (..., L, D) to (..., P); padding is ignored."""
        self.check_tokens(tokens)
        return torch.cat([tokens[..., s.tokens, : s.width].flatten(-2)[..., : s.numel] for s in self.segments], -1)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise a LayoutError unless `tokens` is (..., L, D)."""
        if tuple(tokens.shape[-2:]) != (self.num_tokens, self.token_dim):
            raise LayoutError(
                f"tokens have shape {tuple(tokens.shape[-2:])}, this layout needs {(self.num_tokens, self.token_dim)}.",
                "They were made with another layout; tokenize and train again from one zoo.",
            )

    def of_tensor(self, tokens: Tensor, i: int) -> Tensor:
        """The values of generated tensor i, (numel,), from tokens (L, D), of which only its own are read."""
        numel = self.generated[i].numel
        if self.granularity == "flat":
            return tokens.flatten()[self._starts[i] : self._starts[i] + numel]
        segment = self.segments[i]
        return tokens[segment.tokens, : segment.width].flatten()[:numel]

    def values(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The values of one generated tensor after another, (numel,) each, from blocks of tokens (r, D) in order."""
        wanted = iter(self.generated)
        spec, parts, have = next(wanted), list[Tensor](), 0
        for run in self._runs(blocks):
            while len(run):
                parts.append(run[: spec.numel - have])
                have, run = have + len(parts[-1]), run[len(parts[-1]) :]
                if have == spec.numel:
                    yield torch.cat(parts)
                    parts, have = [], 0
                    if (following := next(wanted, None)) is None:
                        return
                    spec = following
        raise LayoutError(f"the tokens end inside {spec.name}.", "They were made with another layout.")

    def _runs(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The values of blocks of tokens (r, D) without their padding, each of one segment."""
        segments, row = iter(self.segments), 0
        segment = next(segments)
        for block in blocks:
            while len(block):
                if row == segment.tokens.stop:
                    segment = next(segments)
                here = block[: segment.tokens.stop - row, : segment.width]
                yield here.flatten()[: segment.numel - (row - segment.first_token) * segment.width]
                row, block = row + len(here), block[len(here) :]

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """The generated values of a state dict as one float32 vector, (P,).

        Raises:
            LayoutError: If names, shapes or dtypes differ from the layout.
        """
        self.check(state)
        return torch.cat([state[spec.name].reshape(-1).float() for spec in self.generated])

    def pieces(self, flat: Tensor) -> dict[str, Tensor]:
        """The generated tensors from P values, each in its own dtype."""
        parts = flat.split([spec.numel for spec in self.generated])
        return {
            spec.name: part.view(spec.shape).to(DTYPES[spec.dtype]).clone() for spec, part in zip(self.generated, parts)
        }

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raise a LayoutError unless `state` has exactly this layout's names, shapes and dtypes, all finite.

        Shared tensors are not read: they are looked at once, where they are stored.
        """
        self.check_shapes(state)
        for spec in self.specs:
            if spec.role != "shared":
                check_finite(spec.name, state[spec.name])

    def check_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Raise a LayoutError unless `state` has exactly this layout's names, shapes and dtypes; `meta` will do."""
        known = {spec.name: spec for spec in self.specs}
        if odd := sorted(known.keys() ^ state.keys()):
            missing, extra = [n for n in odd if n in known], [n for n in odd if n not in known]
            raise LayoutError(
                "a checkpoint does not have the tensors of this layout.",
                *([f"missing: {', '.join(missing[:5])}"] if missing else []),
                *([f"unexpected: {', '.join(extra[:5])}"] if extra else []),
                "All networks of a zoo must be of one architecture.",
            )
        for name, tensor in state.items():
            spec, dtype = known[name], str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != spec.shape or dtype != spec.dtype:
                raise LayoutError(
                    f"{name} is {tuple(tensor.shape)} {dtype} but this layout needs {spec.shape} {spec.dtype}.",
                    "All networks of a zoo must be of one architecture.",
                )

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON; safetensors keeps no order, so this file does."""
        return {
            "token_dim": self.token_dim,
            "granularity": self.granularity,
            "specs": [{**vars(spec), "shape": list(spec.shape)} for spec in self.specs],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Layout":
        """Inverse of `to_json`."""
        specs = tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in value["specs"])
        return cls(specs, value["token_dim"], value["granularity"])

    def _width(self, spec: TensorSpec) -> int:
        """Values of `spec` that one token holds."""
        if self.granularity == "layer" or spec.numel <= self.token_dim:
            return self.token_dim
        inner = 1  # Values of one entry along the dimension looked at, from the last towards the first.
        for size in reversed(spec.shape):
            if inner * size > self.token_dim:
                return inner * max(k for k in _divisors(size) if inner * k <= self.token_dim)
            inner *= size
        return self.token_dim


class Rows:
    """Lays the generated tensors of one network out as tokens, one tensor after another.

    Args:
        layout: Where values lie.
        fill: What padding holds.
    """

    def __init__(self, layout: Layout, fill: float = 0.0) -> None:
        self.layout, self.fill, self.num_added = layout, fill, 0
        self.rest: Tensor | None = None  # (..., less than D), of a token that the next tensor goes on filling

    def add(self, values: Tensor) -> list[Tensor]:
        """The tokens that the next tensor completes, blocks of (..., r, D), from its values (..., numel).

        What fills whole tokens is not copied.
        """
        self.num_added += 1
        is_flat, goes_on = self.layout.granularity == "flat", self.num_added < len(self.layout.generated)
        width = self.layout.token_dim if is_flat else self.layout.segments[self.num_added - 1].width
        if self.rest is not None:
            values = torch.cat([self.rest, values], -1)
        num_whole = values.shape[-1] // width
        whole, rest = values[..., : num_whole * width], values[..., num_whole * width :]
        blocks = [whole.unflatten(-1, (num_whole, width))] if num_whole else []
        if is_flat and goes_on:
            self.rest = rest
        elif rest.shape[-1]:
            blocks.append(F.pad(rest, (0, width - rest.shape[-1]), value=self.fill)[..., None, :])
        if width == self.layout.token_dim:
            return blocks
        return [F.pad(block, (0, self.layout.token_dim - width), value=self.fill) for block in blocks]


def make_layout(
    state: Mapping[str, Tensor],
    *,
    token_dim: int,
    granularity: Granularity,
    log_variance: bool,
    shared: Collection[str] = (),
) -> Layout:
    """Decide what of a state dict is generated.

    Integer and boolean buffers and one-element tensors are constants (as in the RPG release); running variances pass
    through a logarithm if `log_variance`.

    Args:
        state: A state dict in the target's order (values unused, `meta` will do).
        token_dim: Slots D of a token.
        granularity: How tensors are cut into tokens.
        log_variance: Whether running variances are learned as logarithms.
        shared: Names of frozen tensors, the same in all networks.

    Raises:
        LayoutError: If nothing is left to generate, or a tensor is float64 or complex.
    """
    specs = []
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        role: Literal["generated", "constant", "shared"] = "generated"
        if name in shared:
            role = "shared"
        elif not tensor.is_floating_point() or tensor.numel() <= 1:
            role = "constant"
        if dtype not in DTYPES or (role == "generated" and dtype not in GENERATED_DTYPES):
            raise LayoutError(f"{name} is {dtype}, which tokens cannot hold.", "Convert the network to float32 first.")
        log = log_variance and role == "generated" and name.endswith("running_var")
        specs.append(TensorSpec(name, tuple(tensor.shape), dtype, role, "log-variance" if log else "identity"))
    layout = Layout(tuple(specs), token_dim, granularity)
    if not layout.generated:
        raise LayoutError("nothing is left to generate.", "Every tensor of these networks is constant.")
    return layout


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise a LayoutError if the tensor called `name` holds NaN or infinity."""
    # The sum of finite values may overflow, but that of others is never finite; it needs no memory.
    if tensor.is_floating_point() and not (bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())):
        raise LayoutError(f"{name} holds NaN or infinity.", "Remove that network from the zoo, or collect it again.")


def _divisors(n: int) -> Iterator[int]:
    return (k for k in range(1, n + 1) if n % k == 0)
