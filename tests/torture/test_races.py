"""Two processes on one run: one does the work, the other is told who does."""

import signal
import time

import pytest

from tests.torture.conftest import Record
from tests.torture.runs import STAGES, Reference, accepted, remains
from tests.torture.worker import PATIENCE, Worker

MANY = pytest.param(20, marks=[pytest.mark.torture, pytest.mark.timeout(1800)])


def first_to_end(pair: list[Worker]) -> tuple[Worker, Worker]:
    """The process that ended, and the one that still works."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for one, other in (pair, pair[::-1]):
            if not one.process.is_alive():
                return one, other
        time.sleep(0.01)
    raise TimeoutError("both are at work")


@pytest.mark.parametrize("num_pairs", [3, MANY])
def test_of_two_processes_one_wins_and_the_other_ends_with_4_and_its_name(
    reference: Reference, tmp_path, record: Record, num_pairs
):
    """The winner waits at its first step until the loser has ended, so both at work would never end.

    Every second winner is killed then: its lock must have died with it.
    """
    for i in range(num_pairs):
        stage = STAGES[i % len(STAGES)]
        run = reference.before(stage, tmp_path / str(i))
        pair = [Worker(*stage.command(run), log=tmp_path / f"log-{i}-{side}", begin=False, hold_at=1) for side in "ab"]
        for worker in pair:
            worker.plan.begin.set()
        loser, winner = first_to_end(pair)
        assert winner.plan.reached.wait(PATIENCE)
        assert loser.wait() == 4, loser.err
        assert f"is being written by another process (pid {winner.pid})" in loser.err
        if i % 2:
            winner.send(signal.SIGKILL)
            assert winner.wait() == -signal.SIGKILL
            winner = Worker(*stage.command(run, "--resume"), log=tmp_path / f"log-{i}-c")
        else:
            winner.plan.released.set()
        assert winner.wait() == 0, winner.err
        assert accepted(run / stage.folder) == reference.ids[stage.name]
        assert remains(run) == []
        record("races with one winner", 1, 1)
