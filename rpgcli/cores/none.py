"""No core at all: the denoiser sees position, state and condition as they are (ablation: no relation among tokens)."""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from rpgcli.config import Config


class NoCoreConfig(Config):
    """Prototypes are the sum of position, state and condition."""

    kind: Literal["none"] = "none"
    d_model: PositiveInt = 256
    """Width M of positions, condition and prototypes."""

    def build(self) -> "NoCore":
        """Build the core, which has no weights."""
        return NoCore(self.d_model)


class NoCore(nn.Module):
    """The identity: (B, L, M) -> (B, L, M)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = self.out_dim = d_model

    def forward(self, h: Tensor) -> Tensor:
        """Return `h`."""
        return h
