"""ConvNet-3 of p-diff (Tab. 2, whole networks).

The paper names its parameter counts only: 24,714 on CIFAR-10 and 70,884 on CIFAR-100. The ConvNet of the data-set
distillation literature with three blocks of width 32 has exactly these counts, so it is what is built here. The
released code trains another one under this name (7 x 7 first convolution, layer norms, images of 64 x 64, 24,262
parameters).

Shapes: N images, C channels, H x W pixels, w = width.
"""

from typing import ClassVar, Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from rpgcli.alignment import Group, units
from rpgcli.targets.base import Size, Target

NUM_BLOCKS = 3


class ConvNet3Config(Target):
    """p-diff's ConvNet-3: three blocks of convolution, instance norm, ReLU and average pooling, then a linear head."""

    batched: ClassVar[bool] = True

    kind: Literal["convnet3"] = "convnet3"
    width: PositiveInt = 32
    """Channels of every block; 32 gives the paper's parameter counts."""

    def input_size(self, size: Size) -> Size:
        """At least 8 x 8, so that three halvings leave a pixel."""
        return max(8, size[0]), max(8, size[1])

    def build(self, channels: int, size: Size, num_outputs: int) -> nn.Module:
        """The network; see `Target.build`."""
        return ConvNet3(channels, self.width, self.input_size(size), num_outputs)

    def symmetries(self, network: nn.Module) -> tuple[Group, ...]:
        """Channels, scaled by their norm's weight and bias; see `Target.symmetries`."""
        groups = []
        for i in range(NUM_BLOCKS):
            conv, norm = ([f"blocks.{i}.{k}.weight", f"blocks.{i}.{k}.bias"] for k in (0, 1))
            after, repeat = f"blocks.{i + 1}.0.weight", 1
            if i + 1 == NUM_BLOCKS:
                after = "head.weight"
                repeat = network.get_parameter(after).shape[1] // self.width
            groups.append(units(f"blocks.{i}", self.width, [*conv, *norm], [after], repeat=repeat, scaled=norm))
        return tuple(groups)


class ConvNet3(nn.Module):
    """Three blocks, each halving the map, and a linear head on what is left."""

    def __init__(self, channels: int, width: int, size: Size, num_outputs: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_block(width if i else channels, width) for i in range(NUM_BLOCKS)))
        self.head = nn.Linear(width * (size[0] >> NUM_BLOCKS) * (size[1] >> NUM_BLOCKS), num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_outputs) of normalised images (N, C, H, W)."""
        x = self.blocks(x)  # (N, w, H/8, W/8)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def _block(channels: int, width: int) -> nn.Module:
    norm = nn.GroupNorm(width, width)  # one channel a group: instance norm with weight and bias, no running statistics
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), norm, nn.ReLU(), nn.AvgPool2d(2))
