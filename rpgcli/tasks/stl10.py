"""`stl10`: 5,000 + 8,000 colour 96 x 96 images of 10 classes (Coates et al. 2011); its unlabelled part is not used."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt

from rpgcli.tasks.dataset import Images
from rpgcli.tasks.torchvision_files import TorchvisionConfig


class Stl10Config(TorchvisionConfig):
    """STL-10: `--data-root` holds the folder `stl10_binary`."""

    reader: ClassVar[str] = "STL10"
    files: ClassVar[tuple[str, ...]] = ("stl10_binary",)
    expected: ClassVar[str] = "the folder stl10_binary of stl10_binary.tar.gz (ai.stanford.edu/~acoates/stl10)"
    num_images: ClassVar[tuple[int, int]] = (5000, 8000)
    shape: ClassVar[tuple[int, int, int]] = (3, 96, 96)

    kind: Literal["stl10"] = "stl10"
    num_validation: PositiveInt = 500
    """Images of the official training part, which has only 5,000, that are kept for validation."""

    def classes(self, reader: Any) -> tuple[str, ...]:
        """The published names; the file that repeats them carries no checksum."""
        return ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

    def images(self, reader: Any) -> Images:
        """The reader keeps channels first, as a view of another order."""
        pixels = torch.from_numpy(reader.data).contiguous()  # (N, 3, 96, 96)
        return Images(pixels, torch.from_numpy(reader.labels).long())
