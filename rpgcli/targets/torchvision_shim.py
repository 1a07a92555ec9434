"""torchvision beside a CPU build of torch.

PyPI's torchvision is compiled against a CUDA torch: beside a CPU build its C++ library does not load, and `import
torchvision` stops where it describes operators that nobody declared. Only box suppression for detectors is missing,
which nothing here calls, so declaring the operators' schemas is enough. timm imports torchvision: this goes first.
"""

import functools
import importlib
from types import ModuleType

import torch

MISSING_OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache  # keeps the library alive: a collected `Library` takes its operators with it
def _declare_missing_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in MISSING_OPERATORS:
        library.define(name + SCHEMA)
    return library


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its missing operators first where its C++ library does not load.

    Where torchvision imports by itself nothing is declared.

    Raises:
        ImportError: If torchvision is not installed.
        RuntimeError: If it fails for another reason than missing operators.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    _declare_missing_operators()
    return importlib.import_module("torchvision")
