"""Any image classifier of timm, adapted to the data set's channels, size and classes.

Only the architecture comes from here: nothing is downloaded, and pretrained weights are not loaded.
"""

import difflib
import re
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rpgcli.alignment import Axis, Group, fits, places, units
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

    def symmetries(self, network: nn.Module) -> tuple[Group, ...]:
        """Of ResNets and vision transformers without extras; see `Target.symmetries`."""
        models = import_timm().models
        families = {models.ResNet: _resnet_groups, models.VisionTransformer: _vit_groups}
        if type(network) not in families:
            return ()
        groups = families[type(network)](network)
        state = network.state_dict()
        covered = {axis.name for group in groups for axis in group.axes} | {"fc.bias", "head.bias"}
        extras = {name for name in state if name not in covered and not name.endswith("num_batches_tracked")}
        return tuple(groups) if fits(groups, state) and not extras else ()

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


# --- symmetries -------------------------------------------------------------------------------------------------------

VIT_ROWS = re.compile(
    r"patch_embed\.proj\.(weight|bias)|(norm_pre|norm|fc_norm)\.(weight|bias)"
    r"|blocks\.\d+\.((norm[12]|attn\.proj|mlp\.fc2)\.(weight|bias)|ls[12]\.gamma)"
)
"""Tensors of a vision transformer with a row for each channel of the residual stream."""
VIT_COLUMNS = re.compile(r"(blocks\.\d+\.(attn\.qkv|mlp\.fc1)|head)\.weight")
"""Those with a column for each."""
VIT_TOKENS = re.compile(r"cls_token|reg_token|pos_embed")
"""Those of shape (1, tokens, channels)."""


def _resnet_groups(network: Any) -> list[Group]:
    """Channels of a ResNet of basic or bottleneck blocks.

    Everything that is added up shares one order, a stream, up to the next shortcut with a convolution. The channels
    between the convolutions of a block are free, and scaled by their batch norm where ReLU follows.
    """
    sizes = {name: len(value) for name, value in network.state_dict().items() if value.dim()}

    def convolution(conv: str, norm: str) -> list[str]:
        return [f"{conv}.weight", *(f"{norm}.{k}" for k in ("weight", "bias", "running_mean", "running_var"))]

    streams, inner = [], []
    name, entering, leaving = "conv1", convolution("conv1", "bn1"), []
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for i, block in enumerate(getattr(network, stage)):
            at = f"{stage}.{i}"
            numbers = [n for n in (1, 2, 3) if f"{at}.conv{n}.weight" in sizes]
            for n, after in pairwise(numbers):
                own = convolution(f"{at}.conv{n}", f"{at}.bn{n}")
                scaled = own[1:3] if type(getattr(block, f"act{n}")) is nn.ReLU else ()
                inner.append(units(f"{at}.conv{n}", sizes[own[0]], own, [f"{at}.conv{after}.weight"], scaled=scaled))
            leaving.append(f"{at}.conv1.weight")
            if block.downsample is not None:
                leaving.append(f"{at}.downsample.0.weight")
                streams.append(units(name, sizes.get(entering[0], 0), entering, leaving))
                name, entering, leaving = at, convolution(f"{at}.downsample.0", f"{at}.downsample.1"), []
            entering += convolution(f"{at}.conv{numbers[-1]}", f"{at}.bn{numbers[-1]}")
    return [*streams, units(name, sizes.get(entering[0], 0), entering, [*leaving, "fc.weight"]), *inner]


def _vit_groups(network: Any) -> list[Group]:
    """Channels of a vision transformer's residual stream, its attention heads, and the hidden units of its MLPs."""
    state = network.state_dict()
    one = places(network.embed_dim)
    dims = {
        name: dim
        for dim, rule in enumerate((VIT_ROWS, VIT_COLUMNS, VIT_TOKENS))
        for name in state
        if rule.fullmatch(name)
    }
    groups = [Group("stream", (tuple(Axis(name, dim, one) for name, dim in dims.items()),))]
    for i, block in enumerate(network.blocks):
        attention, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        if f"{attention}.proj.weight" not in state or f"{mlp}.fc2.weight" not in state:
            return []
        n, hidden = (state[f"{layer}.weight"].shape[1] for layer in (f"{attention}.proj", f"{mlp}.fc2"))
        qkv = [name for name in (f"{attention}.qkv.weight", f"{attention}.qkv.bias") if name in state]
        query_key = torch.cat([places(n), places(n, start=n)], 1)  # (n, 2)
        tracks = (
            tuple(Axis(name, 0, query_key) for name in qkv),
            (*(Axis(name, 0, places(n, start=2 * n)) for name in qkv), Axis(f"{attention}.proj.weight", 1, places(n))),
        )
        groups.append(Group(attention, tracks, block.attn.num_heads))
        groups.append(units(mlp, hidden, [f"{mlp}.fc1.weight", f"{mlp}.fc1.bias"], [f"{mlp}.fc2.weight"]))
    return groups


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
