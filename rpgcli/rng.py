"""Named random streams.

Every draw in this project comes from a generator that somebody named: `stream(seed, "train", step)`. A new draw in one
place therefore shifts no other, and sample 17 of a request is the same whatever its batch (after NVlabs/edm).
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Name = str | int


def derive(seed: int, *names: Name) -> int:
    """A 63-bit seed for the stream called `names` under `seed`; equal on every machine."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def stream(seed: int, *names: Name) -> torch.Generator:
    """A fresh CPU generator for the stream called `names` under `seed`.

    Draws are made on the CPU and moved, so that a GPU gets the same numbers.
    """
    return torch.Generator().manual_seed(derive(seed, *names))


@contextmanager
def initialising(seed: int, *names: Name) -> Iterator[None]:
    """Seed the global generator for building modules, and put it back afterwards.

    `nn.Module` constructors draw from the global generator; this is the only place that touches it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, *names))  # noqa: TID251
        yield
