"""Any image classifier of timm, adapted to the data set's channels, size and classes.

Only the architecture comes from here: nothing is downloaded, and pretrained weights are not loaded.
"""

import difflib
import re
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rpgcli.errors import DataError, RecipeError
from rpgcli.targets.base import Size, Target
from rpgcli.targets.torchvision_shim import import_torchvision

STRIDE = 32  # most networks halve the map five times


class TimmConfig(Target):
    """`timm/<name>`: an architecture of timm with fresh parameters."""

    batched: ClassVar[bool] = False

    kind: Literal["timm"] = "timm"
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """timm's name of the architecture, without the tag of pretrained weights: `resnet18`, `vit_tiny_patch16_224`."""
    image_size: int | None = Field(default=None, ge=STRIDE)
    """Side in pixels that images are resized to; by default their own, rounded up to what the network can divide."""

    def input_size(self, size: Size) -> Size:
        """`image_size`, or each side rounded up to a multiple of 32 (of the patch, where 32 is no multiple of it)."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        patch = re.search(r"(?:patch|_p)(\d+)", self.name)
        step = STRIDE if patch is None or STRIDE % int(patch[1]) == 0 else int(patch[1])
        least = -(-STRIDE // step)
        return max(least, -(-size[0] // step)) * step, max(least, -(-size[1] // step)) * step

    def build(self, channels: int, size: Size, num_outputs: int) -> nn.Module:
        """The network; see `Target.build`.

        Raises:
            RecipeError: If timm does not know the name, or the network cannot take such images.
        """
        timm = import_timm()
        if not timm.is_model(self.name):
            raise RecipeError(f"timm knows no model {self.name!r}{suggest(self.name, timm_names())}")
        input_size = self.input_size(size)
        official = timm.models.get_pretrained_cfg(self.name)
        fixed = official is not None and official.fixed_input_size and input_size != tuple(official.input_size[1:])
        arguments = {"img_size": input_size} if fixed else {}
        try:
            model: nn.Module = timm.create_model(
                self.name, pretrained=False, in_chans=channels, num_classes=num_outputs, **arguments
            )
            _check_forward(model, channels, input_size, num_outputs)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AssertionError,
            IndexError,
            ZeroDivisionError,
            AttributeError,
        ) as error:
            wants = "" if official is None else f" It was made for {official.input_size[1]}x{official.input_size[2]}."
            raise RecipeError(
                f"timm/{self.name} cannot take images of {channels}x{input_size[0]}x{input_size[1]} values.",
                f"timm says: {error}",
                f"Set target.image_size to a size that it can take, or choose another architecture.{wants}",
            ) from error
        return model

    def published(self, channels: int, size: Size, num_outputs: int) -> dict[str, Tensor]:
        """timm's published weights, adapted by timm to these channels; the head stays fresh. May fetch them."""
        timm = import_timm()
        official = timm.models.get_pretrained_cfg(self.name)
        fixed = {"img_size": self.input_size(size)} if official is not None and official.fixed_input_size else {}
        try:
            model = timm.create_model(self.name, pretrained=True, in_chans=channels, num_classes=num_outputs, **fixed)
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(
                f"the published weights of timm/{self.name} could not be had: {error}",
                "Check the network, or give collect.pretrained the path of a weights file.",
            ) from None
        weights: dict[str, Tensor] = model.state_dict()
        return weights


def _check_forward(model: nn.Module, channels: int, size: Size, num_outputs: int) -> None:
    """Run one blank image through a network: many models are built at any size and fail only here."""
    device = next(model.parameters()).device
    training = model.training
    with torch.no_grad():
        shape = tuple(model.eval()(torch.zeros(1, channels, *size, device=device)).shape)
    model.train(training)
    if shape != (1, num_outputs):
        raise ValueError(f"it gives outputs of shape {shape} instead of {(1, num_outputs)}")


@cache
def import_timm() -> Any:
    """Import timm (seconds), after the torchvision that it needs."""
    import_torchvision()
    import timm

    return timm


def timm_names() -> list[str]:
    """Names of all architectures that timm can build."""
    names: list[str] = import_timm().list_models()
    return names


def suggest(name: str, known: list[str]) -> str:
    """Up to three known names close to `name`; timm knows too many to list them all."""
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(k) for k in close)}?" if close else ""
