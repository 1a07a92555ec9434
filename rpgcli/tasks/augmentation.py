"""Random changes of training images: shifts and mirror images.

Shapes: N images, C channels, H x W pixels.
"""

from typing import Literal

import torch
from torch import Tensor

PADDING_FRACTION = 8  # an image of 32 pixels is padded by the usual 4, one of 8 by 1


def augment(x: Tensor, generator: torch.Generator, kind: Literal["none", "crop", "crop-flip"] = "crop-flip") -> Tensor:
    """Crop each image at random from itself padded on all sides, and mirror every second one with `crop-flip`.

    The padding is an eighth of the image and repeats its border, so pixels and normalised images may both be given.

    Args:
        x: (N, C, H, W), any dtype and device.
        generator: CPU generator of the shifts and flips; not used with `none`.
        kind: Which changes are made.

    Returns:
        Images of the same shape, dtype and device.
    """
    if kind == "none":
        return x
    n, _, h, w = x.shape
    rows = torch.arange(h) + _shifts(n, h // PADDING_FRACTION, generator)  # (N, H)
    columns = torch.arange(w) + _shifts(n, w // PADDING_FRACTION, generator)  # (N, W)
    if kind == "crop-flip":
        flip = torch.randint(2, (n, 1), generator=generator).bool()  # (N, 1)
        columns = torch.where(flip, w - 1 - columns, columns)
    rows, columns = rows.clamp(0, h - 1).to(x.device), columns.clamp(0, w - 1).to(x.device)
    images = torch.arange(n, device=x.device)[:, None, None]
    return x[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()  # (N, C, H, W)


def _shifts(n: int, padding: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-padding, padding + 1, (n, 1), generator=generator)
