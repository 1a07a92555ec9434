"""How a denoiser reads its two side inputs: diffusion time and the condition."""

from torch import Tensor, nn

from rpgcli.positions import sincos

TIME_CHANNELS = 256
"""Sinusoids of t, as in both papers' releases."""


class TimeEmbedding(nn.Module):
    """Sinusoids of the diffusion step, then a two-layer MLP: (K,) -> (K, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Embed the steps `t` (K,)."""
        embedded: Tensor = self.mlp(sincos(t, TIME_CHANNELS))
        return embedded


class ConditionEmbedding(nn.Module):
    """A linear map of the condition, (K, M) -> (K, dim); zeros where there is none (M = 0)."""

    def __init__(self, condition_dim: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear = nn.Linear(condition_dim, dim) if condition_dim else None

    def forward(self, c: Tensor) -> Tensor:
        """Embed the conditions `c` (K, M)."""
        if self.linear is None:
            return c.new_zeros(len(c), self.dim)
        embedded: Tensor = self.linear(c)
        return embedded
