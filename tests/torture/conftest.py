"""What these tests share: the run that nobody disturbed, and the table of figures at the end."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.torture.runs import Reference

FIGURE = "figure"
Record = Callable[..., None]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Every stage, undisturbed."""
    return Reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """`record("kills survived, collect", 50, 50)`: so many of so many, summed over all tests that say the same words.

    Or `record("seconds from a signal to the end", most=0.4)`: the largest of all.
    """

    def note(what: str, good: int = 0, of: int = 0, most: float | None = None) -> None:
        request.node.user_properties.append((FIGURE, (what, good, of, most)))

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The figures of all tests that passed or failed."""
    sums: dict[str, list[Any]] = {}
    for report in (r for key in ("passed", "failed") for r in terminalreporter.stats.get(key, [])):
        for name, value in report.user_properties if report.when == "call" else []:
            if name == FIGURE:
                what, good, of, most = value
                entry = sums.setdefault(what, [0, 0, None])
                entry[0] += good
                entry[1] += of
                if most is not None:
                    entry[2] = most if entry[2] is None else max(entry[2], most)
    if sums:
        terminalreporter.section("figures")
        width = max(map(len, sums))
        for what, (good, of, most) in sorted(sums.items()):
            figure = f"{good:,} / {of:,}" if of else f"at most {most:.3g}"
            terminalreporter.write_line(f"{what:<{width}}  {figure}")
