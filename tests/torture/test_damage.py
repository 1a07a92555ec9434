"""Damage of every kind to every file of every artifact is found before anything is computed from it."""

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from rpgcli import artifact
from rpgcli.artifact import MANIFEST
from rpgcli.errors import ArtifactError
from tests.conftest import run_rpg
from tests.test_cli import tree
from tests.torture.conftest import Record
from tests.torture.runs import BY_NAME, STAGES, Reference, accepted

TORTURE = [pytest.mark.torture, pytest.mark.timeout(1800)]
READS = {
    "tokenize": ("zoo",),
    "train-rpg": ("tokens",),
    "train-ae": ("tokens",),
    "train-diffusion": ("tokens", "autoencoder"),
    "generate": ("rpg",),
    "evaluate": ("zoo", "tokens", "generated/tasks-s0-n1"),
}
"""The artifacts that a stage computes something from."""


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Meanwhile nobody parses a tensor or a header."""
    never = mock.Mock(side_effect=AssertionError("it was read before it was found damaged"))
    with mock.patch.object(artifact, "load_file", never), mock.patch.object(artifact, "safe_open", never):
        yield


def is_found(folder: Path, stage: str, name: str) -> bool:
    """Whether both a reader and `verify` refuse the file."""
    try:
        found = artifact.read(folder, stage)
        if name.endswith(".safetensors"):
            with unread():
                found.tensors(name)
        else:
            found.file(name)
    except ArtifactError as error:
        assert error.exit_code == 3
    else:
        return False
    with unread(), mock.patch.object(artifact, "tensors_of", return_value={}):  # Of the other files.
        return any(name in problem for problem in artifact.verify(folder)[1])


def header_bits(path: Path) -> range:
    """Numbers of all bits of a safetensors header, its length included."""
    return range(8 * (8 + int.from_bytes(path.read_bytes()[:8], "little")))


@pytest.mark.parametrize(("header", "payload", "cuts"), [(40, 40, 8), pytest.param(None, 1000, 64, marks=TORTURE)])
@pytest.mark.parametrize(
    ("stage", "name"),
    [("collect", "00003.safetensors"), ("tokenize", "tokens-00000.safetensors"), ("train-rpg", "model.safetensors")],
)
def test_flipped_bits_and_truncations_are_found(
    reference: Reference, tmp_path, record: Record, stage, name, header, payload, cuts
):
    """All bits of the header (None), so many of the rest, and so many truncations."""
    folder = Path(shutil.copytree(reference.made[stage].path, tmp_path / "artifact"))
    path, draw = folder / name, random.Random(name)
    whole = path.read_bytes()
    first = header_bits(path)
    bits = [*(first if header is None else draw.sample(first, header))]
    bits += [draw.randrange(len(first), 8 * len(whole)) for _ in range(payload)]
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = is_found(folder, stage, name)
        record("flipped bits found", found, 1)
        assert found, bit
    for size in draw.sample(range(len(whole)), cuts):
        path.write_bytes(whole[:size])
        found = is_found(folder, stage, name)
        record("truncations found", found, 1)
        assert found, size
    path.write_bytes(whole)
    assert artifact.read(folder, stage).tensors(name) and not artifact.verify(folder)[1]


@pytest.mark.parametrize(
    ("reader", "tries"), [("tokenize", 1), *(pytest.param(reader, 6, marks=TORTURE) for reader in READS)]
)
def test_a_stage_refuses_damaged_input_or_never_looked_at_it(
    reference: Reference, tmp_path, record: Record, monkeypatch, reader, tries
):
    """Swapped files, files and manifests of another artifact, flipped bits: exit 3, or the result of whole input."""
    monkeypatch.setattr("rpgcli.evaluation.page.EXTRA", ("no-pictures",))  # Drawing takes seconds.
    stage, draw = BY_NAME[reader], random.Random(reader)
    by_folder = {s.folder: s for s in STAGES}
    for folder in READS[reader]:
        kinds = ["flip", "swap", "stale file", "stale manifest"]
        for kind in draw.sample(kinds, 1) if tries == 1 else kinds * (tries // 2):
            run = reference.before(stage, tmp_path / "run")
            names = sorted(p.name for p in (run / folder).iterdir() if p.name != MANIFEST)
            one, two = (run / folder / n for n in (draw.choice(names), draw.choice(names)))
            other = by_folder[folder]
            stale = (reference.other(other) if other.other else reference.made["collect"]).path
            if kind == "flip":
                data = bytearray(one.read_bytes())
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                one.write_bytes(data)
            elif kind == "swap" and one != two:
                one.rename(run / "t")
                two.rename(one)
                (run / "t").rename(two)
            elif kind == "stale file" and (stale / one.name).exists():
                shutil.copy(stale / one.name, one)
            else:
                shutil.copy(stale / MANIFEST, run / folder)
            before, wrong = tree(run), accepted(run / folder) != reference.ids[other.name]
            outcome = run_rpg(*stage.command(run))
            if outcome.code == 0:  # What it never reads need not be right; `verify` knows all the same.
                assert accepted(run / stage.folder) == reference.ids[reader]
                assert wrong or kind in ("swap", "stale file")  # Two files of equal content.
            else:
                assert outcome.code == 3, outcome.err
                now = {path: digest for path, digest in tree(run).items() if ".partial/" not in path}
                assert now == before  # Groups that were judged before a damaged network was met may stay, unfinished.
                record("stages that refused damaged input", 1, 1)
            shutil.rmtree(run)


def test_a_manifest_that_is_forged_whole_is_another_artifact(reference: Reference, tmp_path):
    """Who rewrites every hash makes another artifact: its id differs, and what was made from the first says so."""
    stage = BY_NAME["evaluate"]
    run = reference.before(stage, tmp_path / "run")
    path = run / "zoo" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["facts"]["networks"][0]["accuracy"]["test"] = 1.0
    del manifest["volatile"]["id"]
    path.write_text(json.dumps(manifest))
    assert accepted(run / "zoo") not in (None, reference.ids["collect"])
    outcome = run_rpg(*stage.command(run))
    assert outcome.code == 3 and "was not made from" in outcome.err
