"""The recurrent core of RPG: a stack of Mamba-2 blocks (Dao & Gu 2024).

A block's parameters have the names and shapes of `mamba_ssm.Mamba2`, so that weights move both ways.

Shapes: B = batch, L = num_tokens, M = d_model, I = d_inner = expand * width, P = headdim, H = I / P heads, G = ngroups,
N = d_state, K = d_conv. (B and C are also the paper's input and output projections of the state.)
"""

import math
from functools import partial
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from rpgcli import kernels
from rpgcli.cores.stack import Stack, StackConfig

PART = 256
"""Positions of a long sequence that are read at once where no gradients are kept: a multiple of the scan's chunks."""
WIDE = 2**14
"""Inner width from which on it is `PART`; narrower blocks read so many times more."""


class Mamba2Config(StackConfig):
    """Stacked Mamba-2 blocks."""

    kind: Literal["mamba2"] = "mamba2"
    d_model: PositiveInt = 256
    """Width M of positions, condition and (without block_widths) prototypes."""
    num_layers: PositiveInt = 2
    """Stacked blocks; the RPG release uses 2."""
    d_state: PositiveInt = 64
    """State size N per head channel; the release uses 128, for small networks 32."""
    d_conv: PositiveInt = 4
    """Positions K that the short convolution looks back over, the present one included."""
    expand: PositiveInt = 2
    """Inner width over block width."""
    headdim: PositiveInt = 64
    """Inner channels P that share one decay rate."""
    ngroups: PositiveInt = 1
    """Groups of heads with their own B and C."""
    residual: bool = True
    """Pre-norm residual connections around each block; false is the paper's plain stack."""
    block_widths: tuple[PositiveInt, ...] | None = Field(default=None, min_length=1, strict=False)
    """Width of each block, if they differ; the last is the prototypes'. The release's large core is [12288, 16384] at
    d_model 12288: a block's in-projection reads the width before it, the first one's reads d_model."""
    backend: kernels.Backend = "auto"
    """Where blocks run: CUDA kernels, their plain-torch twins, or whichever is there."""

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        if self.block_widths and self.residual:
            raise ValueError("block_widths changes the width from block to block, so it needs residual: false")
        if self.block_widths and len(self.block_widths) != self.num_layers:
            raise ValueError(f"block_widths names {len(self.block_widths)} blocks but num_layers is {self.num_layers}")
        for width in self.widths:
            self._check_width(width)
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each block."""
        return self.block_widths or (self.d_model,) * self.num_layers

    def _check_width(self, width: int) -> None:
        d_inner = self.expand * width
        sizes = f"expand * width = {self.expand} * {width} = {d_inner}"
        if d_inner % self.headdim:
            raise ValueError(f"headdim {self.headdim} does not divide {sizes}; {self._advice(d_inner)}")
        num_heads = d_inner // self.headdim
        if num_heads % self.ngroups:
            raise ValueError(f"ngroups {self.ngroups} does not divide the {num_heads} heads ({sizes} over headdim)")
        if rows := self._in_proj_rows(d_inner, self.headdim, self.d_state) % 8:
            raise ValueError(
                f"the CUDA kernels need 2*d_inner + 2*ngroups*d_state + d_inner/headdim divisible by 8, and {sizes}, "
                f"ngroups {self.ngroups}, d_state {self.d_state}, headdim {self.headdim} leave a remainder of {rows} "
                f"(also checked on a CPU, so that a trained model can move to a GPU); {self._advice(d_inner)}"
            )

    def _in_proj_rows(self, d_inner: int, headdim: int, d_state: int) -> int:
        return 2 * d_inner + 2 * self.ngroups * d_state + d_inner // headdim

    def _advice(self, d_inner: int) -> str:
        """Name the next smaller power of two that works as headdim; change d_state only if nothing else helps."""
        for d_state in (self.d_state, self.d_state + -self.d_state % 4):
            for headdim in (2**i for i in reversed(range(self.headdim.bit_length()))):
                divides = d_inner % headdim == 0 and (d_inner // headdim) % self.ngroups == 0
                if divides and self._in_proj_rows(d_inner, headdim, d_state) % 8 == 0:
                    return f"headdim: {headdim} with d_state: {d_state} works"
        return "use widths divisible by 64"

    def build(self) -> Stack:
        """Build the core with freshly drawn weights."""
        widths = self.widths
        blocks = [Mamba2Block(self, in_dim, width) for in_dim, width in zip((self.d_model, *widths), widths)]
        return Stack(blocks, d_model=self.d_model, out_dim=widths[-1], residual=self.residual, recompute=self.recompute)


class GatedRmsNorm(nn.Module):
    """The weight of `kernels.gated_rms_norm`."""

    def __init__(self, d_inner: int, num_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.ones(d_inner))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate `y` with `z` and normalise: (B, L, I)."""
        return kernels.gated_rms_norm(y, z, self.weight, self.eps, self.num_groups)


