"""Target networks: the networks whose parameters are collected, learned and generated.

A new family is one file with a `Target` and one name in `Family`.
"""

from typing import Annotated, get_args

from pydantic import Field

from rpgcli.errors import UsageError
from rpgcli.targets.base import Size, Target, prepare
from rpgcli.targets.cnn import CnnConfig
from rpgcli.targets.convnet3 import ConvNet3Config
from rpgcli.targets.mlp3 import Mlp3Config
from rpgcli.targets.rpg_cnn import RpgCnnConfig
from rpgcli.targets.timm_model import TimmConfig, import_timm, suggest, timm_names

Family = CnnConfig | ConvNet3Config | Mlp3Config | RpgCnnConfig
TargetConfig = Annotated[Family | TimmConfig, Field(discriminator="kind")]

FAMILIES: dict[str, type[Family]] = {config.model_fields["kind"].default: config for config in get_args(Family)}
"""Our own families by name; every other name is timm's."""

__all__ = [
    "FAMILIES",
    "CnnConfig",
    "ConvNet3Config",
    "Mlp3Config",
    "RpgCnnConfig",
    "Size",
    "Target",
    "TargetConfig",
    "TimmConfig",
    "parse_arch",
    "prepare",
]


def parse_arch(text: str) -> TargetConfig:
    """The target that `--arch` names: a family of ours, or timm's `resnet18`, also written `timm/resnet18`.

    Raises:
        UsageError: If there is no such architecture; names close ones.
    """
    if text in FAMILIES:
        return FAMILIES[text]()
    name = text.removeprefix("timm/")
    architecture, dot, tag = name.partition(".")
    if not import_timm().is_model(architecture) or ":" in name or "/" in name:
        raise UsageError(
            f"unknown architecture {text!r}{suggest(name, [*FAMILIES, *timm_names()])}",
            f"Known: {', '.join(FAMILIES)}, and timm's {len(timm_names())} names such as resnet18 or convnext_atto.",
        )
    if dot:
        raise UsageError(
            f"{text!r} names pretrained weights ({tag}), which are not loaded here.",
            f"Write {architecture} for the architecture.",
        )
    return TimmConfig(name=architecture)
