"""Foreign networks in: state dicts that other programs wrote, as safetensors or as PyTorch's `.pth`.

A file from elsewhere is read as data: `.pth` files are pickles, and only the tensors that PyTorch's restricted reader
accepts come through. Size, names and values are checked before anything else sees them.
"""

import math
import pickle  # noqa: TID251 - for the class of its error only: nothing is unpickled by it
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rpgcli.artifact import tensors_of
from rpgcli.errors import ArtifactError, LayoutError

MAX_BYTES = 4 << 30
SUFFIXES = (".safetensors", ".pth", ".pt")
WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts keep the state dict among other things."""
MAX_LISTED = 5
MALFORMED = (
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What PyTorch's reader raises on files that are no checkpoints, depending on where it loses its way."""


def networks_in(folder: Path) -> list[Path]:
    """Files of networks in `folder` and in its sub-folders, in natural order: `net2` before `net10`.

    Raises:
        ArtifactError: If there is no such folder, or no network in it.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder.", "Name the folder that holds the networks.")
    folders = [folder, *(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))]
    paths = [
        p
        for place in folders
        for p in place.iterdir()
        if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    ]
    if not paths:
        raise ArtifactError(
            f"{folder} holds no network.", f"Expected: one file for each network, ending in {', '.join(SUFFIXES)}."
        )
    return sorted(paths, key=lambda path: [(_natural(part), part) for part in path.relative_to(folder).parts])


def read_network(path: Path, max_bytes: int = MAX_BYTES, *, must_be_finite: bool = True) -> dict[str, Tensor]:
    """The state dict in a foreign file, its tensors on the CPU and independent of the file.

    Args:
        path: A `.safetensors`, `.pth` or `.pt` file.
        max_bytes: Refuse files, and networks, that are larger.
        must_be_finite: Refuse NaN and infinity.

    Returns:
        Tensors by name, in the file's order.

    Raises:
        ArtifactError: If the file is missing, too large, damaged, no state dict, runs code, or holds suspicious
            names, or values that are not finite.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ArtifactError(f"{path} is not a file of a network.", f"Expected a name ending in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist or is not a file.", "Name a file that holds one network.")
    if path.stat().st_size > max_bytes:
        raise _too_large(path, path.stat().st_size, max_bytes)
    found = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pth(path, max_bytes)
    state = _tensors(_unwrap(found), path)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if num_bytes > max_bytes:  # a tensor that repeats its storage is larger than its file
        raise _too_large(path, num_bytes, max_bytes)
    for name, tensor in state.items():
        _check_name(name, path)
        if must_be_finite:
            _check_finite(name, tensor, path)
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def read_fitting(path: Path, expected: Mapping[str, Tensor], *, must_be_finite: bool = True) -> dict[str, Tensor]:
    """The network in a foreign file, as the target takes it; see `read_network` and `match_network`.

    Raises:
        LayoutError: If it does not fit the target; names the file.
    """
    try:
        return match_network(read_network(path, must_be_finite=must_be_finite), expected)
    except LayoutError as error:
        raise LayoutError(f"{path}: {error.what}", *error.advice) from None


def match_network(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check that a state dict is the one that a target network takes, and put it in the target's order.

    Args:
        state: Tensors by name; a `module.` before every name, left by data-parallel training, is taken off.
        expected: The target's state dict, `meta` tensors suffice.

    Returns:
        The same tensors under the target's names.

    Raises:
        LayoutError: If names, shapes or dtypes differ; lists the first few of each.
    """
    if (
        state
        and all(name.startswith("module.") for name in state)
        and not any(n.startswith("module.") for n in expected)
    ):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    differing = [
        f"{name}: {_describe(state[name])} instead of {_describe(tensor)}"
        for name, tensor in expected.items()
        if name in state and _describe(state[name]) != _describe(tensor)
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape or dtype": differing,
    }
    if any(problems.values()):
        counts = ", ".join(f"{len(names)} {what}" for what, names in problems.items() if names)
        raise LayoutError(
            f"the network does not fit the target: tensors {counts}.",
            *(f"{what}: {_listed(names)}" for what, names in problems.items() if names),
            "Choose the architecture, data set and classes that these networks were made for.",
        )
    return {name: state[name] for name in expected}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    tensors_of(path.resolve())  # Refuses a header that is absurdly large before anything reads it.
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not a safetensors file: {error}", "Is it truncated? Fetch it again.") from error


def _read_pth(path: Path, max_bytes: int) -> object:
    """The objects in a PyTorch file, without running code from it."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and (num_bytes := _unzipped_size(path)) > max_bytes:
            raise _too_large(path, num_bytes, max_bytes)
        # The one place where a pickle is read: by the restricted reader, which makes tensors and plain containers only.
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected pickle protocol"
            )  # either it is read, or the error below says why
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)  # noqa: TID251
    except MALFORMED as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if reason.startswith("Weights only load failed"):  # PyTorch goes on to say how code can be run after all.
            reason = "it holds other things than tensors, or is damaged."
        raise ArtifactError(
            f"{path} cannot be read as a file of tensors: {reason}",
            "Expected a state dict, as written by torch.save(model.state_dict(), path).",
            "A file that needs Python code to be read is refused: convert it to safetensors where it was made.",
        ) from error


def _unzipped_size(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _unwrap(found: object) -> object:
    """The state dict itself, where a training script kept it among other things."""
    if isinstance(found, dict):
        return next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), found)
    return found


def _tensors(found: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(found, dict):
        raise ArtifactError(
            f"{path} holds a {type(found).__name__}, not a state dict.", "Save model.state_dict() instead."
        )
    strange = [f"{name!r} ({type(value).__name__})" for name, value in found.items() if not _is_plain(name, value)]
    if strange:
        raise ArtifactError(
            f"{path} holds other things than dense tensors on the CPU: {_listed(strange)}.",
            f"Expected a state dict, alone or under one of the keys {', '.join(WRAPPERS)}.",
        )
    if not found:
        raise ArtifactError(f"{path} holds no tensor.", "Is it the file of a network?")
    return found


def _is_plain(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _check_name(name: str, path: Path) -> None:
    if not name or not name.isprintable() or ".." in name or "/" in name or "\\" in name:
        raise ArtifactError(
            f"{path} holds a tensor with the name {name!r}.",
            "Expected names of parameters such as layer1.0.conv1.weight: printable, without '..' and slashes.",
        )


def _check_finite(name: str, tensor: Tensor, path: Path) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    wide = (
        tensor if tensor.is_complex() or tensor.element_size() > 1 else tensor.float()
    )  # 8-bit floats have no isfinite
    if num_bad := tensor.numel() - int(torch.isfinite(wide).sum()):
        raise ArtifactError(
            f"{path}: {num_bad} of {math.prod(tensor.shape)} values of {name} are not finite.",
            "The training of this network failed: leave it out.",
        )


def _too_large(path: Path, num_bytes: int, max_bytes: int) -> ArtifactError:
    return ArtifactError(
        f"{path} holds {num_bytes / 2**20:.1f} MiB, more than the {max_bytes / 2**20:.1f} MiB that are allowed.",
        "Save the state dict alone, without the optimizer's state, or raise the limit.",
    )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + f" and {len(names) - MAX_LISTED} more" * (len(names) > MAX_LISTED)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that compares runs of digits as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in parts]
