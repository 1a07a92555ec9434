"""Denoisers: `e = denoiser.embed(c)` once per condition, then `denoiser(x_t, t, e)` at every diffusion step.

(K, M) -> e, and (K, D), (K,), e -> (K, D), one row per token; M = 0 means unconditional.
A new denoiser is one file here and one entry of the union.
"""

from typing import Annotated

from pydantic import Field

from rpgcli.denoisers.conv import ConvDenoiserConfig
from rpgcli.denoisers.mlp import MlpDenoiserConfig

DenoiserConfig = Annotated[MlpDenoiserConfig | ConvDenoiserConfig, Field(discriminator="kind")]
