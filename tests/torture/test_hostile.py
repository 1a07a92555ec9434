"""Files from strangers: only our own errors, within 2 s and 500 MiB, and nothing outside the run is touched."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from rpgcli.artifact import BEGUN, MANIFEST, canonical
from rpgcli.training import CHECKPOINT
from tests.torture import hostile
from tests.torture.conftest import Record
from tests.torture.hostile import Seen
from tests.torture.runs import BY_NAME, Reference
from tests.torture.worker import Worker, call

SECONDS, MIB = 2.0, 500.0
SMALL = 500_000
"""Larger files are part of the long test alone, which also looks at the clock."""
LONG = pytest.param(True, marks=[pytest.mark.torture, pytest.mark.timeout(1800)])
both = pytest.mark.parametrize("long", [False, LONG], ids=["short", "long"])
OURS = {"ok", "ArtifactError", "LayoutError", "RecipeError", "UsageError", *(f"exit {code}" for code in range(5))}


def snapshot(folder: Path) -> dict[str, tuple[int, ...] | bytes]:
    """All that can be seen of the files outside the run."""
    found: dict[str, tuple[int, ...] | bytes] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_uid)
        if path.is_file():
            found[f"{path} content"] = path.read_bytes()
    return found


def corpus_of(files: Mapping[str, bytes], long: bool) -> dict[str, bytes]:
    """The files, of the large ones only as many as there is time for."""
    return {what: content for what, content in files.items() if long or len(content) < SMALL}


def judge(what: str, seen: Seen, record: Record, long: bool) -> None:
    text = f"{what}: {seen}"[:1000]
    assert seen.ended in OURS, text
    assert "internal error" not in seen.text and "Traceback" not in seen.text, text
    assert seen.text.replace("\n", "").isprintable(), text  # Nothing that a terminal obeys.
    assert not long or seen.seconds < SECONDS, text
    assert seen.mib < MIB, text
    record("hostile files that ended in our own errors", 1, 1)
    record("processor seconds for a hostile file", most=seen.seconds)
    record("MiB for a hostile file", most=seen.mib)


def show(corpus: Mapping[str, list[list[str]]], record: Record, long: bool) -> dict[str, list[Seen]]:
    """Show every file to its commands, in one process of their own, and judge."""
    seen = call(hostile.see_all, [command for commands in corpus.values() for command in commands])
    assert seen is not None, "the process died"
    answers = iter(seen)
    found = {what: [next(answers) for _ in commands] for what, commands in corpus.items()}
    for what, all_seen in found.items():
        for one in all_seen:
            judge(what, one, record, long)
    return found


@both
def test_tensors(tmp_path, record: Record, long):
    """As a file that is inspected, as a file of an artifact whose hash is right, and as a foreign network."""
    corpus = {}
    for i, (what, content) in enumerate(corpus_of(hostile.bad_tensors(), long).items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(content)
        listed = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / MANIFEST).write_bytes(hostile.manifest(files={"a.safetensors": listed}))
        path = str(folder / "a.safetensors")
        corpus[what] = [["inspect", path], ["verify", str(folder)], ["read_network", path]]
        if long:
            corpus[what] += [["inspect", path, "--json"], ["read_tensors", path]]
    found = show(corpus, record, long)
    fine = {what for what, seen in found.items() if seen[0].ended == "exit 0"}
    assert fine <= {
        "15,000 tensors", "one name twice", "escapes in a name", "a name out of the folder", "a name of 500 KiB", "NaN",
        "a dtype that torch lacks", "metadata of 900 KiB", "a shape of 10,000 dimensions",
    }  # fmt: skip
    assert {what for what, seen in found.items() if seen[2].ended == "ok"} <= {
        "one name twice", "a shape of 10,000 dimensions", "a name of 500 KiB", "metadata of 900 KiB", "15,000 tensors"
    }  # fmt: skip


@both
def test_manifests(tmp_path, record: Record, long):
    corpus = {}
    for i, (what, content) in enumerate(corpus_of(hostile.bad_manifests(), long).items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / MANIFEST).write_bytes(content)
        corpus[what] = [["inspect", str(folder)], ["verify", str(folder)]]
        if long:
            corpus[what].append(["inspect", str(folder), "--json"])
    found = show(corpus, record, long)
    fine = {what for what, seen in found.items() if seen[1].ended == "exit 0"}
    assert fine <= {
        "a manifest of 32 MiB in one emoji and one text", "a whole manifest of objects", "a manifest of numbers",
        "a manifest nested 90 times", "a number of 4,000 digits", "escapes in every text", "a fact of 20 MiB",
        "50,000 facts",
    }  # fmt: skip


@both
def test_recipes(tmp_path, record: Record, long):
    corpus, recipes, stored = {}, hostile.bad_recipes(), hostile.bad_stored_recipes()
    for i, (what, content) in enumerate(corpus_of({**recipes, **stored}, long).items()):
        path = tmp_path / f"{i}.yaml"
        path.write_bytes(content)
        corpus[what] = [["stored recipe" if what in stored else "recipe", str(path)]]
        if what in recipes and long:
            corpus[what].append(["collect", str(path), "--dry-run", "--run", str(tmp_path / "run")])
    found = show(corpus, record, long)
    fine = {what for what, seen in found.items() if seen[0].ended == "ok"}
    assert fine <= {"a hexadecimal number of 100,000 digits", "an architecture out of the folder"}
    assert not (tmp_path / "run").exists() and not Path("owned").exists()


def test_links_in_an_artifact_are_not_followed(tmp_path, record: Record, long=False):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "diary").write_text("secret")
    (outside / MANIFEST).write_bytes(hostile.manifest(facts={"secret": "secret"}))
    right = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    before, corpus = snapshot(outside), {}
    for i, make in enumerate((hostile.symlink, hostile.folder_link, hostile.pipe)):
        folder = tmp_path / str(i)
        folder.mkdir()
        make(folder / "a.bin", outside)
        (folder / MANIFEST).write_bytes(hostile.manifest(files={"a.bin": right}))
        corpus[f"a link {i}"] = [["verify", str(folder)]]
        if make is not hostile.folder_link:  # Else it is a run with an artifact elsewhere, which is read as any other.
            other = tmp_path / f"{i}-manifest"
            other.mkdir()
            make(other / MANIFEST, outside)
            corpus[f"a linked manifest {i}"] = [["verify", str(other)], ["inspect", str(other)]]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / MANIFEST).symlink_to(outside / MANIFEST)
    corpus["a manifest outside"] = [["verify", str(tmp_path / "linked")], ["inspect", str(tmp_path / "linked")]]
    for all_seen in show(corpus, record, long).values():
        for seen in all_seen:
            assert seen.ended == "exit 3" and "secret" not in seen.text
    assert snapshot(outside) == before


def test_nothing_is_written_through_what_a_run_holds(reference: Reference, tmp_path, record: Record, long=False):
    """A run that a stranger interrupted for us: links, pipes and nonsense where a resumed stage reads and writes."""
    stage = BY_NAME["train-rpg"]
    begun = reference.before(stage, tmp_path / "begun")
    worker = Worker(*stage.command(begun), log=tmp_path / "log", hold_at=5)
    assert worker.plan.reached.wait(60)
    worker.send(2)
    worker.plan.released.set()
    assert worker.wait() == 130 and (begun / "rpg.partial" / CHECKPOINT).is_file()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "diary").write_text("secret")
    (outside / BEGUN).write_bytes((begun / "rpg.partial" / BEGUN).read_bytes())  # The very key.
    (outside / MANIFEST).write_bytes(canonical({"schema": 1}))
    corpus = {}
    for i, (what, change) in enumerate(hostile.RESUMED.items()):
        run = tmp_path / str(i)
        shutil.copytree(begun, run)
        change(run, outside)
        corpus[what] = [[str(word) for word in stage.command(run, "--resume")]]
    before = snapshot(outside)
    found = show(corpus, record, long)
    assert snapshot(outside) == before
    assert "exit 0" in {seen[0].ended for seen in found.values()}  # Many are simply replaced.
    for seen in found.values():
        assert "secret" not in seen[0].text
