"""Speed and memory of every stage, as ratios to the obvious alternative: `make bench`.

    tokenize        against reading, hashing, writing and syncing the same bytes; ConvNeXt-L, 4 and 8 checkpoints
    checkpoints     tokenize: time and memory with the number of checkpoints
    collect         128 small networks at once against one by one
    scan            the plain-torch scan against its sequential twin and transformers' Mamba2
    lengths         the scan's time with the length of the sequence
    training-step   our default against the paper's composition
    generation      20 and 5 steps of our default against 1000 of the paper's
    compile         a step of the denoisers against the same through torch.compile
    growth          generation: time and memory from 0.1 M to 200 M parameters
    full-size       ViT-Base and ConvNeXt-L from a model of the paper's width; only where named by --only
    released        against the released RPG code; only with --reference

Medians of several repeats with their spread, measured in one run on one machine and written to `OUT/bench.json` and
`OUT/bench.md`. A measurement that fails says so in the table and takes no other one with it. What is measured on disk
needs 25 GB there (`full-size` 20 GB), which is free again afterwards.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpgcli import artifact
from tests.bench import learning, released, sampling, scanning, tokenizing
from tests.bench.measuring import SCHEMA, Row, Setting, machine, say, text

NAMED = {"full-size"}
"""Only measured where named."""


@dataclass(frozen=True)
class Measurement:
    """A part of the table."""

    name: str
    title: str
    measure: Callable[[Setting], list[Row]]


MEASUREMENTS = (
    Measurement("tokenize", "Tokenize against copying the same bytes", tokenizing.tokenize),
    Measurement("checkpoints", "Tokenize with the number of checkpoints", tokenizing.checkpoints),
    Measurement("collect", "Collect many networks at once against one by one", learning.collecting),
    Measurement("scan", "Scan against its sequential twin and transformers' Mamba2", scanning.scan),
    Measurement("lengths", "Scan with the length of the sequence", scanning.lengths),
    Measurement("training-step", "Training step against the paper's composition", learning.training_step),
    Measurement("generation", "Generation against the paper's composition", sampling.generation),
    Measurement("compile", "A step of the denoisers through torch.compile", sampling.compiling),
    Measurement("growth", "Generation with the number of parameters", sampling.growth),
    Measurement("full-size", "Networks of the paper at full size", sampling.full_size),
    Measurement("released", "Against the released code", released.released),
)


@dataclass(frozen=True)
class Result:
    """What came of a measurement."""

    name: str
    title: str
    rows: Sequence[Row]
    error: str | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For `bench.json`."""
        rows = [row.to_json() for row in self.rows]
        return {"name": self.name, "title": self.title, "rows": rows, "error": self.error, "seconds": self.seconds}


def chosen(only: str | None, *, has_reference: bool) -> list[Measurement]:
    """The measurements of these names (with commas), or the usual ones.

    Raises:
        ValueError: If there is none of a name.
    """
    known = {one.name: one for one in MEASUREMENTS}
    if only is None:
        skipped = NAMED | (set() if has_reference else {"released"})
        return [one for one in MEASUREMENTS if one.name not in skipped]
    names = only.split(",")
    if odd := [name for name in names if name not in known]:
        raise ValueError(f"unknown: {', '.join(odd)}; known: {', '.join(known)}")
    if "released" in names and not has_reference:
        raise ValueError("released needs --reference DIR, a checkout of the released code")
    return [known[name] for name in dict.fromkeys(names)]


def run(one: Measurement, setting: Setting) -> Result:
    """Measure; whatever goes wrong is the result."""
    say(f"{one.name} ...")
    begun, rows, error = time.perf_counter(), list[Row](), None
    shutil.rmtree(setting.scratch, ignore_errors=True)
    setting.scratch.mkdir(parents=True)
    try:
        rows = one.measure(setting)
    except Exception as failure:  # noqa: BLE001 - the others are still to be measured
        error = f"{type(failure).__name__}: {failure}"
    finally:
        shutil.rmtree(setting.scratch, ignore_errors=True)
    seconds = round(time.perf_counter() - begun, 1)
    say(f"{one.name}: {f'failed: {error}' if error else 'done'}, {seconds:.0f} s")
    return Result(one.name, one.title, rows, error, seconds)


def make_report(out: Path, measurements: Sequence[Measurement], *, quick: bool, reference: Path | None) -> list[Result]:
    """Measure one after the other; the files are written after each, so that an interrupted bench keeps what it has."""
    report: dict[str, Any] = {"schema": SCHEMA, "quick": quick, "machine": machine(), "measurements": []}
    artifact.make_folder(out)
    results = []
    for one in measurements:
        results.append(run(one, Setting(out / "scratch", quick, reference)))
        report["measurements"] = [result.to_json() for result in results]
        artifact.write_bytes(out / "bench.json", artifact.canonical(report) + b"\n")
        artifact.write_bytes(out / "bench.md", text(report).encode())
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m tests.bench.bench`; the exit code is 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description="Measure speed and memory of every stage.")
    parser.add_argument("--out", type=Path, required=True, help="folder of bench.json and bench.md")
    parser.add_argument("--only", metavar="NAMES", help=", ".join(one.name for one in MEASUREMENTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats: whether everything runs")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of the released RPG code")
    options = parser.parse_args(arguments)
    try:
        measurements = chosen(options.only, has_reference=options.reference is not None)
    except ValueError as error:
        parser.error(str(error))
    results = make_report(options.out, measurements, quick=options.quick, reference=options.reference)
    print((options.out / "bench.md").read_text(), end="")
    return int(any(result.error is not None for result in results))


if __name__ == "__main__":
    sys.exit(main())
