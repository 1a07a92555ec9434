"""What reaches stdout and stderr: terminals, pipes, narrow windows, poor encodings, JSON, hostile text."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from rpgcli.console import Console, escaped, human_bytes, human_count, human_seconds
from rpgcli.errors import GateError, RecipeError

HOSTILE = "a\x1b[31mred\x1b]0;title\x07[bold]b[/bold]{x}\r\u202e"


class Stream(io.StringIO):
    """A stream that says what it is."""

    def __init__(self, *, terminal: bool = False, encoding: str = "utf-8") -> None:
        super().__init__()
        self.terminal = terminal
        self.name_of_encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.name_of_encoding

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        text.encode(self.encoding)  # strict, as a real stream is
        return super().write(text)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def make(
    *,
    terminal: bool = False,
    encoding: str = "utf-8",
    width: int | None = None,
    quiet: bool = False,
    verbose: int = 0,
    json_mode: bool = False,
) -> tuple[Console, Stream, Stream, Clock]:
    out, err = (Stream(terminal=terminal, encoding=encoding) for _ in range(2))
    clock = Clock()
    console = Console(
        quiet=quiet, verbose=verbose, json_mode=json_mode, stdout=out, stderr=err, width=width, clock=clock
    )
    return console, out, err, clock


def plain(text: str) -> str:
    """What a terminal shows of `text`, escape codes removed."""
    return Text.from_ansi(text).plain


# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.0034, "3.4 ms"),
        (4.23, "4.2 s"),
        (59.96, "1 min 0 s"),
        (293, "4 min 53 s"),
        (3599.7, "1 h 0 min"),
        (3725, "1 h 2 min"),
        (86399, "1 d 0 h"),
        (86400 * 3 + 4 * 3600, "3 d 4 h"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_seconds_are_words(seconds: float, words: str) -> None:
    assert human_seconds(seconds) == words


def test_bytes_and_counts_are_words() -> None:
    assert [human_bytes(n) for n in (0, 512, 1536, 2**20 - 1, 5 * 2**30, 2**50)] == [
        "0 B",
        "512 B",
        "1.5 KiB",
        "1.0 MiB",
        "5.0 GiB",
        "1024.0 TiB",
    ]
    assert [human_count(n) for n in (0, 5178, 12_345, 999_999, 3_400_000, 12e9)] == [
        "0",
        "5178",
        "12.3 k",
        "1.0 M",
        "3.4 M",
        "12.0 G",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def test_only_results_reach_stdout() -> None:
    console, out, err, _ = make()
    console.note("a note")
    console.warn("a surprise")
    console.done("made it")
    console.next_command("rpg tokenize --run runs/x")
    assert out.getvalue() == ""
    assert err.getvalue() == "a note\nwarning: a surprise\nmade it\nnext: rpg tokenize --run runs/x\n"


def test_quiet_leaves_warnings_and_results() -> None:
    console, out, err, _ = make(quiet=True)
    console.note("a note")
    console.warn("a surprise")
    console.done("made it")
    console.next_command("rpg")
    console.table("", ["a"], [["1"]])
    with console.progress("train", 10) as advance:
        advance(10)
    assert err.getvalue() == "warning: a surprise\n"
    assert out.getvalue() == "a\n1\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_line_is_not_broken(terminal: bool) -> None:
    console, _, err, _ = make(terminal=terminal, width=40)
    console.next_command("rpg generate " + "x" * 100 + " y" * 50)
    assert err.getvalue().count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_hostile_text_is_escaped_and_never_markup(encoding: str) -> None:
    console, out, err, _ = make(encoding=encoding)
    console.note(HOSTILE)
    console.warn(HOSTILE)
    console.error(RecipeError(HOSTILE + "\nforged", HOSTILE))
    console.table(HOSTILE, [HOSTILE], [[HOSTILE + "\nforged"]])
    with console.progress(HOSTILE, 2) as advance:
        advance(2, loss=HOSTILE)
    for text in (out.getvalue(), err.getvalue()):
        assert text.replace("\n", "").isprintable()
        assert r"a\x1b[31mred\x1b]0;title\x07[bold]b[/bold]{x}\r\u202e" in text
        assert not any(line.startswith("forged") for line in text.splitlines())


@given(st.text(), st.sampled_from(["utf-8", "ascii", "cp1252"]))
def test_escaped_text_is_printable_and_encodable(text: str, encoding: str) -> None:
    shown = escaped(text, encoding)
    shown.encode(encoding)
    assert shown.replace("\n", "").isprintable()
    if text.isascii() and text.isprintable():
        assert shown == text


@pytest.mark.parametrize("force", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_a_pipe_gets_no_escape_code(force: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(force, "1")
    console, out, err, _ = make()
    console.warn("x")
    console.error(RecipeError("x", "y"))
    console.table("t", ["a"], [["b"]])
    with console.progress("train", 3) as advance:
        advance(1)
    assert "\x1b" not in out.getvalue() + err.getvalue()


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    console, _, err, _ = make(terminal=True)
    console.warn("x")
    assert "\x1b[33m" in err.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    console, _, err, _ = make(terminal=True)
    console.warn("x")
    assert err.getvalue() == "warning: x\n"


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_an_error_is_plain_lines_in_a_pipe() -> None:
    console, out, err, _ = make()
    console.error(RecipeError("x.yaml has 1 problem:", "x.yaml:1:1: rgp: unknown key", "Mend it."))
    assert err.getvalue() == "error: x.yaml has 1 problem:\n  x.yaml:1:1: rgp: unknown key\n  Mend it.\n"
    assert out.getvalue() == ""


@pytest.mark.parametrize("encoding, corner", [("utf-8", "╭"), ("ascii", "+")])
@pytest.mark.parametrize("width", [40, 80])
def test_an_error_is_a_panel_on_a_terminal(encoding: str, corner: str, width: int) -> None:
    console, _, err, _ = make(terminal=True, encoding=encoding, width=width)
    console.error(RecipeError("the text [red] é was wrong", "advice " * 30))
    shown = plain(err.getvalue())
    assert corner in shown and "[red]" in shown
    assert max(map(cell_len, shown.splitlines())) <= width


def test_an_error_is_one_object_with_json() -> None:
    console, out, err, _ = make(json_mode=True)
    console.error(GateError("accuracy 0.1 is below 0.9", "Train longer."))
    assert json.loads(out.getvalue()) == {
        "error": {
            "kind": "GateError",
            "exit_code": 5,
            "message": "accuracy 0.1 is below 0.9",
            "advice": ["Train longer."],
        }
    }
    assert err.getvalue().startswith("error: accuracy")


def test_an_error_after_the_result_adds_no_second_object() -> None:
    console, out, err, _ = make(json_mode=True)
    console.result({"accuracy": 0.1})
    console.error(GateError("accuracy 0.1 is below 0.9"))
    assert json.loads(out.getvalue()) == {"accuracy": 0.1}
    assert "error: accuracy" in err.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Results


def test_a_result_is_one_sorted_object_of_finite_numbers() -> None:
    console, out, _, _ = make(json_mode=True, encoding="ascii")
    console.table("t", ["a"], [["b"]])
    console.result({"b": [1.5, float("nan")], "a": (float("inf"), "é\x1b"), "c": None})
    assert out.getvalue() == '{"a": [null, "\\u00e9\\u001b"], "b": [1.5, null], "c": null}\n'


def test_a_result_without_json_writes_nothing() -> None:
    console, out, err, _ = make()
    console.result({"a": 1})
    assert out.getvalue() + err.getvalue() == ""


ROWS: list[Sequence[object]] = [
    ["trained", "seen, all tasks of the zoo", 512, "0.9757"],
    ["漢字 network " * 5, None, 7, "0.9623"],
]


def test_a_table_is_aligned() -> None:
    console, out, _, _ = make()
    console.table("Networks", ["name", "count"], [["rpg", 5], ["漢字", 1000]], numeric=["count"])
    assert out.getvalue().splitlines() == ["Networks", "name  count", "rpg       5", "漢字   1000"]


@pytest.mark.parametrize("width", [40, 80])
def test_a_table_fits_a_terminal_and_cuts_text_not_numbers(width: int) -> None:
    console, out, _, _ = make(terminal=True, width=width)
    console.table("", ["name", "group", "count", "accuracy"], ROWS, numeric=["count", "accuracy"])
    lines = plain(out.getvalue()).splitlines()
    assert len(lines) == 3
    assert max(map(cell_len, lines)) <= width
    assert lines[1].endswith("512    0.9757") and lines[2].endswith("7    0.9623")
    assert "~" in lines[2]


def test_a_table_in_a_pipe_keeps_all_text() -> None:
    console, out, _, _ = make()
    console.table("", ["name", "group", "count", "accuracy"], ROWS, numeric=["count", "accuracy"])
    assert ("漢字 network " * 5).strip() in out.getvalue()
    assert len(out.getvalue().splitlines()) == 3


def test_a_table_without_rows_is_its_header() -> None:
    console, out, _, _ = make()
    console.table("", ["name", "count"], [])
    assert out.getvalue() == "name  count\n"


# ---------------------------------------------------------------------------------------------------------------------
# Progress


def test_a_pipe_gets_a_line_every_tenth() -> None:
    console, out, err, clock = make()
    with console.progress("train-rpg", 1600) as advance:
        for done in range(1601):
            clock.seconds = done / 41
            advance(done, loss=0.23123)
    lines = err.getvalue().splitlines()
    assert out.getvalue() == ""
    assert [line.split("  ")[2] for line in lines] == [f"{percent} %" for percent in range(10, 101, 10)]
    assert lines[-1] == "train-rpg  1600/1600 steps  100 %  41.0 steps/s  loss 0.2312"


def test_a_line_says_rate_remaining_time_and_facts() -> None:
    console, _, err, clock = make()
    with console.progress("train-rpg", 1600) as advance:
        advance(0)
        clock.seconds = 400 / 4.1
        advance(400, loss=0.23123, phase="warm")
    assert err.getvalue() == (
        "train-rpg  400/1600 steps  25 %  4.1 steps/s  4 min 53 s left  loss 0.2312  phase warm\n"
    )


def test_a_pipe_gets_a_line_every_half_minute() -> None:
    console, _, err, clock = make()
    with console.progress("collect", 1_000_000, unit="network") as advance:
        for done in range(100):
            clock.seconds = done
            advance(done)
    lines = err.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["30/1000000", "60/1000000", "90/1000000", "99/1000000"]
    assert "1.0 networks/s" in lines[0]


def test_steps_before_a_resume_do_not_count_for_the_rate() -> None:
    console, _, err, clock = make()
    with console.progress("train", 1000) as advance:
        advance(501)
        clock.seconds = 100.0
        advance(551)
    assert err.getvalue().splitlines()[-1] == "train  551/1000 steps  55 %  2.0 s/step  14 min 58 s left"


def test_an_unknown_total_is_counted_and_the_last_line_always_shown() -> None:
    console, _, err, _ = make()
    with console.progress("scan", None, unit="file") as advance:
        advance(1)
        advance(7)
    assert err.getvalue() == "scan  7 files\n"


def test_the_last_line_is_shown_when_a_stage_fails() -> None:
    console, _, err, _ = make()
    with pytest.raises(KeyboardInterrupt), console.progress("train", 100) as advance:
        advance(3)
        raise KeyboardInterrupt
    assert err.getvalue() == "train  3/100 steps  3 %\n"


def test_nothing_done_says_nothing() -> None:
    console, _, err, _ = make()
    with console.progress("train", 0):
        pass
    assert err.getvalue() == ""


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("total", [1600, None])
def test_a_bar_fits_its_terminal(width: int, encoding: str, total: int | None) -> None:
    console, out, err, clock = make(terminal=True, width=width, encoding=encoding)
    with console.progress("train-rpg {red}", total) as advance:
        advance(0)
        clock.seconds = 100.0
        advance(400, loss=0.23123, note="é" + HOSTILE)
        console.warn("in between")
    assert out.getvalue() == ""
    text = err.getvalue()
    assert text.endswith("\x1b[?25h")  # the cursor is back
    last = [line for line in plain(text).replace("\r", "\n").splitlines() if line.strip()][-1]
    assert cell_len(last) <= width
    assert last.startswith("train-rpg {red}") and "400" in last
    if width >= 80:
        assert "4.0 steps/s" in last and "loss 0.2312" in last and (total is None or "5 min 0 s left" in last)
        assert ("━" in last) is (encoding == "utf-8")
    assert "warning: in between" in text


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console, _, err, _ = make(terminal=True)
    with console.progress("train", 2) as advance:
        advance(2)
    assert err.getvalue() == "train  2/2 steps  100 %\n"


# ---------------------------------------------------------------------------------------------------------------------
# The library's log


@pytest.mark.parametrize(
    "verbose, lines",
    [
        (0, ["warning: look 3"]),
        (1, ["a note", "warning: look 3"]),
        (2, ["detail", "a note", "warning: look 3"]),
        (3, ["detail", "a note", "warning: look 3"]),
    ],
)
def test_the_log_of_the_library_follows_verbosity(verbose: int, lines: list[str]) -> None:
    console, out, err, _ = make(verbose=verbose)
    logger = logging.getLogger("rpgcli.layout")
    with console.listening():
        logger.debug("detail")
        logger.info("a note")
        logger.warning("look %d", 3)
    assert err.getvalue().splitlines() == lines
    assert out.getvalue() == ""


def test_listening_leaves_logging_as_it_was() -> None:
    logger = logging.getLogger("rpgcli")
    before = logger.level, logger.propagate, list(logger.handlers)
    with make()[0].listening():
        assert not logger.propagate
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_the_console_never_imports_torch() -> None:
    code = "import sys, rpgcli.console; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
