"""Data sets through torchvision's readers, on local files unless a download is asked for.

CIFAR's files are pickles. They are opened by torchvision's own reader alone, which first compares each file with the
checksum that torchvision publishes for it; a file that differs by one bit is refused before it is opened.

Shapes: N images, C channels, H x W pixels.
"""

import logging
import warnings
from abc import abstractmethod
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rpgcli.errors import DataError
from rpgcli.targets.torchvision_shim import import_torchvision
from rpgcli.tasks.dataset import Dataset, Images, OfficialSplitConfig, blank, check_images, missing

log = logging.getLogger(__name__)


class TorchvisionConfig(OfficialSplitConfig):
    """A data set of torchvision; each names its reader, what lies in `--data-root`, and how its images are laid out."""

    reader: ClassVar[str]
    """Class of `torchvision.datasets`; it must check the files that it reads."""
    parts: ClassVar[tuple[dict[str, Any], dict[str, Any]]] = ({"split": "train"}, {"split": "test"})
    """The reader's arguments for the official training and test part."""
    files: ClassVar[tuple[str, ...]]
    """Files or folders inside `data_root` without which the data set is missing."""
    expected: ClassVar[str]
    """What should lie in `data_root`, for messages."""
    num_images: ClassVar[tuple[int, int]]
    """Of the official training and test part; the files' checksums leave no other."""
    shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    """Channels, height and width of an image."""
    num_classes: ClassVar[int] = 10
    """Of its labels."""

    @abstractmethod
    def classes(self, reader: Any) -> tuple[str, ...]:
        """Names of the classes, given an opened reader."""

    @abstractmethod
    def images(self, reader: Any) -> Images:
        """Images (N, C, H, W) and labels (N,) of an opened reader."""

    def where(self, data_root: Path | None) -> Path | None:
        """`data_root`, if it holds the files."""
        return data_root if data_root and all((data_root / file).exists() for file in self.files) else None

    def load(self, data_root: Path | None = None, download: bool = False) -> Dataset:
        """Read both parts and split them; see `BaseDatasetConfig.load`."""
        if data_root is None:
            raise DataError(
                f"{self.kind} is read from files, and no folder was named.",
                f"Expected: {self.expected}.",
                "Pass --data-root DIR with the folder that holds it, and --download to fetch it there.",
            )
        if not download and self.where(data_root) is None:
            advice = "Pass --data-root DIR with the folder that holds it, or --download to fetch it there."
            raise missing(self.kind, [data_root], self.expected, advice)
        train, test = (open_reader(self.reader, data_root, download, self.expected, **part) for part in self.parts)
        classes = self.classes(train)
        images = (check_images(self.images(part), self.kind, len(classes), data_root) for part in (train, test))
        return self.split(self.kind, classes, *images)

    def outline(self, data_root: Path | None) -> Dataset:
        """Known without any file; see `BaseDatasetConfig.outline`."""
        classes = tuple(str(i) for i in range(self.num_classes))
        return self.split(self.kind, classes, *(blank(num, *self.shape) for num in self.num_images))


def open_reader(reader: str, root: Path, download: bool, expected: str, **part: Any) -> Any:
    """Open `torchvision.datasets.<reader>` on `root`.

    Raises:
        DataError: If the files are missing, differ from the published checksums, or cannot be fetched.
    """
    datasets = import_torchvision().datasets
    if download:
        log.info("fetching what is missing of %s to %s", reader, root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)  # the age of CIFAR's pickles
            return getattr(datasets, reader)(str(root), download=download, **part)
    except (RuntimeError, OSError, HTTPException) as error:
        raise DataError(
            f"{reader} cannot be {'fetched to' if download else 'read from'} {root}: {error}",
            f"Expected: {expected}, unchanged as published.",
            "Delete these files and pass --download, or fetch them by hand and pass --data-root DIR.",
        ) from error
