"""Artifacts: the commit protocol under crashes, locks, and damage of every kind."""

import errno
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from rpgcli import artifact, rng
from rpgcli.artifact import BEGUN, MANIFEST, Artifact, Draft, canonical, read, read_json, verify
from rpgcli.errors import ArtifactError, Interrupted, OutputError, RpgError, UsageError
from rpgcli.progress import Step
from tests.helpers import make, raw, same_bits, stop_after

PRIMITIVES = ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync")
"""What changes the disk for good; everything that an artifact does to names goes through these functions of `os`."""


def content(value: float, facts: Mapping[str, Any] | None = None) -> Callable[[Draft], Mapping[str, Any]]:
    def body(draft: Draft) -> Mapping[str, Any]:
        draft.save_tensors("a.safetensors", {"w": torch.full((3,), value)})
        draft.save_json("b.json", {"value": value})
        return facts or {"value": value}

    return body


class Crash(BaseException):
    """The process is gone."""


@contextmanager
def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the process die just before its `step`-th change of the disk; nothing happens any more after that."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for name in PRIMITIVES:

            def call(do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                calls.append(do.__name__)
                if len(calls) > step:
                    raise Crash
                return do(*args, **kwargs)

            patch.setattr(os, name, partial(call, getattr(os, name)))
        yield calls


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock")}


def never(draft: Draft) -> Mapping[str, Any]:
    raise AssertionError("it was made already")


@pytest.mark.parametrize("replacing", [False, True], ids=["nothing there", "an older one there"])
def test_a_crash_between_any_two_steps_leaves_the_old_or_the_new_and_resume_finishes(tmp_path, monkeypatch, replacing):
    new_id = make(tmp_path / "other", content(2.0), section={"n": 2}).id
    outcomes = []
    for step in range(1000):
        target = tmp_path / str(step) / "zoo"
        old_id = make(target, content(1.0), section={"n": 1}).id if replacing else None
        try:
            with crash_at(step, monkeypatch):
                make(target, content(2.0), section={"n": 2}, force=replacing)
            crashed = False
        except Crash:
            crashed = True
        try:
            seen = read(target, "collect")
            assert not verify(seen.path)[1]
            outcomes.append("new" if seen.id == new_id else "old")
            assert seen.id in {old_id, new_id}
        except ArtifactError:
            assert not replacing, "what was there must never disappear"
            outcomes.append("none")
        if outcomes[-1] == "old":  # and a stage with the old settings has nothing to do
            assert make(target, never, section={"n": 1}).id == old_id
        finished = make(target, content(2.0), section={"n": 2}, force=replacing, resume=True)
        assert finished.id == new_id
        assert not verify(target)[1]
        assert names(target.parent) == {"zoo"}
        if not crashed:
            break
    assert not crashed
    first = "old" if replacing else "none"
    turn = outcomes.index("new")
    assert outcomes == [first] * turn + ["new"] * (len(outcomes) - turn)
    assert turn > 8  # the crashes were real: files, manifest and folders are synced one by one


def test_resume_takes_a_whole_partial_folder_as_it_is(tmp_path, monkeypatch):
    whole = make(tmp_path / "other", content(1.0)).id
    for step in range(1000):
        target = tmp_path / str(step) / "zoo"
        with pytest.raises(Crash), crash_at(step, monkeypatch):
            make(target, content(1.0))
        if (target.with_name("zoo.partial") / MANIFEST).exists():
            break
    with pytest.raises(ArtifactError, match="unfinished"):
        read(target, "collect")
    assert make(target, never, resume=True).id == whole


def test_everything_is_synced_before_it_is_relied_on(tmp_path, monkeypatch):
    """A power cut may undo what was not synced: files before the manifest, the manifest before the folder's name."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def shown(path: object) -> str:
        return Path(str(path)).name.removesuffix(".tmp")

    def traced_fsync(descriptor: int) -> None:
        events.append("sync " + shown(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def traced_move(move: Callable[..., None], source: object, target: object) -> None:
        events.append("move " + shown(source))
        move(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", partial(traced_move, rename))
    monkeypatch.setattr(os, "replace", partial(traced_move, replace))
    make(tmp_path / "run" / "zoo", content(1.0))
    for name in ("a.safetensors", "b.json", MANIFEST):
        last_sync = len(events) - 1 - events[::-1].index(f"sync {name}")
        assert last_sync < events.index(f"move {MANIFEST}") >= events.index(f"move {name}")
    assert events.index(f"sync {MANIFEST}") < events.index(f"move {MANIFEST}")
    assert events[events.index(f"move {MANIFEST}") :] == [
        f"move {MANIFEST}", "sync zoo.partial", "move zoo.partial", "sync run",
    ]  # fmt: skip


def test_an_error_leaves_nothing_unless_there_is_progress(tmp_path):
    def fail(resumable: bool) -> Callable[[Draft], Mapping[str, Any]]:
        def body(draft: Draft) -> Mapping[str, Any]:
            draft.save_json("b.json", 1)
            draft.resumable = resumable
            raise Interrupted(2)

        return body

    with pytest.raises(Interrupted):
        make(tmp_path / "zoo", fail(False))
    assert not names(tmp_path)
    with pytest.raises(Interrupted):
        make(tmp_path / "zoo", fail(True))
    assert names(tmp_path) == {"zoo.partial"}
    with pytest.raises(OutputError, match="unfinished") as error:
        make(tmp_path / "zoo", content(1.0))
    assert "--resume" in str(error.value)
    with pytest.raises(OutputError, match="other settings"):
        make(tmp_path / "zoo", content(1.0), section={"n": 2}, resume=True)
    assert make(tmp_path / "zoo", content(1.0), section={"n": 2}, force=True).facts == {"value": 1.0}
    assert names(tmp_path) == {"zoo"}


def test_a_finished_artifact_is_found_again_by_its_key_and_differences_are_listed(tmp_path):
    section = {"collect": {"num": 3, "rate": 1e-3, "widths": (1, 2)}, "seed": 0}
    first = make(tmp_path / "zoo", content(1.0), section=section)
    again = make(tmp_path / "zoo", content(9.0), section=section)
    assert first.made_now
    assert not again.made_now
    assert again.id == first.id
    other = {"collect": {"num": 4, "rate": 1e-3, "widths": (1, 2)}, "extra": "x" * 500, "seed": 0}
    with pytest.raises(OutputError) as error:
        make(tmp_path / "zoo", content(1.0), section=other)
    lines = str(error.value).splitlines()
    assert "  collect.num: 3 there, 4 now" in lines
    assert not any("rate" in line or "widths" in line or "seed" in line for line in lines)
    assert max(map(len, lines[1:])) < 120
    with pytest.raises(OutputError, match=r"what it was made from has changed since: zoo"):
        with artifact.draft(
            tmp_path / "t", "tokenize", section={}, inputs={"zoo": "1"}, force=False, resume=False
        ) as d:
            d.commit({}, {})
        with artifact.draft(tmp_path / "t", "tokenize", section={}, inputs={"zoo": "2"}, force=False, resume=False):
            pass


def test_the_id_depends_on_content_alone(tmp_path):
    def timed(seconds: float, value: float = 1.0) -> Callable[[Draft], Mapping[str, Any]]:
        def body(draft: Draft) -> Mapping[str, Any]:
            draft.save_tensors("a.safetensors", {"w": torch.tensor([value])})
            draft.save_json("times.json", {"seconds": seconds}, varies=True)
            return {"n": 1}

        return body

    one, two, other = (
        make(tmp_path / n, timed(s, v)) for n, s, v in [("1", 0.5, 1.0), ("2", 7.0, 1.0), ("3", 0.5, 2.0)]
    )
    assert one.id == two.id != other.id
    assert read(tmp_path / "1", "collect").id == one.id
    assert read(tmp_path / "2", "collect").json("times.json") == {"seconds": 7.0}  # checked all the same
    assert one.manifest.volatile["seconds"] == 1.5


def test_the_key_is_that_of_what_was_asked_for(tmp_path):
    keys = {
        make(tmp_path / str(i), content(1.0), stage=stage, section=section).manifest.key
        for i, (stage, section) in enumerate([("collect", {}), ("collect", {"n": 1}), ("tokenize", {"n": 1})])
    }
    assert len(keys) == 3
    assert make(tmp_path / "again", content(5.0), section={"n": 1}).manifest.key in keys


# --- locks ------------------------------------------------------------------------------------------------------------


def hold_in_child(target: Path) -> tuple[int, int]:
    """A child process inside the draft of `target`: its pid, and the pipe it has written to."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with artifact.draft(target, "collect", section={}, inputs={}, force=False, resume=False):
            os.write(writing, b"x")
            signal.pause()
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    return pid, reading


def test_a_second_writer_is_told_the_pid_and_the_lock_dies_with_its_process(tmp_path):
    target = tmp_path / "zoo"
    pid, pipe = hold_in_child(target)
    try:
        with pytest.raises(OutputError, match=rf"pid {pid}\b"):
            make(target, content(1.0), resume=True)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pipe)
    assert make(target, content(1.0), resume=True).facts == {"value": 1.0}


