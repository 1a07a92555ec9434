"""The recurrent core as an LSTM (RPG's ablation of the core)."""

from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from rpgcli.cores.stack import Stack, StackConfig


class LstmConfig(StackConfig):
    """Stacked one-directional LSTM layers."""

    kind: Literal["lstm"] = "lstm"
    d_model: PositiveInt = 256
    """Width M of positions, condition, hidden state and prototypes."""
    num_layers: PositiveInt = 2
    """Stacked layers; the RPG release uses 2."""
    residual: bool = False
    """Pre-norm residual connections around each layer; the release has none."""

    def build(self) -> Stack:
        """Build the core with freshly drawn weights."""
        layers = [LstmLayer(self.d_model) for _ in range(self.num_layers)]
        return Stack(
            layers, d_model=self.d_model, out_dim=self.d_model, residual=self.residual, recompute=self.recompute
        )


class LstmLayer(nn.Module):
    """One LSTM layer as a map of sequences: (B, L, M) -> (B, L, M)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_model, d_model, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        """Return the hidden state at every position; float32 also under autocast: not every CPU has another LSTM."""
        with nullcontext() if h.is_meta else torch.autocast(h.device.type, enabled=False):
            states: Tensor = self.lstm(h.float())[0]
        return states
