"""SIGINT and SIGTERM: a stage ends at its next step with all that it needs to go on, at a second signal at once."""

import random
import signal
import time

import pytest

from rpgcli.training import CHECKPOINT
from tests.torture.conftest import Record
from tests.torture.runs import BY_NAME, Reference, accepted, hashed, remains
from tests.torture.worker import PATIENCE, Worker

TRAINS = {"train-rpg", "train-ae", "train-diffusion"}
SECONDS = 5.0
"""From the signal to the end, at most."""
CASES = [("collect", signal.SIGTERM), ("train-diffusion", signal.SIGINT)]
OTHERS = [(name, number) for name in BY_NAME for number in (signal.SIGINT, signal.SIGTERM)]
CASES += [pytest.param(*case, marks=pytest.mark.torture) for case in OTHERS if case not in CASES]  # type: ignore[misc]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_signal_ends_a_stage_with_its_checkpoint(reference: Reference, tmp_path, record: Record, name, number):
    stage = BY_NAME[name]
    run = reference.before(stage, tmp_path / "run")
    step = random.Random(f"{name} {number}").randint(1, 8 if name in TRAINS else 3)
    worker = Worker(*stage.command(run), log=tmp_path / "log", hold_at=step)
    assert worker.plan.reached.wait(PATIENCE), worker.err
    worker.send(number)
    begun = time.monotonic()
    worker.plan.released.set()
    assert worker.wait() == 128 + number, worker.err
    seconds = time.monotonic() - begun
    assert seconds < SECONDS
    assert f"error: stopped by signal {int(number)}" in worker.err and "Traceback" not in worker.err
    if name in TRAINS:
        assert (run / f"{stage.folder}.partial" / CHECKPOINT).is_file()
    assert accepted(run / stage.folder) is None
    resumed = Worker(*stage.command(run, "--resume"), log=tmp_path / "log")
    assert resumed.wait() == 0, resumed.err
    assert hashed(run / stage.folder) == hashed(reference.made[name].path)
    assert accepted(run / stage.folder) == reference.ids[name]
    record("stages ended by a signal with their checkpoint", 1, 1)
    record("seconds from a signal to the end", most=seconds)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.torture)])
def test_a_second_signal_ends_a_stage_at_once(reference: Reference, tmp_path, record: Record, number):
    """In the middle of a step that never ends."""
    stage = BY_NAME["train-rpg"]
    run = reference.before(stage, tmp_path / "run")
    worker = Worker(*stage.command(run), log=tmp_path / "log", hold_at=2)
    assert worker.plan.reached.wait(PATIENCE), worker.err
    worker.send(number)
    while "once more stops at once" not in worker.err:
        assert worker.process.is_alive()
        time.sleep(0.01)
    begun = time.monotonic()
    worker.send(number)
    assert worker.wait() == 128 + number, worker.err
    record("seconds from a second signal to the end", most=time.monotonic() - begun)
    resumed = Worker(*stage.command(run, "--resume"), log=tmp_path / "log")
    assert resumed.wait() == 0, resumed.err
    assert accepted(run / stage.folder) == reference.ids["train-rpg"]
    assert remains(run) == []
