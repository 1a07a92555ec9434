"""Blocks one after another, with or without residual connections: the frame that the recurrent cores share."""

from collections.abc import Sequence

from torch import Tensor, nn


class Stack(nn.Module):
    """`h + block(norm(h))` for each block where `residual`, else `block(h)`, the paper's plain stack.

    Shapes: B = batch, L = num_tokens, M = d_model. The last width is `out_dim`, which is M where `residual`.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, d_model: int, out_dim: int, residual: bool) -> None:
        super().__init__()
        assert not residual or d_model == out_dim, "a residual connection needs equal widths"
        self.d_model, self.out_dim = d_model, out_dim
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in blocks) if residual else None

    def forward(self, h: Tensor) -> Tensor:
        """Turn position + state + condition (B, L, M) into prototypes (B, L, out_dim)."""
        if self.norms is None:
            for block in self.blocks:
                h = block(h)
            return h
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(norm(h))
        return h