class Carried(NamedTuple):
    """What a block's next positions need of those before them."""

    past: Tensor  # (B, K - 1, I + 2GN) what the convolution looks back at
    state: Tensor  # (B, H, P, N) of the scan


class Mamba2Block(nn.Module):
    """One Mamba-2 block: (B, L, in_dim) -> (B, L, width)."""

    def __init__(self, config: Mamba2Config, in_dim: int, width: int) -> None:
        super().__init__()
        self.backend = config.backend
        self.headdim, self.ngroups, self.d_state = config.headdim, config.ngroups, config.d_state
        self.d_inner = config.expand * width
        num_heads = self.d_inner // config.headdim
        self.conv_dim = self.d_inner + 2 * config.ngroups * config.d_state

        self.in_proj = nn.Linear(in_dim, self.d_inner + self.conv_dim + num_heads, bias=False)  # z, x, B, C, dt
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, config.d_conv, groups=self.conv_dim)
        self.dt_bias = nn.Parameter(initial_dt_bias(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = GatedRmsNorm(self.d_inner, config.ngroups)
        self.out_proj = nn.Linear(self.d_inner, width, bias=False)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]  # the mark that mamba_ssm uses

    def forward(self, h: Tensor) -> Tensor:
        """Mix each position with those before it.

        Without gradients a long sequence is read in parts, each going on from the state of the one before: the same
        to rounding, with the memory of one part.
        """
        part = PART * max(1, WIDE // self.d_inner)
        if torch.is_grad_enabled() or h.shape[1] <= part:
            return self._mix(h)[0]
        out, carried = h.new_empty(*h.shape[:2], self.out_proj.out_features), self._nothing(h)
        for start in range(0, h.shape[1], part):
            here = slice(start, start + part)
            mixed, carried = self._mix(h[:, here], carried)
            out[:, here] = mixed
        return out

    def _mix(self, h: Tensor, carried: Carried | None = None) -> tuple[Tensor, Carried]:
        """Some positions (B, L, in_dim) to (B, L, width), and what those that follow need of them."""
        backend = kernels.resolve_backend(self.backend, h.device)
        state_dim, state = self.ngroups * self.d_state, h.new_empty(0)
        assert self.conv1d.bias is not None
        conv = partial(kernels.causal_conv, weight=self.conv1d.weight, bias=self.conv1d.bias, backend=backend)
        # fmt: off
        z, xBC, dt = self.in_proj(h).split([self.d_inner, self.conv_dim, len(self.D)], dim=-1)
        past       = xBC if carried is None else torch.cat([carried.past.to(xBC.dtype), xBC], 1)   # (B, .., I + 2GN)
        xBC        = conv(past)[:, -h.shape[1]:]                                                      # (B, L, I + 2GN)
        x, B, C    = xBC.split([self.d_inner, state_dim, state_dim], dim=-1)
        x          = x.unflatten(-1, (-1, self.headdim))                                              # (B, L, H, P)
        B, C       = (value.unflatten(-1, (self.ngroups, -1)) for value in (B, C))                    # (B, L, G, N)
        dt         = F.softplus(dt + self.dt_bias)                                                    # (B, L, H)
        inputs     = x, dt, -self.A_log.exp(), B, C, self.D
        if carried is None:
            y        = kernels.chunked_scan(*inputs, backend=backend)                                 # (B, L, H, P)
        else:
            y, state = kernels.scan_on(*inputs, carried.state, backend=backend)                       # (B, L, H, P)
        out: Tensor = self.out_proj(self.norm(y.flatten(-2), z))                                      # (B, L, width)
        # fmt: on
        return out, Carried(past[:, past.shape[1] - self.conv1d.kernel_size[0] + 1 :], state)

    def _nothing(self, h: Tensor) -> Carried:
        """What is carried into the first part of `h` (B, L, in_dim): zeros."""
        past = h.new_zeros(len(h), self.conv1d.kernel_size[0] - 1, self.conv_dim)
        return Carried(past, h.new_zeros(len(h), len(self.D), self.headdim, self.d_state))


def initial_dt_bias(num_heads: int, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> Tensor:
    """Draw (num_heads,) biases whose softplus is log-uniform between `dt_min` and `dt_max`."""
    log_dt = torch.empty(num_heads).uniform_(math.log(dt_min), math.log(dt_max))
    dt = log_dt.exp().clamp(min=dt_floor)
    return dt + torch.log(-torch.expm1(-dt))  # softplus^-1(dt)
