"""What the user sees: results on stdout, everything else on stderr.

All use of rich lives here. A terminal gets bars, colours and panels; anything else plain lines without escape codes.
With `--json` stdout carries exactly one object. Text may quote hostile file names: control characters are always shown
escaped, and nothing in it is read as markup.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from rpgcli.errors import RpgError

HEARTBEAT_SECONDS = 30.0
REFRESH_SECONDS = 0.1
"""Shortest time between two changes of a bar's numbers."""
NARROW = 60
"""A terminal of fewer columns shows a bar's numbers alone."""
MIN_TEXT_WIDTH = 6
"""Text columns of a table shrink to this width, numbers never."""


class Advance(Protocol):
    """What `Console.progress` yields."""

    def __call__(self, done: int, /, **facts: float | str) -> None:
        """Report that `done` units are finished, with facts worth seeing such as `loss=0.1234`.

        The rate counts from the first report, so that neither a slow first step nor steps before a resume distort it.
        """


# ---------------------------------------------------------------------------------------------------------------------
# Words


def human_seconds(seconds: float) -> str:
    """`3.4 ms`, `4.2 s`, `4 min 53 s`, `1 h 2 min`, `3 d 4 h`."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    if seconds < 24 * 3600 - 30:
        return "{} h {} min".format(*divmod(round(seconds / 60), 60))
    return "{} d {} h".format(*divmod(round(seconds / 3600), 24))


def human_bytes(num_bytes: float) -> str:
    """`512 B`, `1.5 KiB`, `12.3 MiB`, `2.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1023.95:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def human_count(count: float) -> str:
    """`5178`, `12.3 k`, `3.4 M`, `1.2 G`."""
    if count < 10_000:
        return f"{count:.0f}"
    for unit in ("k", "M"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} G"


def escaped(text: str, encoding: str = "utf-8") -> str:
    """`text` as lines that any stream of this encoding can show: without glyph or outside it, `\\x1b`."""
    shown = "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


# ---------------------------------------------------------------------------------------------------------------------
# Streams


class Console:
    """Both streams of one command.

    Args:
        quiet: Shows only results, warnings and errors.
        verbose: 0 shows warnings of the library, 1 its notes, 2 its details.
        json_mode: Writes one JSON object to stdout and nothing else there.
        stdout: In place of `sys.stdout`.
        stderr: In place of `sys.stderr`.
        width: Columns, in place of the terminal's.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: int = 0,
        json_mode: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.json_mode = json_mode
        self.clock = clock
        self.out = _rich(stdout or sys.stdout, width)
        self.err = _rich(stderr or sys.stderr, width)
        self.answered = False
        """Whether stdout has its JSON object."""

    # Lines on stderr

    def note(self, text: str) -> None:
        """Something worth knowing."""
        if not self.quiet:
            self._line(self.err, text)

    def warn(self, text: str) -> None:
        """Something that may surprise; shown with `-q` too."""
        self._line(self.err, f"warning: {text}", "yellow")

    def done(self, text: str) -> None:
        """What a stage has made."""
        if not self.quiet:
            self._line(self.err, text, "green")

    def next_command(self, text: str) -> None:
        """The command to type next; last line of a stage."""
        if not self.quiet:
            self._line(self.err, f"next: {text}", "bold")

    def error(self, error: RpgError) -> None:
        """Tell a failure: a panel on a terminal, plain lines elsewhere, and with `--json` the object on stdout."""
        what = error.what.replace("\n", "\\n")  # one line, so that a file name cannot forge another
        if self.err.is_terminal:
            text = Text("\n").join(self._text(self.err, line) for line in (what, *error.advice))
            self.err.print(Panel(text, title="error", title_align="left", border_style="red", expand=False))
        else:
            advice = ["  " + line for part in error.advice for line in part.splitlines()]
            self._line(self.err, "\n".join([f"error: {what}", *advice]))
        if not self.answered:
            kind, advice = type(error).__name__, list(error.advice)
            self.result(
                {"error": {"kind": kind, "exit_code": error.exit_code, "message": error.what, "advice": advice}}
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Show what the library logs below `rpgcli` meanwhile."""
        logger, handler = logging.getLogger("rpgcli"), _Bridge(self)
        before = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(self.verbose, 2)])
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before[0])
            logger.propagate = before[1]

    # Results on stdout

    def result(self, value: object) -> None:
        """With `--json`, write the one object; numbers that are not finite become null."""
        if self.json_mode:
            assert not self.answered, "stdout carries one object"
            self.answered = True
            self.out.file.write(json.dumps(_finite(value), sort_keys=True, allow_nan=False) + "\n")
            self.out.file.flush()

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Collection[str] = ()
    ) -> None:
        """Print aligned rows, one line each; nothing with `--json`.

        Args:
            title: Line above the table; may be empty.
            columns: Names.
            rows: A cell for each column, already formatted; None shows as `-`.
            numeric: Names of the columns that are set to the right and never cut.
        """
        if self.json_mode:
            return
        encoding = self.out.encoding
        cells = [
            [escaped("-" if cell is None else str(cell), encoding).replace("\n", "\\n") for cell in row] for row in rows
        ]
        names = [escaped(name, encoding) for name in columns]
        right = [name in numeric for name in columns]
        widths = _widths(names, cells, right, self.out.width if self.out.is_terminal else None)
        if title:
            self._line(self.out, title, "bold")
        self._line(self.out, _row(names, widths, right), "bold")
        for row in cells:
            self._line(self.out, _row(row, widths, right))

    # Progress on stderr

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str = "step") -> Iterator[Advance]:
        """Show how far a stage is: a bar on a terminal, elsewhere a line every 30 s or 10 %, whichever comes first.

        Args:
            title: The stage.
            total: Units to do; None if unknown.
            unit: What is counted, in the singular.
        """
        meter = _Meter(total, unit)
        display: AbstractContextManager[Callable[[], None]] = nullcontext(lambda: None)
        if not self.quiet:
            on_terminal = self.err.is_terminal and not self.err.is_dumb_terminal
            display = self._bar(title, meter) if on_terminal else self._heartbeat(title, meter)
        with display as refresh:

            def advance(done: int, /, **facts: float | str) -> None:
                meter.report(done, self.clock(), facts)
                refresh()

            yield advance

    @contextmanager
    def _heartbeat(self, title: str, meter: "_Meter") -> Iterator[Callable[[], None]]:
        last_time, last_tenths, last_done = self.clock(), 0, None

        def beat() -> None:
            nonlocal last_time, last_tenths, last_done
            last_time, last_tenths, last_done = self.clock(), meter.tenths, meter.done
            self._line(self.err, "  ".join([title, *meter.words()]))

        def refresh() -> None:
            if self.clock() - last_time >= HEARTBEAT_SECONDS or meter.tenths > last_tenths:
                beat()

        try:
            yield refresh
        finally:
            if meter.done != last_done:
                beat()

    @contextmanager
    def _bar(self, title: str, meter: "_Meter") -> Iterator[Callable[[], None]]:
        name = set_cell_size(escaped(title, self.err.encoding), min(cell_len(title), self.err.width // 2))
        bar_width = self.err.width // 8 if self.err.width >= NARROW else 0
        room = self.err.width - cell_len(name) - bar_width - 3
        bar = [BarColumn(bar_width)] if bar_width else []
        columns = [
            TextColumn("{task.description}", markup=False),
            *bar,
            TextColumn("{task.fields[words]}", markup=False),
        ]
        last_time = -math.inf

        with Progress(*columns, console=self.err, redirect_stdout=False, redirect_stderr=False) as progress:
            task = progress.add_task(name, total=meter.total, words="")

            def draw() -> None:
                words = [escaped(word, self.err.encoding) for word in meter.words(short=True)]
                while len(words) > 1 and cell_len("  ".join(words)) > room:
                    words.pop()
                progress.update(task, completed=meter.done or 0, words="  ".join(words))

            def refresh() -> None:
                nonlocal last_time
                if self.clock() - last_time >= REFRESH_SECONDS:
                    last_time = self.clock()
                    draw()

            try:
                yield refresh
            finally:
                draw()

    # Text

    def _text(self, stream: RichConsole, text: str, style: str = "") -> Text:
        return Text(escaped(text, stream.encoding), style=style)

    def _line(self, stream: RichConsole, text: str, style: str = "") -> None:
        """Print without wrapping, so that a command or a path can be copied."""
        stream.print(self._text(stream, text, style), soft_wrap=True)


class _Stream(RichConsole):
    """rich's console, which leaves the end of a pipe to its caller."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that rich has caught."""
        raise


def _rich(stream: TextIO, width: int | None) -> RichConsole:
    """Colours where rich finds them possible and `NO_COLOR` is not set; escape codes on terminals alone."""
    return _Stream(
        file=stream,
        width=width,
        force_terminal=stream.isatty(),
        force_jupyter=False,
        highlight=False,
        markup=False,
        emoji=False,
    )


class _Bridge(logging.Handler):
    """Shows log records on a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        show = self.console.warn if record.levelno >= logging.WARNING else self.console.note
        show(record.getMessage())


class _Meter:
    """How far a stage is, how fast it goes, and what is left."""

    def __init__(self, total: int | None, unit: str) -> None:
        self.total = total
        self.unit = unit
        self.done: int | None = None
        self.facts: dict[str, float | str] = {}
        self.first = (0, 0.0)  # units, seconds
        self.now = 0.0

    def report(self, done: int, now: float, facts: dict[str, float | str]) -> None:
        if self.done is None:
            self.first = (done, now)
        self.done, self.now = done, now
        self.facts |= facts

    @property
    def tenths(self) -> int:
        return 10 * (self.done or 0) // self.total if self.total else 0

    def words(self, *, short: bool = False) -> list[str]:
        """`400/1600 steps`, `25 %`, `4.1 steps/s`, `4 min 53 s left`, `loss 0.2312`; the short form stands by a bar."""
        done = self.done or 0
        plural = self.unit if (self.total or done) == 1 else f"{self.unit}s"
        words = [f"{done}" if self.total is None else f"{done}/{self.total}"]
        if not short:
            words[0] += f" {plural}"
            words += [f"{100 * done // self.total} %"] if self.total else []

        units, seconds = done - self.first[0], self.now - self.first[1]
        if units > 0 and seconds > 0:
            per_second = units / seconds
            fast = f"{per_second:.1f}" if per_second < 100 else human_count(per_second)
            words.append(
                f"{fast} {self.unit}s/s" if per_second >= 1 else f"{human_seconds(seconds / units)}/{self.unit}"
            )
            if self.total is not None and done < self.total:
                words.append(f"{human_seconds((self.total - done) / per_second)} left")
        return words + [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.facts.items()
        ]


def _finite(value: object) -> object:
    """`value` with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


GAP = 2
"""Spaces between the columns of a table."""


def _widths(names: list[str], cells: list[list[str]], right: list[bool], limit: int | None) -> list[int]:
    """Width of each column; the widest text columns, then names above numbers, give way until a row fits."""
    needed = [max((cell_len(row[column]) for row in cells), default=1) for column in range(len(names))]
    widths = [max(width, cell_len(name)) for width, name in zip(needed, names)]
    least = [needed[column] if right[column] else min(widths[column], MIN_TEXT_WIDTH) for column in range(len(names))]
    excess = 0 if limit is None else sum(widths) + GAP * (len(widths) - 1) - limit
    for group in (False, True):
        columns = [column for column in range(len(names)) if right[column] is group]
        while excess > 0 and any(widths[column] > least[column] for column in columns):
            widest = max(
                (column for column in columns if widths[column] > least[column]), key=lambda column: widths[column]
            )
            widths[widest] -= 1
            excess -= 1
    return widths


def _row(cells: list[str], widths: list[int], right: list[bool]) -> str:
    """One line of a table; what is cut ends in `~`, which every encoding has."""
    parts = []
    for cell, width, is_number in zip(cells, widths, right):
        if cell_len(cell) > width:
            cell = set_cell_size(cell, width - 1) + "~"
        pad = " " * (width - cell_len(cell))
        parts.append(pad + cell if is_number else cell + pad)
    return (" " * GAP).join(parts).rstrip()
