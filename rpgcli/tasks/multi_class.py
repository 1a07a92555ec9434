"""The task of telling all classes apart.

Shapes: N images, C classes.
"""

from typing import Literal

from torch import Tensor

from rpgcli.config import Config


class MultiClassConfig(Config):
    """One output for each class; every network of the zoo solves the same problem."""

    kind: Literal["multi-class"] = "multi-class"

    def num_outputs(self, num_classes: int) -> int:
        """One logit for each class."""
        return num_classes

    def labels(self, y: Tensor, task_bits: str | Tensor | None = None) -> Tensor:
        """The classes (N,) int64 themselves."""
        assert task_bits is None, "a multi-class network has no task bits"
        return y
