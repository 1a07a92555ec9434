"""The default denoiser: a residual MLP over a whole token, modulated by time and condition (adaLN-zero, DiT §3.2).

The condition also enters with the token itself: on the digits task zoo that reaches, after 300 steps, the accuracy on
validation tasks that modulation alone reaches after 450. A training step there takes an eighth of the time of the
papers' convolutional denoiser.

Shapes: K tokens in the batch, D = token_dim, M = width of the condition, W = hidden width.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from rpgcli.config import Config
from rpgcli.denoisers.embedding import ConditionEmbedding, TimeEmbedding


class MlpDenoiserConfig(Config):
    """Residual MLP with adaptive layer norm."""

    kind: Literal["mlp"] = "mlp"
    width: PositiveInt = 256
    """Hidden width W; also that of the embedded time and condition."""
    depth: NonNegativeInt = 3
    """Residual blocks of two linear maps."""

    def build(self, token_dim: int, condition_dim: int) -> "MlpDenoiser":
        """Build the denoiser with freshly drawn weights; it outputs zeros until trained."""
        return MlpDenoiser(token_dim, condition_dim, self.width, self.depth)


class MlpDenoiser(nn.Module):
    """`forward(x_t, t, embed(c))`: what the diffusion's target is, for each token by itself."""

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.condition = ConditionEmbedding(condition_dim, width)
        self.input = nn.Linear(token_dim, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.modulation = zero_linear(width, 2 * width)
        self.output = zero_linear(width, token_dim)

    def embed(self, c: Tensor) -> Tensor:
        """Embed the condition once for all diffusion steps: (K, M) -> (K, W)."""
        embedded: Tensor = self.condition(c)
        return embedded

    def forward(self, x_t: Tensor, t: Tensor, e: Tensor) -> Tensor:
        """Denoise tokens (K, D) at steps (K,) under the embedded condition (K, W)."""
        # fmt: off
        y = F.silu(self.time(t) + e)                                                     # (K, W)
        h = self.input(x_t) + e                                                          # (K, W)
        for block in self.blocks:
            h = block(h, y)                                                              # (K, W)
        out: Tensor = self.output(modulate(h, *self.modulation(y).chunk(2, dim=-1)))     # (K, D)
        # fmt: on
        return out


class Block(nn.Module):
    """A residual MLP behind a modulated layer norm and a gate, both zero at first: the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = zero_linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """Update `h` (K, W) under the time and condition `y` (K, W)."""
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)
        updated: Tensor = h + gate * self.mlp(modulate(h, shift, scale))
        return updated


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm whose scale and shift come from outside (adaLN)."""
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


def zero_linear(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear map that starts at zero."""
    linear = nn.Linear(in_dim, out_dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
