"""What tests share: a way to run `rpg` inside this process, and one tiny run of the whole pipeline."""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import network

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Read when torch is imported: tests are small, and several processes share the cores."""

SMALL_RPG = [
    "tokens.token_dim=64", "rpg.core.d_model=64", "rpg.core.headdim=16", "rpg.core.d_state=32", "rpg.core.num_layers=1",
    "rpg.denoiser.width=64", "rpg.denoiser.depth=1", "rpg.training.num_steps=6", "rpg.training.batch_size=4",
    "rpg.selection.num_steps=[2]", "rpg.selection.temperatures=[0.5]", "evaluate.mlp=[{width: 16, num_steps: 4}]",
]  # fmt: skip
TINY = [
    "collect.num_seen=8", "collect.num_validation=4", "collect.num_unseen=4", "collect.block=8", "collect.snapshots=1",
    "collect.training.epochs=1", "collect.pretrain.epochs=1", *SMALL_RPG,
]  # fmt: skip


def settings(assignments: list[str]) -> list[str]:
    """`--set` options."""
    return [word for assignment in assignments for word in ("--set", assignment)]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0])

    @property
    def last(self) -> str:
        """The last line on stderr."""
        return self.err.splitlines()[-1]


Rpg = Callable[..., Outcome]


def run_rpg(*arguments: object, stdin: str = "", terminal: bool = False) -> Outcome:
    """Run the command line in this process, as the console script does; an unforeseen exception passes through."""
    from rpgcli.cli import main

    out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    hook = sys.excepthook
    with (
        mock.patch.object(sys, "argv", ["rpg", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit_:
            assert isinstance(exit_.code, int)
            return Outcome(exit_.code, out.getvalue(), err.getvalue())
        finally:
            sys.excepthook = hook
    raise AssertionError("main always exits")


@pytest.fixture(scope="session")
def rpg() -> Rpg:
    """`rpg("collect", "--run", folder)` runs a command and returns its `Outcome`."""
    return run_rpg


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """The whole time."""
    with network.none():
        yield


@pytest.fixture(autouse=True)
def nobody_reached(no_network: None) -> Iterator[None]:
    """A test that tries to reach a network fails."""
    yield
    tried = [*network.ATTEMPTS]
    network.ATTEMPTS.clear()
    assert not tried, f"the network was tried: {tried}"


@dataclass(frozen=True)
class TinyRun:
    """A finished run on a few digits tasks, and how each stage ended."""

    folder: Path
    collect: list[str]
    """The options that its zoo was collected with."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A whole pipeline in seconds; its networks are bad, its artifacts are real. Do not change it: copy `run`."""
    found = TinyRun(tmp_path_factory.mktemp("tiny") / "run", settings(TINY))
    for stage in ("collect", "tokenize", "train-rpg", "generate", "evaluate"):
        more = found.collect if stage == "collect" else []
        found.outcomes[stage] = run_rpg(stage, "--run", found.folder, *more)
        assert found.outcomes[stage].code == 0, found.outcomes[stage].err
    return found


@pytest.fixture
def run(tiny: TinyRun, tmp_path: Path) -> Path:
    """A copy of the tiny run that a test may damage."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "run"))
