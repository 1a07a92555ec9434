"""`cifar10`: 50,000 + 10,000 colour 32 x 32 images of 10 classes (Krizhevsky 2009)."""

from typing import Any, ClassVar, Literal

import torch

from rpgcli.tasks.dataset import Images
from rpgcli.tasks.torchvision_files import TorchvisionConfig


class Cifar10Config(TorchvisionConfig):
    """CIFAR-10: `--data-root` holds the folder `cifar-10-batches-py`."""

    reader: ClassVar[str] = "CIFAR10"
    parts: ClassVar[tuple[dict[str, Any], dict[str, Any]]] = ({"train": True}, {"train": False})
    files: ClassVar[tuple[str, ...]] = ("cifar-10-batches-py",)
    expected: ClassVar[str] = (
        "the folder cifar-10-batches-py of cifar-10-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html)"
    )
    num_images: ClassVar[tuple[int, int]] = (50_000, 10_000)

    kind: Literal["cifar10"] = "cifar10"

    def classes(self, reader: Any) -> tuple[str, ...]:
        """The names in the files."""
        return tuple(reader.classes)

    def images(self, reader: Any) -> Images:
        """The reader keeps channels last."""
        pixels = torch.from_numpy(reader.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        return Images(pixels, torch.tensor(reader.targets, dtype=torch.int64))
