"""Tokenize against copying the same bytes, its memory, and its growth with the number of checkpoints.

The real command in a process of its own, on zoos of random networks; the seconds are those of the stage, without the
start of Python. What a zoo holds is dropped from the page cache before each run, so that all read it from the disk.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rpgcli import artifact
from rpgcli.artifact import Artifact
from rpgcli.recipe import load
from tests.bench.measuring import MIB, Figure, Row, Setting, Side, Watched, at_least, at_most, in_turn, watch
from tests.bench.untrained import of_size, random_zoo

CHUNK = 2**24
"""Bytes that a copy reads at once."""
SETTLE = 10
"""Seconds until freed memory is cold; of a small zoo, which frees little, fewer."""


def tokenize(setting: Setting) -> list[Row]:
    """ConvNeXt-L, 198 M parameters: throughput, and the memory for 4 and for 8 checkpoints."""
    name = "convnext-atto" if setting.quick else "convnext-large"
    recipe = load(f"paper/imagenet-{name}")
    eight = random_zoo(setting.scratch / "8", recipe, 8)
    four = random_zoo(setting.scratch / "4", recipe, 4, like=eight)
    peaks: dict[str, list[float]] = {"4": [], "8": []}
    others: list[float] = []
    copies = setting.scratch / "copies"

    def copy() -> float:
        """Read, hash, write and sync the checkpoints; beside it, the rest of what tokenizing hashes and writes."""
        copies.mkdir()
        forget(eight)
        seconds = timed_sum(copy_file, [(eight.path / n["file"], copies / n["file"]) for n in eight.facts["networks"]])
        begun = time.perf_counter()
        for path in copies.iterdir():
            hash_file(path)
        write_file(copies / "rest", rest[-1])
        others.append(time.perf_counter() - begun)
        shutil.rmtree(copies)
        return seconds

    rest: list[int] = []
    run_eight = tokenizing(setting.scratch / "8", eight, peaks["8"].append, lambda tokens: rest.append(more_of(tokens)))
    run_four = tokenizing(setting.scratch / "4", four, peaks["4"].append)
    sides = {"tokenize 8": run_eight, "copy 8": copy, "tokenize 4": run_four}
    found = in_turn(sides, setting.repeats(3), warm_up=False)

    gigabytes = sum(record.size for record in eight.records.values()) / 1e9
    bare, seconds, all_of_it = found["copy 8"], found["tokenize 8"], found["copy 8"].plus(Figure(tuple(others)))
    large, small = (Figure(tuple(peaks[num])) for num in ("8", "4"))
    what = f"{name}, 8 checkpoints, {gigabytes:.1f} GB, read from the disk by both sides. "
    return [
        Row("tokenize: throughput over a bare copy's", bare.over(seconds), "x",
            {"copy": bare, "tokenize": seconds}, goal=at_least(0.7),
            note=what + "A bare copy reads, hashes, writes and syncs each checkpoint once, chunk by chunk."),
        Row("  over a copy of all that it writes", all_of_it.over(seconds), "x",
            {"copy": all_of_it, "tokenize": seconds},
            note="All that it writes: the same, and the statistics; what is read and what is written are both hashed."),
        Row("  gigabytes of checkpoints a second", Figure(tuple(gigabytes / s for s in seconds.values)), "GB/s"),
        Row("  peak anonymous memory, 8 checkpoints", large, "MiB", goal=at_most(2.5 * 1024)),
        Row("  the same, 8 over 4 checkpoints", large.over(small), "x", {"8": large, "4": small}, "MiB",
            goal=at_most(1.1)),
        Row("  seconds a checkpoint, 8 over 4", seconds.over(found["tokenize 4"]).times(0.5), "x",
            {"8": seconds.times(1 / 8), "4": found["tokenize 4"].times(1 / 4)}),
    ]  # fmt: skip


def checkpoints(setting: Setting) -> list[Row]:
    """Growth with the number of checkpoints, a CNN of 3.5 M parameters."""
    recipe = of_size(3_500_000)
    numbers = (4, 8, 16) if setting.quick else (8, 32, 128)
    whole = random_zoo(setting.scratch / str(numbers[-1]), recipe, numbers[-1])
    zoos = {num: random_zoo(setting.scratch / str(num), recipe, num, like=whole) for num in numbers[:-1]}
    zoos[numbers[-1]] = whole
    peaks: dict[int, list[float]] = {num: [] for num in numbers}
    sides = {str(n): tokenizing(setting.scratch / str(n), zoo, peaks[n].append) for n, zoo in zoos.items()}
    found = in_turn(sides, setting.repeats(3), warm_up=False)
    each = {num: found[str(num)].times(1 / num) for num in numbers}
    first, rows = numbers[0], []
    for num in numbers[1:]:
        rows.append(Row(
            f"tokenize: seconds a checkpoint, {num} over {first}", each[num].over(each[first]), "x",
            {str(num): each[num], str(first): each[first]},
            note="A CNN of 3.5 M parameters. The statistics are written once, whatever the number.",
        ))  # fmt: skip
        more, few = Figure(tuple(peaks[num])), Figure(tuple(peaks[first]))
        rows.append(Row(
            "  peak anonymous memory, the same", more.over(few), "x", {str(num): more, str(first): few}, "MiB",
            goal=at_most(1.1),
        ))  # fmt: skip
    return rows


def tokenizing(
    run: Path, zoo: Artifact, peak: Callable[[float], None], look: Callable[[Path], object] = lambda tokens: None
) -> Side:
    """Run the stage, tell its peak of memory, look at the tokens, and delete them."""

    def side() -> float:
        forget(zoo)
        watched: Watched = watch("tokenize", "--run", run)
        peak(watched.anonymous)
        tokens = run / "tokens"
        seconds: float = artifact.read(tokens, "tokenize").manifest.volatile["seconds"]
        look(tokens)
        shutil.rmtree(tokens)
        return seconds

    return side


def more_of(tokens: Path) -> int:
    """Bytes of an artifact of tokens beside the tokens."""
    records = artifact.read(tokens, "tokenize").records
    return sum(record.size for name, record in records.items() if not name.startswith("tokens-"))


# --- bare reading and writing -----------------------------------------------------------------------------------------


def timed_sum(function: Callable[[Path, Path], object], pairs: list[tuple[Path, Path]]) -> float:
    """The seconds that all calls take."""
    begun = time.perf_counter()
    for pair in pairs:
        function(*pair)
    return time.perf_counter() - begun


def copy_file(source: Path, target: Path) -> str:
    """Copy and hash a file, synced."""
    hashed = hashlib.sha256()
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        while chunk := reading.read(CHUNK):
            hashed.update(chunk)
            writing.write(chunk)
        os.fsync(writing.fileno())
    return hashed.hexdigest()


def hash_file(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, num_bytes: int) -> None:
    """Write and hash so many bytes, synced."""
    chunk, hashed = os.urandom(MIB) * (CHUNK // MIB), hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for first in range(0, num_bytes, CHUNK):
            part = chunk[: num_bytes - first]
            hashed.update(part)
            file.write(part)
        os.fsync(file.fileno())


def forget(zoo: Artifact) -> None:
    """Drop the files of a zoo from the page cache, and wait until the memory that the last side freed is cold.

    A virtual machine gives freed memory back within seconds. Until then writing is up to five times as fast, so that
    whoever comes after a side that deletes much would win.
    """
    for name in zoo.records:
        with zoo.path.joinpath(name).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    time.sleep(min(SETTLE, sum(record.size for record in zoo.records.values()) / 2**27))
