"""The papers' denoiser: a token is a signal of D samples, read by 1-D convolutions with additive skips.

Every layer sees `(x + condition) * time` (RPG) or `x + condition + time` (p-diff). Convolutions mix neighbours, so
padded slots of `x_t` must hold zeros at every step.

Shapes: K tokens in the batch, D = token_dim, M = width of the condition.
"""

import math
from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from rpgcli.config import Config
from rpgcli.denoisers.embedding import ConditionEmbedding, TimeEmbedding

Norm = Literal["batch", "group", "instance", "none"]


class ConvDenoiserConfig(Config):
    """1-D convolutional encoder and decoder of constant length."""

    kind: Literal["conv"] = "conv"
    channels: tuple[PositiveInt, ...] = Field(default=(1, 32, 64, 128, 64, 32, 1), min_length=3, strict=False)
    """Channels before, between and after the convolutions: a palindrome of odd length that starts with 1."""
    kernel_size: PositiveInt = 7
    """Taps of each convolution; odd."""
    norm: Norm = "batch"
    """After each convolution but the last. The papers' batch norm mixes tokens at different times; p-diff's ablation
    ranks group norm ahead of it."""
    time: Literal["multiply", "add"] = "multiply"
    """How time enters each layer: RPG multiplies, p-diff adds."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.channels != self.channels[::-1] or len(self.channels) % 2 == 0 or self.channels[0] != 1:
            raise ValueError(
                f"channels {list(self.channels)} must mirror, e.g. [1, 32, 64, 32, 1]: skips add equal widths"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size {self.kernel_size} must be odd, e.g. {self.kernel_size + 1}, to keep the length"
            )
        return self

    def build(self, token_dim: int, condition_dim: int) -> "ConvDenoiser":
        """Build the denoiser with freshly drawn weights."""
        return ConvDenoiser(self, token_dim, condition_dim)


class ConvDenoiser(nn.Module):
    """`forward(x_t, t, embed(c))`: what the diffusion's target is, for each token by itself."""

    def __init__(self, config: ConvDenoiserConfig, token_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.multiply = config.time == "multiply"
        self.time = TimeEmbedding(token_dim)
        self.condition = ConditionEmbedding(condition_dim, token_dim)
        *hidden, last = pairwise(config.channels)
        self.layers = nn.ModuleList(conv_layer(*pair, config.kernel_size, config.norm) for pair in hidden)
        self.layers.append(nn.Conv1d(*last, config.kernel_size, padding="same"))
        self.num_skips = len(config.channels) // 2 - 1

    def embed(self, c: Tensor) -> Tensor:
        """Embed the condition once for all diffusion steps: (K, M) -> (K, D)."""
        embedded: Tensor = self.condition(c)
        return embedded

    def forward(self, x_t: Tensor, t: Tensor, e: Tensor) -> Tensor:
        """Denoise tokens (K, D) at steps (K,) under the embedded condition (K, D)."""
        # fmt: off
        c, t = e[:, None], self.time(t)[:, None]                              # (K, 1, D)
        outputs: list[Tensor] = []
        x = x_t[:, None]                                                      # (K, 1, D)
        for i, layer in enumerate(self.layers):
            if i >= len(self.layers) - self.num_skips:                        # decoder: add the encoder's mirror image
                x = x + outputs[len(self.layers) - 1 - i]
            x = layer((x + c) * t if self.multiply else x + c + t)            # (K, channels, D)
            outputs.append(x)
        # fmt: on
        return x[:, 0]


def conv_layer(in_channels: int, out_channels: int, kernel_size: int, norm: Norm) -> nn.Sequential:
    """Convolution, norm, ELU; the length stays."""
    norms: dict[Norm, nn.Module] = {
        "batch": nn.BatchNorm1d(out_channels),
        "group": nn.GroupNorm(math.gcd(8, out_channels), out_channels),
        "instance": nn.GroupNorm(out_channels, out_channels),
        "none": nn.Identity(),
    }
    conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding="same")
    return nn.Sequential(conv, norms[norm], nn.ELU())
