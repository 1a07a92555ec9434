"""What every data set offers: images of three fixed splits, and how pixels become network inputs.

Shapes: N images, C channels, H x W pixels.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from rpgcli import rng
from rpgcli.config import Config
from rpgcli.errors import DataError


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images of one split."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64, index into the data set's classes

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Images":
        """The images at `index`, in its order."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, split for good: networks train on `train`, choices use `validation`, figures use `test`."""

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    scale: float = 127.5
    shift: float = 1.0

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Channels of every image: 1 or 3."""
        return self.train.pixels.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image in pixels."""
        return self.train.pixels.shape[2], self.train.pixels.shape[3]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Network inputs of pixels (..., C, H, W) uint8: float32 `pixels / scale - shift`, within [-1, 1]."""
        return pixels.float() / self.scale - self.shift


class BaseDatasetConfig(Config):
    """What all data sets share."""

    kind: str
    """Name of the data set."""
    split_seed: NonNegativeInt = 0
    """Seed of the split into training, validation and test images."""
    augment: Literal["none", "crop", "crop-flip"] = "none"
    """Random changes of training images, never of others: shifts, or shifts and mirror images."""

    @abstractmethod
    def where(self, data_root: Path | None) -> Path | None:
        """The folder that holds the files, or None where they were not found (or none are needed)."""

    @abstractmethod
    def load(self, data_root: Path | None, download: bool) -> Dataset:
        """Read the data set from `data_root` and split it; the same split wherever it runs.

        Raises:
            DataError: If the files are missing, corrupt, or something else.
        """

    def outline(self, data_root: Path | None) -> Dataset:
        """What `load` would give, for a plan: where the numbers are known before, images on `meta` and labels all 0.

        Raises:
            DataError: If they are not known and the files are missing.
        """
        return self.load(data_root, False)


class OfficialSplitConfig(BaseDatasetConfig):
    """A data set with an official test part; validation images are drawn from its official training part."""

    num_validation: PositiveInt = 5000
    """Images of the official training part that are kept for validation."""
    max_train: PositiveInt | None = None
    """Use only so many training images, drawn by `split_seed`."""
    max_test: PositiveInt | None = None
    """Use only so many test images, drawn by `split_seed`."""

    def split(self, name: str, classes: tuple[str, ...], train: Images, test: Images) -> Dataset:
        """Draw validation, training and test images from the official parts, each without replacement."""
        if len(train) <= self.num_validation:
            raise DataError(
                f"{name} has {len(train)} training images, so {self.num_validation} for validation leave none.",
                f"Set dataset.num_validation below {len(train)}.",
            )
        order = torch.randperm(len(train), generator=rng.stream(self.split_seed, "split", name, "train"))
        validation, rest = order[: self.num_validation], order[self.num_validation :]
        order = torch.randperm(len(test), generator=rng.stream(self.split_seed, "split", name, "test"))
        return Dataset(
            name=name,
            classes=classes,
            train=train.take(rest[: self.max_train]),
            validation=train.take(validation),
            test=test.take(order[: self.max_test]),
        )


def blank(num_images: int, channels: int, height: int, width: int) -> Images:
    """Images without memory."""
    pixels = torch.empty(num_images, channels, height, width, dtype=torch.uint8, device="meta")
    return Images(pixels, torch.zeros(num_images, dtype=torch.int64))


def missing(name: str, folders: Iterable[Path], expected: str, *advice: str) -> DataError:
    """The error for a data set that is not where it was looked for: where, what was expected, what lies there."""
    looked = [f"{folder} ({contents(folder)})" for folder in folders]
    return DataError(
        f"{name} was not found.", *(f"Looked in {place}." for place in looked), f"Expected: {expected}.", *advice
    )


def check_images(images: Images, name: str, num_classes: int, source: Path) -> Images:
    """Check what a reader returned: some images, as many labels, each of a known class."""
    if len(images.pixels) != len(images.labels):
        raise DataError(
            f"{source} holds {len(images.pixels)} images of {name} but {len(images.labels)} labels.",
            "The files do not belong together: fetch them again.",
        )
    if len(images) == 0 or images.pixels.numel() == 0:
        raise DataError(f"{source} holds no images of {name}.", "Fetch the files again.")
    if int(images.labels.min()) < 0 or int(images.labels.max()) >= num_classes:
        raise DataError(
            f"{source} holds labels from {int(images.labels.min())} to {int(images.labels.max())}.",
            f"Expected: 0 to {num_classes - 1}, the classes of {name}. Do they belong to another data set?",
        )
    return images


def contents(folder: Path) -> str:
    """What lies in a folder, in a few words for a message."""
    if not folder.exists():
        return "no such folder"
    if not folder.is_dir():
        return "a file, not a folder"
    try:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "holds " + ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5) if names else "empty"
