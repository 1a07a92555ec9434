"""Data sets, and what is asked of a network on them.

A new data set or kind of task is one file here and one name in `AnyDataset` or `TaskConfig`.
"""

from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from rpgcli.errors import UsageError, nearest
from rpgcli.tasks.augmentation import augment
from rpgcli.tasks.binary_subset import (
    BinarySubsetConfig,
    bits_tensor,
    complement,
    other_tasks,
    parse_classes,
    parse_task_bits,
    read_tasks,
    split_tasks,
)
from rpgcli.tasks.cifar10 import Cifar10Config
from rpgcli.tasks.cifar100 import Cifar100Config
from rpgcli.tasks.dataset import BaseDatasetConfig, Dataset, Images
from rpgcli.tasks.digits import DigitsConfig
from rpgcli.tasks.fashion_mnist import FashionMnistConfig
from rpgcli.tasks.folder import FolderConfig
from rpgcli.tasks.multi_class import MultiClassConfig
from rpgcli.tasks.stl10 import Stl10Config
from rpgcli.tasks.svhn import SvhnConfig

AnyDataset = (
    DigitsConfig | FashionMnistConfig | Cifar10Config | Cifar100Config | SvhnConfig | Stl10Config | FolderConfig
)
DatasetConfig = Annotated[AnyDataset, Field(discriminator="kind")]
TaskConfig = Annotated[MultiClassConfig | BinarySubsetConfig, Field(discriminator="kind")]

DATASETS: dict[str, type[AnyDataset]] = {config.model_fields["kind"].default: config for config in get_args(AnyDataset)}
"""Every data set by its name."""

__all__ = [
    "DATASETS",
    "BaseDatasetConfig",
    "BinarySubsetConfig",
    "Cifar10Config",
    "Cifar100Config",
    "Dataset",
    "DatasetConfig",
    "DigitsConfig",
    "FashionMnistConfig",
    "FolderConfig",
    "Images",
    "MultiClassConfig",
    "Stl10Config",
    "SvhnConfig",
    "TaskConfig",
    "augment",
    "bits_tensor",
    "complement",
    "find_datasets",
    "other_tasks",
    "parse_classes",
    "parse_dataset",
    "parse_task_bits",
    "read_tasks",
    "split_tasks",
]


def parse_dataset(name: str) -> DatasetConfig:
    """The data set that `--dataset` names, with its default settings.

    Raises:
        UsageError: If there is none of this name; suggests the nearest.
    """
    if name not in DATASETS:
        raise UsageError(f"unknown data set {name!r}{nearest(name.lower(), DATASETS)}")
    return DATASETS[name]()


def find_datasets(data_root: Path | None) -> dict[str, str]:
    """Say for each data set where its files were found, for `rpg doctor`; looks at names only."""
    found = {}
    for name, config in DATASETS.items():
        folder = config().where(data_root)
        looked = f"in {data_root}" if data_root is not None else "(no --data-root)"
        found[name] = f"found in {folder}" if folder is not None else f"not found {looked}"
    found["digits"] = "embedded in scikit-learn"
    return found
