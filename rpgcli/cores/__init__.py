"""Recurrent cores: `core(h) -> prototypes`, (B, L, core.d_model) -> (B, L, core.out_dim).

They read position + permutation state + condition, never parameter tokens, so one pass serves every diffusion step and
every sample of a condition. A new core is one file here and one entry of the union.
"""

from typing import Annotated

from pydantic import Field

from rpgcli.cores.lstm import LstmConfig
from rpgcli.cores.mamba2 import Mamba2Config
from rpgcli.cores.none import NoCoreConfig
from rpgcli.cores.transformer import TransformerConfig

CoreConfig = Annotated[Mamba2Config | LstmConfig | TransformerConfig | NoCoreConfig, Field(discriminator="kind")]
