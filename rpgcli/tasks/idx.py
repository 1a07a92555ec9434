"""Reader of IDX files, MNIST's format: two zero bytes, a type, a rank, big-endian sizes, and the values."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from rpgcli.errors import DataError

UNSIGNED_BYTE = 0x08
MAX_BYTES = 1 << 30


def read_idx(path: Path, rank: int) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped if it ends in `.gz`.

    Args:
        path: The file.
        rank: Number of dimensions that it must have: 3 for images, 1 for labels.

    Returns:
        uint8 tensor of `rank` dimensions.

    Raises:
        DataError: If the file cannot be read, is of another type or rank, or has more or fewer bytes than it says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank or header[:4] != bytes([0, 0, UNSIGNED_BYTE, rank]):
                raise DataError(
                    f"{path} is not an IDX file of unsigned bytes in {rank} dimensions.",
                    f"It begins with {header[:4].hex(' ') or 'nothing'}, expected: 00 00 08 {rank:02x}, {rank} sizes.",
                    "Fetch the file again.",
                )
            shape = struct.unpack(f">{rank}I", header[4:])
            num_bytes = math.prod(shape)
            if num_bytes > MAX_BYTES:
                raise DataError(
                    f"{path} says it holds {'x'.join(map(str, shape))} bytes, more than {MAX_BYTES >> 20} MiB.",
                    "No known data set in this format is so large: fetch the file again.",
                )
            content = file.read(num_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Is it truncated? Fetch the file again.") from error
    if len(content) != num_bytes:
        has = "more" if len(content) > num_bytes else f"only {len(content)}"
        raise DataError(
            f"{path} says it holds {'x'.join(map(str, shape))} = {num_bytes} bytes but has {has}.",
            "Fetch the file again.",
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape) if content else torch.empty(shape).byte()
