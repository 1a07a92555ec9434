"""What every measurement of the bench needs: repeats in turn, rows of a table, and processes whose memory is watched.

Two things that are compared run in turn, A B A B ..., and their ratio is taken repeat by repeat, so that whatever else
the machine does hits both. Shown are medians, with quartiles beside them.
"""

import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rpgcli import __version__

SCHEMA = 1
"""Of `bench.json`; later versions only add keys."""
WIDTH = 120
"""Characters of a line of the table."""
LOOK_EVERY = 0.02
"""Seconds between two looks at the memory of a process."""
MIB = 2**20


class BenchError(Exception):
    """Something that is measured does not run."""


@dataclass(frozen=True)
class Setting:
    """What all measurements are told."""

    scratch: Path
    """Folder for whatever a measurement writes; deleted after it."""
    quick: bool = False
    """Small sizes and few repeats: shows that everything runs, and nothing else."""
    reference: Path | None = None
    """A checkout of the released RPG code."""

    def repeats(self, num: int) -> int:
        """How often something is measured."""
        return 2 if self.quick else num


@dataclass(frozen=True)
class Figure:
    """What one side of a comparison gave in each repeat, or their ratio."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third; of a single value the value itself."""
        if len(self.values) == 1:
            return self.values * 2
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def over(self, other: "Figure") -> "Figure":
        """The ratio, repeat by repeat."""
        return Figure(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def times(self, factor: float) -> "Figure":
        """Each value so many times."""
        return Figure(tuple(factor * value for value in self.values))

    def plus(self, other: "Figure") -> "Figure":
        """The sum, repeat by repeat."""
        return Figure(tuple(a + b for a, b in zip(self.values, other.values, strict=True)))

    def to_json(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {
            "median": self.median, "quartiles": [low, high], "min": min(self.values), "max": max(self.values),
            "values": list(self.values),
        }  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What a median has to reach."""

    bound: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def at_least(bound: float) -> Goal:
    return Goal(bound, True)


def at_most(bound: float) -> Goal:
    return Goal(bound, False)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    figure: Figure | None
    """None where it cannot be measured here; the note says why."""
    unit: str = "x"
    sides: Mapping[str, Figure] = field(default_factory=dict)
    """What was measured, by what it is; of a ratio what was divided."""
    side_unit: str = "s"
    goal: Goal | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none, or no figure."""
        return None if self.goal is None or self.figure is None else self.goal.met(self.figure.median)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "unit": self.unit, "figure": self.figure and self.figure.to_json(),
            "sides": [{"name": name, **figure.to_json()} for name, figure in self.sides.items()],
            "side_unit": self.side_unit,
            "goal": self.goal and {"bound": self.goal.bound, "at_least": self.goal.at_least}, "met": self.met,
            "note": self.note,
        }  # fmt: skip


# --- repeats ----------------------------------------------------------------------------------------------------------

Side = Callable[[], float]
"""Measures itself once: seconds, or whatever else."""


def timed(function: Callable[[], object]) -> Side:
    """The seconds that `function` takes."""

    def side() -> float:
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun

    return side


def in_turn(sides: Mapping[str, Side], repeats: int, *, warm_up: bool = True) -> dict[str, Figure]:
    """Measure all sides one after the other, `repeats` times over, after a round that does not count."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-warm_up, repeats):
        for name, side in sides.items():
            value = side()
            if repeat >= 0:
                values[name].append(value)
                say(f"  {name}: {shown(value)}")
    return {name: Figure(tuple(found)) for name, found in values.items()}


def say(line: str) -> None:
    """Tell at once, on stderr."""
    print(line, file=sys.stderr, flush=True)


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """What a process took."""

    seconds: float
    anonymous: float
    """Highest anonymous memory that was seen, MiB: without mapped files, which the system can take back."""
    resident: float
    """Highest resident memory, MiB, mapped files included."""


def watch(*arguments: object) -> Watched:
    """Run `rpg` in a process of its own and watch its memory (Linux).

    Raises:
        BenchError: If it fails; holds the end of what it said.
    """
    command = [sys.executable, "-m", "rpgcli", *map(str, arguments)]
    begun, anonymous = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, anonymous_mib(process.pid))
            time.sleep(LOOK_EVERY)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()[-5:]
            raise BenchError(f"rpg {arguments[0]} ended with {process.returncode}: {' / '.join(said)}")
    return Watched(time.perf_counter() - begun, anonymous, usage.ru_maxrss / 1024)


def peak_of(function: Callable[..., None], *arguments: object) -> float:
    """Highest anonymous memory, MiB, of a process of its own that calls `function`.

    Raises:
        BenchError: If it fails.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    peak = 0.0
    while process.is_alive():
        assert process.pid is not None, "it was started"
        peak = max(peak, anonymous_mib(process.pid))
        time.sleep(LOOK_EVERY)
    if process.exitcode:
        raise BenchError(f"{function.__name__} ended with {process.exitcode}")
    return peak


def anonymous_mib(pid: int) -> float:
    """Anonymous memory of a process, MiB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # It has ended.
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


# --- the report -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cores": len(os.sched_getaffinity(0)), "processor": processor or platform.machine(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__, "python": platform.python_version(), "rpg": __version__,
    }  # fmt: skip


def shown(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    digits = next(d for d in range(9) if abs(value) * 10**d >= 100 or d == 8)
    return f"{value:.{digits}f}"


def cells(row: Mapping[str, Any], *, judged: bool) -> list[str]:
    """A line of the table: what, median, quartiles, what was measured, what is wanted."""
    figure, goal, sides = row["figure"], row["goal"], row["sides"]
    if figure is None:
        shown_figure = ["-", "-"]
    else:
        shown_figure = [f"{shown(figure['median'])} {row['unit']}", " - ".join(map(shown, figure["quartiles"]))]
    measured = " : ".join(shown(side["median"]) for side in sides)
    wanted = "" if goal is None else f"{'>=' if goal['at_least'] else '<='} {goal['bound']:g}"
    verdict = {True: ", met", False: ", MISSED", None: ""}[row["met"] if judged else None]
    return [row["name"], *shown_figure, f"{measured} {row['side_unit']}" if measured else "", wanted + verdict]


def table(rows: Sequence[Mapping[str, Any]], *, judged: bool) -> list[str]:
    """Rows in Markdown that reads as plain text, and their notes."""
    lines = [["", "median", "quartiles", "measured", "wanted"], [], *(cells(row, judged=judged) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*(line for line in lines if line))]
    lines[1] = ["-" * width for width in widths]
    found = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    notes = dict.fromkeys(row["note"] for row in rows if row["note"])
    return found + [line for note in notes for line in ["", *textwrap.wrap(note, WIDTH)]]


def text(report: Mapping[str, Any]) -> str:
    """`bench.json` as tables."""
    facts = report["machine"]
    head = (
        f"rpg {facts['rpg']}, torch {facts['torch']}, {facts['threads']} threads on {facts['cores']} cores "
        f"({facts['processor']}, {facts['memory_mib'] / 1024:.0f} GiB), device {facts['device']}, load {facts['load']} "
        "before. Medians of several repeats; a ratio is taken repeat by repeat, its two sides measured in turn."
    )
    small = "QUICK: small sizes and few repeats, so the figures mean nothing. " if report["quick"] else ""
    lines = ["# Bench", "", *textwrap.wrap(small + head, WIDTH)]
    for one in report["measurements"]:
        lines += ["", f"## {one['title']}", ""]
        failed = one["error"]
        lines += (
            table(one["rows"], judged=not report["quick"])
            if failed is None
            else textwrap.wrap(f"Failed: {failed}", WIDTH)
        )
    return "\n".join(lines) + "\n"
