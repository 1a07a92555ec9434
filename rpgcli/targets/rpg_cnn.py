"""The two CNNs that RPG compares itself with p-diff on: 2,864 and 10,853 parameters for CIFAR-10.

Layers and names are those of the released code (dataset/cifar10_cnnsmall and cifar10_cnnmedium), so that its
checkpoints can be taken in.

Shapes: N images, C channels, H x W pixels.
"""

from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from rpgcli.alignment import Group, units
from rpgcli.targets.base import Size, Target

HIDDEN = 20
"""Units of the hidden linear layer."""


class Shape(NamedTuple):
    """What tells the variants apart."""

    side: int
    """Pixels of an image."""
    widths: tuple[int, int, int]
    """Channels after each convolution."""
    kernels: tuple[int, int, int]
    num_pools: int
    """Convolutions, from the first, that a pooling by 2 follows."""
    map_side: int
    """Pixels of the last feature map."""


SHAPES = {
    "small": Shape(28, (8, 6, 4), (5, 5, 2), 2, 3),
    "medium": Shape(32, (16, 32, 15), (3, 3, 3), 3, 2),
}


class RpgCnnConfig(Target):
    """RPG's CNN for the comparison with p-diff, small or medium."""

    batched: ClassVar[bool] = True

    kind: Literal["rpg-cnn"] = "rpg-cnn"
    variant: Literal["small", "medium"] = "small"
    """2,864 or 10,853 parameters for three channels and ten outputs."""

    def input_size(self, size: Size) -> Size:
        """28 x 28 for `small`, 32 x 32 for `medium`, whatever the data set's."""
        side = SHAPES[self.variant].side
        return side, side

    def build(self, channels: int, size: Size, num_outputs: int) -> nn.Module:
        """The network; see `Target.build`."""
        return RpgCnn(SHAPES[self.variant], channels, num_outputs)

    def symmetries(self, network: nn.Module) -> tuple[Group, ...]:
        """Channels and hidden units, all behind leaky ReLU, which scales as ReLU does; see `Target.symmetries`."""
        shape = SHAPES[self.variant]
        layers = [name.removesuffix(".weight") for name, value in network.named_parameters() if value.dim() > 1]
        widths, repeats = (*shape.widths, HIDDEN), (1, 1, shape.map_side**2, 1)
        return tuple(
            units(layer, n, own := [f"{layer}.weight", f"{layer}.bias"], [f"{after}.weight"], repeat=repeat, scaled=own)
            for (layer, after), n, repeat in zip(pairwise(layers), widths, repeats, strict=True)
        )


class RpgCnn(nn.Module):
    """Three convolutions without padding, a hidden layer, a head."""

    def __init__(self, shape: Shape, channels: int, num_outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(pairwise((channels, *shape.widths))):
            layers.append(nn.Conv2d(in_dim, out_dim, shape.kernels[i]))
            layers += [nn.MaxPool2d(2)] * (i < shape.num_pools) + [nn.LeakyReLU()]
        self.module = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Sequential(
            nn.Linear(shape.widths[-1] * shape.map_side**2, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, num_outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_outputs) of normalised images (N, C, side, side)."""
        return self.head(self.module(x))  # type: ignore[no-any-return]