def test_a_draft_inside_a_draft_of_the_same_target_is_refused(tmp_path):
    def body(draft: Draft) -> Mapping[str, Any]:
        with pytest.raises(OutputError, match=rf"pid {os.getpid()}\b"):
            make(tmp_path / "zoo", content(2.0), force=True)
        make(tmp_path / "tokens", content(2.0))  # another target is free
        return content(1.0)(draft)

    assert make(tmp_path / "zoo", body).facts == {"value": 1.0}


def test_a_lock_file_with_garbage_does_no_harm(tmp_path):
    (tmp_path / ".zoo.lock").write_bytes(b"\xff\xfe" * 50)
    assert make(tmp_path / "zoo", content(1.0)).facts == {"value": 1.0}


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "zoo"
    make(folder, content(1.0, {"networks": [{"file": "a.safetensors", "task_bits": "0110"}]}), section={"n": 1})
    return folder


@pytest.fixture
def zoo(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "zoo")
    return tmp_path / "zoo"


def use(folder: Path) -> Artifact:
    """Read everything in an artifact as a stage would."""
    found = read(folder, "collect")
    for name in found.manifest.all_files():
        if name.endswith(".safetensors"):
            found.tensors(name)
        else:
            found.json(name)
    return found


def test_what_was_written_is_read(zoo):
    assert same_bits(use(zoo).tensors("a.safetensors"), {"w": torch.ones(3)})
    assert verify(zoo)[1] == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(whole, tmp_path, data):
    """Everywhere but in `volatile`, which holds nothing that matters but hashes of files outside the id."""
    folder = tmp_path / "zoo"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    before = use(folder)
    path = folder / data.draw(st.sampled_from(["a.safetensors", "b.json", MANIFEST]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        after = use(folder)
    except ArtifactError:
        return
    assert path.name == MANIFEST
    assert after.id == before.id
    assert after.manifest.model_copy(update={"volatile": {}}) == before.manifest.model_copy(update={"volatile": {}})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_truncation_is_found(whole, tmp_path, data):
    folder = tmp_path / "zoo"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    path = folder / data.draw(st.sampled_from(["a.safetensors", "b.json", MANIFEST]))
    size = data.draw(st.integers(0, path.stat().st_size - 2))  # the last byte of a manifest is its line end
    os.truncate(path, size)
    with pytest.raises(ArtifactError):
        use(folder)


def swap(zoo: Path) -> None:
    a, b = (zoo / n for n in ("a.safetensors", "b.json"))
    a.rename(zoo / "t")
    b.rename(a)
    (zoo / "t").rename(b)


def link(zoo: Path) -> None:
    (zoo / "a.safetensors").rename(zoo.parent / "elsewhere")
    (zoo / "a.safetensors").symlink_to(zoo.parent / "elsewhere")


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def damage(zoo: Path) -> None:
        value = json.loads((zoo / MANIFEST).read_text())
        (zoo / MANIFEST).write_bytes(canonical({**value, **changes}))

    return damage


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda zoo: (zoo / name).write_bytes(content)


def instead(name: str, put: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(zoo: Path) -> None:
        (zoo / name).unlink()
        put(zoo / name)

    return damage


def replace_in_manifest(old: bytes, new: bytes) -> Callable[[Path], None]:
    def damage(zoo: Path) -> None:
        content = (zoo / MANIFEST).read_bytes()
        assert old in content
        (zoo / MANIFEST).write_bytes(content.replace(old, new, 1))

    return damage


def forge_volatile_hash(zoo: Path) -> None:
    """Put another file in place and its hash where the id does not look."""
    (zoo / "b.json").write_bytes(b"{}\n")
    value = json.loads((zoo / MANIFEST).read_text())
    value["volatile"]["files"] = {"b.json": {"size": 3, "sha256": artifact._hash(zoo / "b.json")}}
    (zoo / MANIFEST).write_bytes(canonical(value))


RECORD = {"size": 3, "sha256": "0" * 64}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a missing file": lambda zoo: (zoo / "b.json").unlink(),
    "swapped files": swap,
    "a symbolic link": link,
    "a folder in place of a file": instead("b.json", Path.mkdir),
    "a pipe in place of a file": instead("b.json", os.mkfifo),
    "no manifest": lambda zoo: (zoo / MANIFEST).unlink(),
    "an empty manifest": overwrite(MANIFEST, b""),
    "a manifest that is a list": overwrite(MANIFEST, b"[]"),
    "a deeply nested manifest": overwrite(MANIFEST, b"[" * 100_000),
    "an endless number": overwrite(MANIFEST, b"9" * 100_000),
    "another encoding": overwrite(MANIFEST, b"\xff\xfe{}"),
    "a duplicate key": replace_in_manifest(b'"stage":', b'"stage":"collect","stage":'),
    "NaN": replace_in_manifest(b'"n":1', b'"n":NaN'),
    "infinity": replace_in_manifest(b'"n":1', b'"n":1e999'),
    "a lone surrogate": replace_in_manifest(b'"n":1', b'"n":"\\ud800"'),
    "an unknown key": edit_manifest(more=1),
    "another schema": edit_manifest(schema=2),
    "a schema that only equals 1": edit_manifest(schema=True),
    "another section": edit_manifest(section={"n": 2}),
    "other facts": edit_manifest(facts={"networks": []}),
    "another stage": edit_manifest(stage="tokenize"),
    "files that are no mapping": edit_manifest(volatile={"files": [1]}),
    "a path out of the folder": edit_manifest(volatile={"files": {"../x": RECORD}}),
    "an absolute path": edit_manifest(volatile={"files": {"/etc/passwd": RECORD}}),
    "a control character in a name": edit_manifest(volatile={"files": {"a\nb": RECORD}}),
    "a hidden name": edit_manifest(volatile={"files": {".a": RECORD}}),
    "the manifest as its own file": edit_manifest(volatile={"files": {MANIFEST: RECORD}}),
    "a hash outside the id for a file inside it": forge_volatile_hash,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_the_message_says_what_to_do(zoo, damage):
    damage(zoo)
    with pytest.raises(ArtifactError) as error:
        use(zoo)
    assert error.value.exit_code == 3
    assert error.value.what.endswith((".", ":"))


def test_verify_lists_every_problem(zoo):
    (zoo / "a.safetensors").write_bytes(b"x")
    (zoo / "b.json").unlink()
    (zoo / "extra").write_bytes(b"x")
    problems = verify(zoo)[1]
    assert len(problems) == 3
    assert any("extra is not in the manifest" in p for p in problems)


def test_reading_says_which_command_makes_what_is_missing(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist") as error:
        read(tmp_path / "zoo", "collect")
    assert "rpg collect" in str(error.value)
    make(tmp_path / "zoo", content(1.0), stage="tokenize")
    with pytest.raises(ArtifactError, match="made by `rpg tokenize`"):
        read(tmp_path / "zoo", "collect")


def header_of(size: int, header: bytes) -> bytes:
    return size.to_bytes(8, "little") + header


ENTRY = '{"w":{"dtype":"%s","shape":%s,"data_offsets":[0,%d]}}'
BAD_TENSORS = {
    "empty": b"",
    "a huge header": header_of(2**62, b"{}"),
    "a header longer than the file": header_of(100, b"{}"),
    "a header that is no JSON": header_of(2, b"xx"),
    "an unknown dtype": header_of(62, (ENTRY % ("F31", "[1]", 4)).encode().ljust(62)) + b"\0" * 4,
    "data that are too short": header_of(62, (ENTRY % ("F32", "[2]", 8)).encode().ljust(62)) + b"\0" * 4,
    "a shape that overflows": header_of(90, (ENTRY % ("F32", "[9223372036854775807,9]", 4)).encode().ljust(90))
    + b"\0" * 4,
}


@pytest.mark.parametrize("data", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError):
        artifact.read_tensors(tmp_path / "a.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.integers(0, 120), st.integers(0, 8))
def test_no_header_makes_the_reader_fail_in_another_way(tmp_path, junk, at, length):
    path = tmp_path / "a.safetensors"
    artifact.write_tensors(path, {"w": torch.ones(2), "v": torch.zeros(1, dtype=torch.int64)})
    content = path.read_bytes()
    path.write_bytes(content[:at] + junk + content[at + length :])
    with suppress(ArtifactError):
        artifact.read_tensors(path)


# --- files ------------------------------------------------------------------------------------------------------------


def test_safetensors_files_carry_one_metadata_key_and_the_same_bytes(tmp_path):
    tensors = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.bfloat16)}
    header = {"b": 1, "a": [2]}
    artifact.write_tensors(tmp_path / "1", tensors, header)
    artifact.write_tensors(tmp_path / "2", dict(reversed(tensors.items())), dict(reversed(header.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with safe_open(tmp_path / "1", framework="pt") as file:
        assert file.metadata() == {"rpg": '{"a":[2],"b":1}'}


def test_files_are_written_as_the_library_writes_them(tmp_path):
    """Its bytes, so that an artifact has the id that it had when the library wrote it."""
    tensors = {
        f"{kind} é".replace("torch.", ""): torch.arange(6).reshape(2, 3).to(kind) for kind in reversed(artifact.DTYPES)
    }
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(5), "a": torch.randn(3, generator=rng.stream(0))}
    artifact.write_tensors(tmp_path / "ours", tensors, {"z": [1]})
    save_file(tensors, tmp_path / "theirs", metadata={"rpg": '{"z":[1]}'})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_work_ahead_keeps_its_order_and_goes_no_further_than_it_is_asked_to():
    begun = []

    def work(i):
        begun.append(i)
        return i * i

    found = artifact.ahead(work, range(6), num_ahead=2)
    assert begun == []
    for i, value in enumerate(found):
        assert value == i * i
        assert i + 1 <= len(begun) <= i + 3
    assert begun == list(range(6))
    assert list(artifact.ahead(work, [])) == []


def test_what_goes_wrong_ahead_is_told_in_its_turn():
    found = artifact.ahead(lambda i: 1 // i, [2, 1, 0, 1])
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_a_file_can_be_written_piece_by_piece_in_any_order(tmp_path):
    whole = {"a": torch.arange(6.0).reshape(3, 2), "n": torch.tensor(5), "b": torch.ones(4).bfloat16()}
    artifact.write_tensors(tmp_path / "whole", whole)
    with artifact.writing_tensors(tmp_path / "pieces", {k: v.to("meta") for k, v in whole.items()}) as append:
        append("b", whole["b"][:1])
        append("a", whole["a"][:2])
        append("n", whole["n"])
        append("b", whole["b"][1:])
        append("a", whole["a"][2:])
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_file_that_is_not_whole_is_never_there(tmp_path):
    like = {"a": torch.empty(4, device="meta")}
    with pytest.raises(AssertionError), artifact.writing_tensors(tmp_path / "a", like) as append:
        append("a", torch.zeros(3))
    with pytest.raises(AssertionError), artifact.writing_tensors(tmp_path / "a", like) as append:
        append("a", torch.zeros(5))
    with pytest.raises(AssertionError), artifact.writing_tensors(tmp_path / "a", like) as append:
        append("a", torch.zeros(4, dtype=torch.int32))
    with pytest.raises(KeyboardInterrupt), artifact.writing_tensors(tmp_path / "a", like) as append:
        append("a", torch.zeros(4))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_fact_that_an_older_version_did_not_write_is_named_with_what_to_run(tmp_path):
    facts = make(tmp_path / "zoo", content(1.0)).facts
    assert facts.get("condition") is None
    with pytest.raises(ArtifactError, match="says nothing of 'condition'") as error:
        facts["condition"]
    assert "--force" in str(error.value)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_are_as_open_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = make(tmp_path / "zoo", content(1.0)).path
        modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["a.safetensors", "b.json", MANIFEST], 0o666 & ~umask)


def test_tensors_that_share_memory_are_all_written(tmp_path):
    base = torch.arange(6.0)
    tied = {"a": base, "b": base, "rows": base.view(2, 3), "part": base[2:4], "t": base.view(2, 3).t()}
    tied |= {"parameter": torch.nn.Parameter(base), "empty": torch.zeros(0), "nothing": torch.zeros(0, 3)}
    artifact.write_tensors(tmp_path / "a.safetensors", tied)
    found = artifact.read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tied.keys()
    assert all(raw(found[n]) == raw(v.detach()) and found[n].shape == v.shape for n, v in tied.items())
    assert torch.equal(base, torch.arange(6.0))


@pytest.mark.parametrize("name", ["../a.json", "a/b.json", ".a", "a.", "a b", "", "a\n"])
def test_file_names_cannot_leave_the_folder(tmp_path, name):
    def body(draft: Draft) -> Mapping[str, Any]:
        draft.add(name)
        return {}

    with pytest.raises(AssertionError):
        make(tmp_path / "zoo", body)


def test_working_files_are_gone_after_the_commit(tmp_path):
    def body(draft: Draft) -> Mapping[str, Any]:
        (draft.path / "checkpoint.safetensors").write_bytes(b"x")
        return content(1.0)(draft)

    assert names(make(tmp_path / "zoo", body).path) == {"a.safetensors", "b.json", MANIFEST}


@pytest.mark.parametrize("function", ["safe_open", "load_file"])
def test_a_file_that_another_process_moves_while_it_is_read_is_a_problem_and_no_crash(tmp_path, monkeypatch, function):
    """torch, which maps it, then raises a RuntimeError."""
    path = make(tmp_path / "zoo", content(1.0)).path

    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to open file in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(artifact, function, gone)
    with pytest.raises(ArtifactError, match=r"a\.safetensors cannot be read: unable to open"):
        artifact.read_tensors(path / "a.safetensors")
    if function == "safe_open":
        assert "cannot be read: unable to open" in verify(path)[1][0]


def test_a_full_disk_is_one_clear_message_and_nothing_is_lost(tmp_path, monkeypatch):
    old = make(tmp_path / "zoo", content(1.0))

    def no_space(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(RpgError, match="No space left on device") as error:
            make(tmp_path / "zoo", content(2.0), section={"n": 2}, force=True)
    assert error.value.exit_code == 1
    assert use(tmp_path / "zoo").id == old.id


def test_a_folder_of_the_user_is_never_replaced_or_deleted(tmp_path):
    for name in ("zoo", "zoo.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("x")
    for force in (False, True):
        with pytest.raises(ArtifactError, match="not an artifact of rpg"):
            make(tmp_path / "zoo", content(1.0), force=force)
    make(tmp_path / "zoo2", content(1.0))
    shutil.copytree(tmp_path / "zoo2", tmp_path / "zoo2.old")  # a copy kept under an obvious name
    make(tmp_path / "zoo2", content(2.0), section={"n": 2}, force=True)
    assert names(tmp_path) == {"zoo", "zoo.old", "zoo2", "zoo2.old"}
    assert (tmp_path / "zoo" / "thesis.tex").exists()
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "zoo"):
        with pytest.raises(UsageError, match="a file is in the way"):
            make(target, content(1.0), force=True)


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "zoo").mkdir()
    assert make(tmp_path / "zoo", content(1.0)).made_now
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(ArtifactError, match="not an artifact of rpg"):  # a link of the user stays
        make(tmp_path / "link", content(1.0))


def test_an_unwritable_place_is_a_usage_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anywhere
    with pytest.raises(UsageError, match="cannot be written"):
        make(tmp_path / "zoo", content(1.0))


def test_canonical_json_is_one_text():
    assert canonical({"b": [1, 2.5, None, True], "a": "ä"}) == '{"a":"ä","b":[1,2.5,null,true]}'.encode()
    assert canonical({"x": (1, 2)}) == canonical({"x": [1, 2]})
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(float("nan"))


def test_json_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[" + "1," * 50 + "1]")
    monkeypatch.setattr(artifact, "MAX_JSON_BYTES", 50)
    with pytest.raises(ArtifactError, match="larger than"):
        read_json(tmp_path / "a.json")


def test_begun_and_helpers_are_what_they_say(tmp_path):
    on_step = stop_after(2)
    on_step(Step(1, 2))
    with pytest.raises(Interrupted):
        on_step(Step(2, 2))
    seen = []

    def body(draft: Draft) -> Mapping[str, Any]:
        seen.append(read_json(draft.path / BEGUN)["stage"])
        return {}

    assert not (make(tmp_path / "zoo", body).path / BEGUN).exists()
    assert seen == ["collect"]
