"""Artifacts that earlier versions wrote: read forever, or refused with what to type.

`data/compat/schema-N` is a run of the first version that wrote schema N, with targets of 135 parameters. When the
schema changes, a run of the new one is put beside it; none is ever made anew.
"""

import gc
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from rpgcli import artifact, recipe
from rpgcli.artifact import MANIFEST, SCHEMA
from rpgcli.errors import ArtifactError
from rpgcli.methods.rpg import RPG
from rpgcli.models import read_autoencoder, read_model
from rpgcli.tokens import TokenStore
from rpgcli.zoo import Zoo
from tests.helpers import same_bits

RUNS = sorted((Path(__file__).parent / "data" / "compat").iterdir())
OLD = "0000000111-s0-n1"
STAGES = {
    "zoo": "collect", "tokens": "tokenize", "rpg": "train-rpg", "autoencoder": "train-ae",
    "diffusion": "train-diffusion", f"generated/{OLD}": "generate",
}  # fmt: skip


def schema_of(run: Path) -> int:
    return int(run.name.removeprefix("schema-"))


def test_there_is_a_run_of_every_schema():
    assert [schema_of(run) for run in RUNS] == list(range(1, SCHEMA + 1))


@pytest.mark.parametrize("folder", STAGES)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_an_old_artifact_is_whole_or_refused_with_the_command_that_makes_it(run, folder):
    try:
        found = artifact.read(run / folder, STAGES[folder])
    except ArtifactError as error:
        assert schema_of(run) < SCHEMA
        assert f"rpg {STAGES[folder]} --force" in str(error)
        return
    assert found.manifest.schema_version == schema_of(run)
    assert found.id == json.loads((run / folder / MANIFEST).read_text())["volatile"]["id"]
    assert artifact.verify(run / folder)[1] == []


CURRENT = [run for run in RUNS if schema_of(run) == SCHEMA]


@pytest.mark.parametrize("run", CURRENT, ids=lambda run: run.name)
def test_old_zoos_tokens_and_autoencoders_hold_what_they_held(run):
    zoo, store = Zoo.read(run / "zoo"), TokenStore(artifact.read(run / "tokens", "tokenize"))
    seen = zoo.select("seen")
    assert len(store) == len(seen) == 4
    for i, network in enumerate(seen):
        for name, value in zoo.state(network).items():
            torch.testing.assert_close(store.state(i)[name], value)
    autoencoder = read_autoencoder(artifact.read(run / "autoencoder", "train-ae"), torch.device("cpu"))
    assert autoencoder.encode(store.vector(0)[None]).shape == (1, 2)
    assert recipe.read_stored(run / "recipe.json").tokens.token_dim == 40


@pytest.mark.parametrize("method", ["rpg", "pdiff"])
@pytest.mark.parametrize("run", CURRENT, ids=lambda run: run.name)
def test_old_models_generate_and_are_judged(tmp_path, rpg, run, method, monkeypatch):
    """The networks of RPG as they were then, but for rounding: another version of torch adds in another order."""
    monkeypatch.setattr("rpgcli.evaluation.page.EXTRA", ("no", "pictures"))  # Drawing takes seconds.
    work = Path(shutil.copytree(run, tmp_path / "run"))
    out = tmp_path / "out"
    asked = ["--task-bits", "0000000111", "--method", method]
    assert rpg("generate", "--run", work, *asked, "--out", out).code == 0
    if method == "rpg":
        (name,) = (path.name for path in out.glob("*.safetensors"))
        before = artifact.read(work / "generated" / OLD, "generate").tensors(name)
        for key, value in artifact.read(out, "generate").tensors(name).items():
            torch.testing.assert_close(value, before[key], rtol=1e-3, atol=1e-4)
    outcome = rpg("evaluate", "--run", work, "--request", out, "--method", method)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(("method", "folder"), [("rpg", "rpg"), ("pdiff", "diffusion")])
@pytest.mark.parametrize("run", CURRENT, ids=lambda run: run.name)
def test_a_model_is_read_without_weights_being_drawn_first(run, method, folder):
    """Which would take as much memory again, and minutes at full size."""
    before = torch.get_rng_state()
    model = read_model(method, artifact.read(run / folder, STAGES[folder]), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(model.method, torch.nn.Module)
    assert not any(tensor.is_meta for tensor in [*model.method.parameters(), *model.method.buffers(), model.mask])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("run", CURRENT, ids=lambda run: run.name)
def test_letting_go_of_the_core_leaves_nothing_of_the_file_in_memory(run):
    trained = artifact.read(run / "rpg", "train-rpg")

    def is_mapped() -> bool:
        return str(trained.path / "model.safetensors") in Path("/proc/self/maps").read_text()

    model = read_model("rpg", trained, torch.device("cpu"))
    assert isinstance(model.method, RPG)
    assert is_mapped()
    before = {name: value.clone() for name, value in model.method.denoiser.state_dict().items()}
    model.method.keep_denoiser()
    gc.collect()
    assert not is_mapped()
    assert same_bits(model.method.denoiser.state_dict(), before)


def test_another_schema_is_refused_with_what_to_do(tmp_path):
    """As a version after the next sees what this one wrote, and this one what that writes."""
    folder = Path(shutil.copytree(RUNS[-1] / "zoo", tmp_path / "zoo"))
    value = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(value | {"schema": SCHEMA + 1}))
    with pytest.raises(ArtifactError, match=rf"has schema {SCHEMA + 1}, this version of rpg reads {SCHEMA}") as error:
        artifact.read(folder, "collect")
    assert re.search(r"the version that made it, or .* `rpg collect --force`", str(error.value))
