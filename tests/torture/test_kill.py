"""kill -9 at any moment of any stage: what is there is whole or refused, and --resume ends as if nothing had been."""

import random
import shutil
import signal
import time

import pytest

from rpgcli import artifact
from tests.torture.conftest import Record
from tests.torture.runs import BY_NAME, Reference, accepted, hashed, remains
from tests.torture.worker import Worker

MANY = pytest.param(50, marks=[pytest.mark.torture, pytest.mark.timeout(1800)])


@pytest.mark.parametrize("num_kills", [1, MANY])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_killed_stage_resumes_to_the_artifact_of_an_undisturbed_one(
    reference: Reference, tmp_path, record: Record, name, num_kills
):
    """Every second time at a moment when the disk changes or a step ends, otherwise at any time at all.

    Every fourth time the stage was about to replace an older artifact, which must be there whole until the new one is.
    """
    stage, draw = BY_NAME[name], random.Random(name)
    for i in range(num_kills):
        replacing = i % 4 == 3 and bool(stage.other)
        expected = reference.other(stage) if replacing else reference.made[name]
        old = reference.ids[name] if replacing else None
        run = (reference.copy if replacing else reference.before)(stage, tmp_path / "run")
        target = run / stage.folder
        places = [target, target.with_name(f"{target.name}.partial"), target.with_name(f".{target.name}.old")]
        force = ["--force"] if replacing else []
        command = stage.command(run, *force, changed=replacing)

        if i % 2 == 0:
            killed = Worker(*command, log=tmp_path / "log", die_at=draw.randint(1, expected.moments))
            assert killed.wait() == -signal.SIGKILL, killed.err
        else:
            killed = Worker(*command, log=tmp_path / "log")
            until = time.monotonic() + draw.uniform(0, expected.seconds)
            while time.monotonic() < until:
                assert {accepted(place) for place in places} <= {None, old, expected.id}
            killed.send(signal.SIGKILL)
            assert killed.wait() in (-signal.SIGKILL, 0), killed.err
        found = {accepted(place) for place in places}
        assert found <= {None, old, expected.id}
        if replacing:
            assert artifact.read(target, name).id in (old, expected.id)

        # Killed in the moment after its place was taken, nothing is left to resume.
        resumed = Worker(*stage.command(run, "--resume", *force, changed=replacing), log=tmp_path / "log")
        assert resumed.wait() == 0, resumed.err
        assert accepted(target) == expected.id
        assert hashed(target) == hashed(expected.path)
        assert remains(run) == []
        for earlier in list(BY_NAME)[: list(BY_NAME).index(name)]:
            assert accepted(run / BY_NAME[earlier].folder) == reference.ids[earlier]
        shutil.rmtree(run)
        record(f"kills survived, {name}", 1, 1)
