"""A small convolutional network: 5,178 parameters for grey 8 x 8 images and two outputs.

Shapes: N images, C channels, H x W pixels, w = width.
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from rpgcli.alignment import Group, units
from rpgcli.targets.base import Size, Target

POOLED = 2  # the last feature map is averaged to 2 x 2, so the number of parameters does not depend on the images' size


class CnnConfig(Target):
    """Three 3 x 3 convolutions and two linear layers, about 5 thousand parameters at any image size."""

    batched: ClassVar[bool] = True

    kind: Literal["cnn"] = "cnn"
    width: PositiveInt = 8
    """Channels of the first convolution; the other two have twice as many."""
    hidden: PositiveInt = 24
    """Units of the hidden linear layer."""

    def input_size(self, size: Size) -> Size:
        """At least 8 x 8, the smallest size whose last feature map is 2 x 2."""
        return max(8, size[0]), max(8, size[1])

    def build(self, channels: int, size: Size, num_outputs: int) -> nn.Module:
        """The network; see `Target.build`."""
        return Cnn(channels, self.width, self.hidden, num_outputs)

    def symmetries(self, network: nn.Module) -> tuple[Group, ...]:
        """Channels and hidden units, all behind ReLU; see `Target.symmetries`."""
        w = self.width
        chain = [
            ("c1", "c2", w, 1),
            ("c2", "c3", 2 * w, 1),
            ("c3", "fc", 2 * w, POOLED**2),
            ("fc", "head", self.hidden, 1),
        ]
        return tuple(
            units(layer, n, own := [f"{layer}.weight", f"{layer}.bias"], [f"{after}.weight"], repeat=repeat, scaled=own)
            for layer, after, n, repeat in chain
        )


class Cnn(nn.Module):
    """Convolutions of stride 1, 2, 2, an average over quarters of the map, a hidden layer, a head."""

    def __init__(self, channels: int, width: int, hidden: int, num_outputs: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(channels, width, 3, padding=1)
        self.c2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.c3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2)
        self.fc = nn.Linear(2 * width * POOLED * POOLED, hidden)
        self.head = nn.Linear(hidden, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_outputs) of normalised images (N, C, H, W)."""
        x = F.relu(self.c1(x))  # (N, w, H, W)
        x = F.relu(self.c2(x))  # (N, 2w, H/2, W/2)
        x = F.relu(self.c3(x))  # (N, 2w, H/4, W/4)
        x = _average_quarters(x).flatten(1)  # (N, 8w)
        return self.head(F.relu(self.fc(x)))  # type: ignore[no-any-return]


def _average_quarters(x: Tensor) -> Tensor:
    """Average a map (N, C, h, w) to (N, C, 2, 2); odd sides share their middle row or column."""
    h, w = x.shape[-2:]
    if (h, w) == (POOLED, POOLED):
        return x
    stride = (h // POOLED, w // POOLED)
    return F.avg_pool2d(x, kernel_size=(h - stride[0], w - stride[1]), stride=stride)
