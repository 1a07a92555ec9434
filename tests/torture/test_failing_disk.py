"""Every call to the disk fails once, and disks are really full: one clear message, and nothing is lost."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rpgcli import artifact
from rpgcli.artifact import Draft
from rpgcli.errors import RpgError
from tests.conftest import run_rpg
from tests.helpers import make
from tests.test_cli import tree
from tests.torture.conftest import Record
from tests.torture.failing import FailingDisk
from tests.torture.runs import BY_NAME, Reference, accepted, hashed, remains
from tests.torture.worker import Worker

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EINTR": errno.EINTR}
TORTURE = [pytest.mark.torture, pytest.mark.timeout(1800)]


def body(draft: Draft) -> Mapping[str, Any]:
    draft.save_tensors("a.safetensors", {"w": torch.full((3,), 2.0)})
    draft.resumable = True
    draft.save_json("b.json", {"value": 2.0})
    return {"value": 2.0}


@pytest.mark.parametrize("replacing", [False, True], ids=["nothing there", "an older one there"])
@pytest.mark.parametrize(
    ("number", "on"),
    [
        pytest.param(errno.ENOSPC, False, id="ENOSPC"),
        pytest.param(errno.EIO, True, id="EIO from then on", marks=pytest.mark.torture),
        pytest.param(errno.EIO, False, id="EIO", marks=pytest.mark.torture),
        pytest.param(errno.EINTR, False, id="EINTR", marks=pytest.mark.torture),
        pytest.param(errno.ENOSPC, True, id="ENOSPC from then on", marks=pytest.mark.torture),
    ],
)
def test_every_call_of_the_commit_protocol_may_fail(tmp_path, record: Record, number, replacing, on):
    new_id = make(tmp_path / "new", body, section={"n": 2}).id
    kinds = set()
    for at in range(1, 1000):
        target = tmp_path / str(at) / "zoo"
        old_id = make(target, body, section={"n": 1}).id if replacing else None
        with FailingDisk(tmp_path, at, number, on=on) as disk:
            try:
                make(target, body, section={"n": 2}, force=replacing)
            except RpgError as error:
                assert error.exit_code == 1
                assert str(tmp_path / str(at)) in error.what
                assert os.strerror(number) in error.what
                if disk.failed == "write" and ".lock" not in error.what:
                    assert " bytes; " in error.what
        if not disk.failed:
            break
        kinds.add(disk.failed)
        if replacing:
            assert artifact.read(target, "collect").id in (old_id, new_id)
        for place in (target, target.with_name("zoo.partial")):
            assert accepted(place) in (None, old_id, new_id)
        assert make(target, body, section={"n": 2}, force=replacing, resume=True).id == new_id
        assert not artifact.verify(target)[1]
        assert remains(target.parent) == []
        record("failing calls injected into the commit protocol, nothing lost", 1, 1)
    assert kinds == {"mkdir", "open", "write", "fsync", "rename", "replace"}


@pytest.mark.parametrize(
    ("name", "every"),
    [("train-ae", 41), ("tokenize", 7), *(pytest.param(name, 1, marks=TORTURE) for name in BY_NAME)],
)
def test_every_call_of_a_stage_may_fail(reference: Reference, tmp_path, record: Record, monkeypatch, name, every):
    """Each with one of the errors in turn, and all three of them in the long test."""
    monkeypatch.setattr("rpgcli.evaluation.page.EXTRA", ("no-pictures",))  # Drawing takes seconds.
    stage, numbers = BY_NAME[name], list(ERRORS.values())
    for turn, number in enumerate(numbers if every == 1 else numbers[1:2]):
        for at in range(1 + turn, 10_000, every):
            run = reference.before(stage, tmp_path / "run")
            before = tree(run)
            with FailingDisk(run, at, number) as disk:
                outcome = run_rpg(*stage.command(run))
            if not disk.failed:
                assert outcome.code == 0, outcome.err
                shutil.rmtree(run)
                break
            target = run / stage.folder
            if outcome.code == 0:  # Python tries again what was only interrupted; the folder of the run exists.
                assert number == errno.EINTR or disk.failed == "mkdir", f"{at} {disk.failed}"
            else:
                assert outcome.code == 1, f"{at} {disk.failed}: {outcome.code} {outcome.err}"
                assert outcome.err.count("error: ") == 1 and "Traceback" not in outcome.err
                message = outcome.err.partition("error: ")[2]
                assert str(run) in message and os.strerror(number) in message, message
            ours = tree(run)
            assert {path: digest for path, digest in ours.items() if path in before} == before
            for place in (target, target.with_name(f"{target.name}.partial")):
                assert accepted(place) in (None, reference.ids[name])
            outcome = run_rpg(*stage.command(run, "--resume"))
            assert outcome.code == 0, outcome.err
            assert accepted(target) == reference.ids[name]
            assert hashed(target) == hashed(reference.made[name].path)
            assert remains(run) == []
            shutil.rmtree(run)
            record(f"failing calls injected into {name}, nothing lost", 1, 1)


# --- a disk that is really full ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["collect", pytest.param("train-rpg", marks=pytest.mark.torture)])
@pytest.mark.parametrize("limit", [0, 1000, pytest.param(4096, marks=pytest.mark.torture)])
def test_no_file_can_grow_larger(reference: Reference, tmp_path, record: Record, name, limit):
    """RLIMIT_FSIZE: the write itself fails, wherever it comes from."""
    stage = BY_NAME[name]
    run = reference.before(stage, tmp_path / "run")
    before = tree(run)
    starved = Worker(*stage.command(run), log=tmp_path / "log", file_bytes=limit)
    assert starved.wait() == 1
    assert "could not be written" in starved.err and os.strerror(errno.EFBIG) in starved.err
    assert {path: digest for path, digest in tree(run).items() if path in before} == before
    fed = Worker(*stage.command(run, "--resume"), log=tmp_path / "log")
    assert fed.wait() == 0, fed.err
    assert accepted(run / stage.folder) == reference.ids[name]
    record("full disks survived", 1, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "name", ["train-rpg", *(pytest.param(n, marks=pytest.mark.torture) for n in ("collect", "tokenize", "train-ae"))]
)
def test_a_full_disk(reference: Reference, tmp_path, small_disk, record: Record, name):
    stage, out = BY_NAME[name], small_disk / "there" / "out"
    run = reference.before(stage, tmp_path / "run")
    (small_disk / "ballast").write_bytes(bytes({"tokenize": 40 << 10}.get(name, 0)))
    starved = Worker(*stage.command(run, "--out", out), log=tmp_path / "log")
    assert starved.wait() == 1
    assert str(small_disk) in starved.err and os.strerror(errno.ENOSPC) in starved.err
    assert " bytes; " in starved.err
    assert accepted(out) is None
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    fed = Worker(*stage.command(run, "--out", out, "--resume"), log=tmp_path / "log")
    assert fed.wait() == 0, fed.err
    assert accepted(out) == reference.ids[name]
    assert remains(small_disk) == []
    record("full disks survived", 1, 1)
