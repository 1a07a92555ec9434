"""`digits`: 1,797 grey 8 x 8 images of handwritten digits, embedded in scikit-learn (Alpaydin and Kaynak 1998)."""

from pathlib import Path
from typing import Literal

import torch

from rpgcli import rng
from rpgcli.tasks.dataset import BaseDatasetConfig, Dataset, Images

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 1257, 180, 360


class DigitsConfig(BaseDatasetConfig):
    """The embedded data set: 1257 training, 180 validation and 360 test images; needs no file."""

    kind: Literal["digits"] = "digits"

    def where(self, data_root: Path | None) -> Path | None:
        """None: there is no file to find."""
        return None

    def load(self, data_root: Path | None = None, download: bool = False) -> Dataset:
        """The split data set; both arguments are ignored."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = Images(
            pixels=torch.from_numpy(digits.images).to(torch.uint8)[:, None],  # (1797, 1, 8, 8), 0..16
            labels=torch.from_numpy(digits.target).to(torch.int64),
        )
        order = torch.randperm(len(images), generator=rng.stream(self.split_seed, "split", "digits"))
        train, validation, test = order.split([NUM_TRAIN, NUM_VALIDATION, NUM_TEST])
        return Dataset(
            name="digits",
            classes=tuple(str(digit) for digit in range(10)),
            train=images.take(train),
            validation=images.take(validation),
            test=images.take(test),
            scale=16.0,
            shift=0.5,
        )
