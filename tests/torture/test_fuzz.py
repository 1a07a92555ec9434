"""No file makes `inspect`, `verify` or a loader fail in another way than with our own errors."""

import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.torture.conftest import Record
from tests.torture.fuzz import TARGETS, mutations

EXAMPLES = {"inspect_tensors": 60, "inspect_and_verify": 40, "recipe": 250, "stored_recipe": 150}
"""About a second each."""
SECONDS = 16
"""Of the long test, for each of four targets."""


def explore(target: str, folder: Path, num_examples: int, start: int = 0) -> None:
    """Run a target on so many files."""

    @seed(start)
    @settings(
        max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(mutations(target))
    def run(data: bytes) -> None:
        TARGETS[target](data, folder)

    run()


@pytest.mark.parametrize("target", TARGETS)
def test_hypothesis_finds_no_other_failure(tmp_path, record: Record, target):
    explore(target, tmp_path, EXAMPLES[target])
    record("files tried by hypothesis", EXAMPLES[target], EXAMPLES[target])


@pytest.mark.torture
@pytest.mark.parametrize("target", TARGETS)
def test_atheris_finds_no_other_failure(tmp_path, record: Record, target):
    """Coverage-guided where it is installed; otherwise hypothesis for as long."""
    if find_spec("atheris") is None:
        until, tried = time.monotonic() + SECONDS, 0
        while time.monotonic() < until:
            explore(target, tmp_path, 100, start=tried)
            tried += 100
        record("files tried by hypothesis", tried, tried)
        return
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        command = [sys.executable, "-m", "tests.torture.fuzz", target, folder + "/work", str(SECONDS)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tried = int(re.findall(r"Done (\d+) runs", done.stderr)[-1])
    record("files tried by atheris", tried, tried)


def test_the_fuzzer_notices_a_failure(tmp_path, monkeypatch):
    """It can fail."""

    def broken(data: bytes, folder: Path) -> None:
        if b"\x1b" in data:
            raise KeyError("unforeseen")

    monkeypatch.setitem(TARGETS, "recipe", broken)
    with pytest.raises(KeyError):
        explore("recipe", tmp_path, 200)
