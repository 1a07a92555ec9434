"""What every family of target networks offers: `input_size`, `build`, and whether many can be trained at once.

Shapes: N images, C channels, H x W pixels.
"""

from abc import abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from rpgcli.alignment import Group
from rpgcli.config import Config

Size = tuple[int, int]
"""Height and width of an image in pixels."""


class Target(Config):
    """A family of networks whose parameters are generated; each member adds a `kind`."""

    batched: ClassVar[bool]
    """Small and free of buffers, so that `torch.func` can train many at once."""

    def input_size(self, size: Size) -> Size:
        """The size that images of `size` are resized to before the network; applying it twice changes nothing."""
        return size

    @abstractmethod
    def build(self, channels: int, size: Size, num_outputs: int) -> nn.Module:
        """A new network, from images (N, channels, *input_size(size)) to logits (N, num_outputs).

        Its initial parameters come from the global generator: call this inside `rng.initialising`.
        """

    def symmetries(self, network: nn.Module) -> tuple[Group, ...]:
        """Hidden units that can be exchanged without changing what `network` computes, from input to output.

        Args:
            network: As built by this target; `meta` will do. Where no symmetry is known there are no groups.
        """
        return ()


def prepare(x: Tensor, input_size: Size) -> Tensor:
    """Resize normalised images (N, C, h, w) to (N, C, *input_size), bilinear with antialiasing, if they do not fit."""
    if tuple(x.shape[-2:]) == input_size:
        return x
    return F.interpolate(x, size=input_size, mode="bilinear", align_corners=False, antialias=True)
