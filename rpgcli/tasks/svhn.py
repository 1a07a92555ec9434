"""`svhn`: 73,257 + 26,032 colour 32 x 32 images of house-number digits (Netzer et al. 2011)."""

from typing import Any, ClassVar, Literal

import torch

from rpgcli.tasks.dataset import Images
from rpgcli.tasks.torchvision_files import TorchvisionConfig


class SvhnConfig(TorchvisionConfig):
    """SVHN, cropped digits without the extra part: `--data-root` holds its two `.mat` files."""

    reader: ClassVar[str] = "SVHN"
    files: ClassVar[tuple[str, ...]] = ("train_32x32.mat", "test_32x32.mat")
    expected: ClassVar[str] = "train_32x32.mat and test_32x32.mat (ufldl.stanford.edu/housenumbers)"
    num_images: ClassVar[tuple[int, int]] = (73_257, 26_032)

    kind: Literal["svhn"] = "svhn"

    def classes(self, reader: Any) -> tuple[str, ...]:
        """The digits; the reader has already turned the files' label 10 into 0."""
        return tuple(str(digit) for digit in range(10))

    def images(self, reader: Any) -> Images:
        """The reader keeps channels first, as a view of another order."""
        pixels = torch.from_numpy(reader.data).contiguous()  # (N, 3, 32, 32)
        return Images(pixels, torch.from_numpy(reader.labels).long())
