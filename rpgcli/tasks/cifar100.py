"""`cifar100`: 50,000 + 10,000 colour 32 x 32 images of 100 classes (Krizhevsky 2009)."""

from typing import Any, ClassVar, Literal

import torch

from rpgcli.tasks.dataset import Images
from rpgcli.tasks.torchvision_files import TorchvisionConfig


class Cifar100Config(TorchvisionConfig):
    """CIFAR-100: `--data-root` holds the folder `cifar-100-python`."""

    reader: ClassVar[str] = "CIFAR100"
    parts: ClassVar[tuple[dict[str, Any], dict[str, Any]]] = ({"train": True}, {"train": False})
    files: ClassVar[tuple[str, ...]] = ("cifar-100-python",)
    expected: ClassVar[str] = (
        "the folder cifar-100-python of cifar-100-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html)"
    )
    num_images: ClassVar[tuple[int, int]] = (50_000, 10_000)
    num_classes: ClassVar[int] = 100

    kind: Literal["cifar100"] = "cifar100"

    def classes(self, reader: Any) -> tuple[str, ...]:
        """The names in the files."""
        return tuple(reader.classes)

    def images(self, reader: Any) -> Images:
        """The reader keeps channels last."""
        pixels = torch.from_numpy(reader.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        return Images(pixels, torch.tensor(reader.targets, dtype=torch.int64))
