"""Blocks one after another, with or without residual connections: the frame that the recurrent cores share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rpgcli.config import Config


class StackConfig(Config):
    """What all stacks have."""

    recompute: bool = False
    """Compute each block again in the backward pass instead of keeping what it computed: the same result to the last
    bit, with the memory of one block instead of all."""


class Stack(nn.Module):
    """`h + block(norm(h))` for each block where `residual`, else `block(h)`, the paper's plain stack.

    Shapes: B = batch, L = num_tokens, M = d_model. The last width is `out_dim`, which is M where `residual`.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], *, d_model: int, out_dim: int, residual: bool, recompute: bool
    ) -> None:
        super().__init__()
        assert not residual or d_model == out_dim, "a residual connection needs equal widths"
        self.d_model, self.out_dim, self.recompute = d_model, out_dim, recompute
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in blocks) if residual else None

    def forward(self, h: Tensor) -> Tensor:
        """Turn position + state + condition (B, L, M) into prototypes (B, L, out_dim)."""
        for i in range(len(self.blocks)):
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(self._block, i, h, use_reentrant=False, preserve_rng_state=False)  # No block draws.
            else:
                h = self._block(i, h)
        return h

    def _block(self, i: int, h: Tensor) -> Tensor:
        out: Tensor = self.blocks[i](h if self.norms is None else self.norms[i](h))
        return out if self.norms is None else h + out
