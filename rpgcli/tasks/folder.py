"""`folder`: a data set of one's own, one sub-folder of PNG or JPEG images for each class."""

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt

from rpgcli import rng
from rpgcli.errors import DataError
from rpgcli.tasks.dataset import BaseDatasetConfig, Dataset, Images, blank, contents

SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
EXPECTED = f"one sub-folder for each class, with its {', '.join(sorted(SUFFIXES))} images"


class FolderConfig(BaseDatasetConfig):
    """Images in `--data-root`, one sub-folder for each class; classes and files count in the order of their names."""

    kind: Literal["folder"] = "folder"
    size: PositiveInt = Field(default=32, le=1024)
    """Side in pixels that every image is resized to."""
    channels: Literal[1, 3] = 3
    """1 turns images grey, 3 makes them RGB."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of all images that is kept for validation."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of all images that is kept for the test."""
    num_classes: PositiveInt | None = None
    """Sub-folders that there must be; with `num_images` a plan needs no folder."""
    num_images: PositiveInt | None = None
    """About how many images there are, for a plan without the folder."""

    def where(self, data_root: Path | None) -> Path | None:
        """`data_root`, if it has two classes at least."""
        return data_root if data_root is not None and len(_classes(data_root)) > 1 else None

    def load(self, data_root: Path | None = None, download: bool = False) -> Dataset:
        """Read, resize and split all images; `download` is ignored. See `BaseDatasetConfig.load`."""
        folders = self._folders(data_root)
        files = [(file, label) for label, folder in enumerate(folders) for file in _images(folder)]
        images = Images(
            pixels=torch.stack([self._read(file) for file, _ in files]),  # (N, C, H, W)
            labels=torch.tensor([label for _, label in files], dtype=torch.int64),
        )
        validation, test = (math.ceil(len(files) * f) for f in (self.validation_fraction, self.test_fraction))
        order = torch.randperm(len(files), generator=rng.stream(self.split_seed, "split", "folder"))
        train = images.take(order[validation + test :])
        if len(train.labels.unique()) < len(folders):
            absent = sorted(set(range(len(folders))) - set(train.labels.tolist()))
            raise DataError(
                f"{data_root} leaves no training image of {', '.join(folders[label].name for label in absent)}.",
                f"Of its {len(files)} images, {validation} are for validation and {test} for the test.",
                "Add images, or lower dataset.validation_fraction and dataset.test_fraction.",
            )
        return Dataset(
            name="folder",
            classes=tuple(folder.name for folder in folders),
            train=train,
            validation=images.take(order[:validation]),
            test=images.take(order[validation : validation + test]),
        )

    def outline(self, data_root: Path | None) -> Dataset:
        """Counted, or without a folder as the recipe says; see `BaseDatasetConfig.outline`."""
        if data_root is None and self.num_classes is not None and self.num_images is not None:
            classes, total = tuple(str(i) for i in range(self.num_classes)), self.num_images
        else:
            folders = self._folders(data_root)
            classes, total = tuple(folder.name for folder in folders), sum(len(_images(folder)) for folder in folders)
        validation, test = (math.ceil(total * f) for f in (self.validation_fraction, self.test_fraction))
        parts = (
            blank(num, self.channels, self.size, self.size) for num in (total - validation - test, validation, test)
        )
        return Dataset("folder", classes, next(parts), next(parts), next(parts))

    def _folders(self, data_root: Path | None) -> list[Path]:
        """One for each class."""
        if data_root is None:
            raise DataError(
                "the data set 'folder' needs to know which folder.", f"Expected: {EXPECTED}.", "Pass --data-root DIR."
            )
        folders = _classes(data_root)
        if len(folders) < 2:
            what = (
                f"only one class of images, {folders[0].name}"
                if folders
                else f"no classes of images: {contents(data_root)}"
            )
            raise DataError(f"{data_root} has {what}.", f"Expected: {EXPECTED}; two at least.", "Pass --data-root DIR.")
        if self.num_classes not in (None, len(folders)):
            raise DataError(
                f"{data_root} has {len(folders)} classes of images, but dataset.num_classes is {self.num_classes}.",
                f"Expected: {EXPECTED}.",
                "Pass --data-root DIR with the folder that holds the classes themselves.",
            )
        return folders

    def _read(self, path: Path) -> torch.Tensor:
        """One image as (C, H, W) uint8."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                converted = image.convert("L" if self.channels == 1 else "RGB")
                resized = converted.resize((self.size, self.size), Image.Resampling.BILINEAR)
        except (
            OSError,
            ValueError,
            SyntaxError,
            EOFError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
        ) as error:
            raise DataError(
                f"{path} is not an image that can be read: {error}.", "Replace or remove this file."
            ) from error
        pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        return pixels.view(self.size, self.size, self.channels).permute(2, 0, 1)  # (C, H, W)


def _classes(root: Path) -> list[Path]:
    """Sub-folders with images, in the order of their names."""
    return sorted(f for f in root.iterdir() if f.is_dir() and _images(f)) if root.is_dir() else []


def _images(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
