"""The core as a transformer (RPG's ablation of the core): every token sees every other, order comes from positions."""

from typing import Literal, Self

import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from rpgcli.cores.stack import Stack, StackConfig


class TransformerConfig(StackConfig):
    """Pre-norm self-attention and feed-forward layers, without dropout."""

    kind: Literal["transformer"] = "transformer"
    d_model: PositiveInt = 256
    """Width M of positions, condition and prototypes."""
    num_layers: PositiveInt = 2
    """Attention layers, each with a feed-forward layer; the RPG release uses 2."""
    num_heads: PositiveInt = 8
    """Attention heads, each d_model / num_heads wide."""
    feedforward_dim: PositiveInt = 512
    """Hidden width of the feed-forward layers; the release uses 2 d_model."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide d_model {self.d_model}; use a divisor of it")
        return self

    def build(self) -> Stack:
        """Build the core with freshly drawn weights."""
        layers: list[nn.Module] = []
        for _ in range(self.num_layers):
            layers += [SelfAttention(self.d_model, self.num_heads), feed_forward(self.d_model, self.feedforward_dim)]
        return Stack(layers, d_model=self.d_model, out_dim=self.d_model, residual=True, recompute=self.recompute)


def feed_forward(d_model: int, hidden_dim: int) -> nn.Sequential:
    """Two linear maps with a SiLU between them."""
    return nn.Sequential(nn.Linear(d_model, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, d_model))


class SelfAttention(nn.Module):
    """Scaled dot-product attention over all L positions: (B, L, M) -> (B, L, M)."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, h: Tensor) -> Tensor:
        """Mix the positions."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, width)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed
