"""`fashion-mnist`: 60,000 + 10,000 grey 28 x 28 images of clothes in four IDX files (Xiao et al. 2017)."""

from pathlib import Path
from typing import Literal

from rpgcli.errors import DataError
from rpgcli.tasks.dataset import Dataset, Images, OfficialSplitConfig, check_images, missing
from rpgcli.tasks.idx import read_idx
from rpgcli.tasks.torchvision_files import open_reader

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SUBFOLDERS = ("", "fashion-mnist", "FashionMNIST/raw")  # the last is where torchvision downloads to
PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
EXPECTED = f"{', '.join(PARTS)}, each with or without .gz"
NUM_TRAIN = 60_000
FIRST_LABELS = [9, 0, 0, 3, 0, 2, 7, 2]


class FashionMnistConfig(OfficialSplitConfig):
    """Fashion-MNIST; found without `--data-root` where Debian's package `dataset-fashion-mnist` puts it."""

    kind: Literal["fashion-mnist"] = "fashion-mnist"

    def where(self, data_root: Path | None) -> Path | None:
        """The first of the known folders that holds all four files."""
        complete = (f for f in _folders(data_root) if all(_file(f, part) is not None for part in PARTS))
        return next(complete, None)

    def load(self, data_root: Path | None = None, download: bool = False) -> Dataset:
        """Read the four files and split them; see `BaseDatasetConfig.load`."""
        folder = self.where(data_root)
        if folder is None and download and data_root is not None:
            open_reader("FashionMNIST", data_root, download, EXPECTED)
            folder = self.where(data_root)
        if folder is None:
            raise missing(
                self.kind,
                _folders(data_root),
                EXPECTED,
                "Install Debian's package dataset-fashion-mnist, or pass --data-root DIR with the folder of these, "
                "and --download to fetch the files there.",
            )
        train, test = (self._read(folder, part) for part in ("train", "t10k"))
        if len(train) == NUM_TRAIN and train.labels[:8].tolist() != FIRST_LABELS:
            raise DataError(
                f"{folder} holds another data set than {self.kind}: its training labels differ.",
                "MNIST, KMNIST and EMNIST name their files the same. Pass --data-root with Fashion-MNIST's folder.",
            )
        return self.split(self.kind, CLASSES, train, test)

    def _read(self, folder: Path, part: str) -> Images:
        pixels = read_idx(_require(folder, f"{part}-images-idx3-ubyte"), rank=3)[:, None]  # (N, 1, 28, 28)
        labels = read_idx(_require(folder, f"{part}-labels-idx1-ubyte"), rank=1).long()  # (N,)
        return check_images(Images(pixels, labels), self.kind, len(CLASSES), folder)


def _folders(data_root: Path | None) -> list[Path]:
    return [DEBIAN_FOLDER] if data_root is None else [data_root / sub for sub in SUBFOLDERS]


def _file(folder: Path, part: str) -> Path | None:
    return next((path for path in (folder / part, folder / f"{part}.gz") if path.is_file()), None)


def _require(folder: Path, part: str) -> Path:
    path = _file(folder, part)
    assert path is not None, "where() returns only folders with all four files"
    return path
