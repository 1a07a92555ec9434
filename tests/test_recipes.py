"""Every recipe of the package parses, builds, and says first how it is run."""

import json
import re
from pathlib import Path

import pytest
import torch

from rpgcli import recipe
from rpgcli.artifact import canonical, write_bytes
from rpgcli.collection import SeedsConfig
from rpgcli.cores.none import NoCoreConfig
from rpgcli.errors import RecipeError, UsageError
from rpgcli.layout import make_layout
from rpgcli.methods.rpg import RPG
from rpgcli.recipe import Recipe, as_today, embedded, load, read_stored, section
from rpgcli.samplers import DdpmConfig
from rpgcli.targets import TimmConfig
from rpgcli.tasks import FashionMnistConfig

FOLDER = Path(__file__).parent.parent / "recipes"
OWN, PAPER = sorted(FOLDER.glob("*.yaml")), sorted(FOLDER.glob("paper/*.yaml"))


def name_of(path: Path) -> str:
    """`digits-demo`, `paper/imagenet-resnet18`."""
    return str(path.relative_to(FOLDER).with_suffix(""))


EVERY_RECIPE = pytest.mark.parametrize("path", [*OWN, *PAPER], ids=name_of)
IMAGES = {"digits": (1, (8, 8), 10), "fashion-mnist": (1, (28, 28), 10), "cifar10": (3, (32, 32), 10)}
"""Channels, size and classes, so that no data set is read."""


def test_the_package_holds_the_recipes_of_the_folder():
    assert list(embedded()) == [name_of(path) for path in (*OWN, *PAPER)]
    assert {recipe.DEFAULT, recipe.DEFAULT_TIMM} <= set(embedded())


@pytest.mark.parametrize("path", OWN, ids=name_of)
def test_a_recipe_parses_and_builds(path):
    """On `meta`, without memory, whatever its size; those of the paper in test_paper_recipes.py."""
    found = load(str(path))
    channels, size, num_classes = IMAGES[found.dataset.kind]
    num_outputs = found.task.num_outputs(num_classes)
    with torch.device("meta"):
        state = found.target.build(channels, found.target.input_size(size), num_outputs).state_dict()
        layout = make_layout(
            state,
            token_dim=found.tokens.token_dim,
            granularity=found.tokens.granularity,
            log_variance=found.tokens.standardise != "none",
        )
        model = RPG(
            found.rpg, *layout.indices(), token_dim=layout.token_dim, num_features=num_classes, num_states=3
        )  # fmt: skip
    assert model.position.shape == (layout.num_tokens, found.rpg.core.d_model)
    assert (found.collect.kind == "tasks") == (found.task.kind == "binary-subset")


@EVERY_RECIPE
def test_a_recipe_begins_with_the_command_that_runs_it(path):
    first = path.read_text().splitlines()[0]
    assert re.match(r"# (rpg|make) \S", first), first


@EVERY_RECIPE
def test_a_stored_recipe_is_read_back(path, tmp_path):
    found = load(str(path))
    assert found.name == name_of(path)
    write_bytes(tmp_path / "recipe.json", canonical(found.to_json()))
    assert read_stored(tmp_path / "recipe.json") == found
    assert load(name_of(path)) == found


def test_the_default_is_the_demo_and_timm_has_its_own():
    assert load(None) == load(recipe.DEFAULT)
    assert load(None, target=TimmConfig(name="resnet18")).name == recipe.DEFAULT_TIMM
    assert load(None, dataset=FashionMnistConfig()).dataset.kind == "fashion-mnist"


def test_overrides_and_unknown_names():
    assert load(None, ["collect.num_seen=8", "rpg.training.num_steps=3"]).rpg.training.num_steps == 3
    with pytest.raises(UsageError, match="did you mean 'digits-demo'"):
        load("digit-demo")
    with pytest.raises(UsageError, match="did you mean 'paper/imagenet-resnet18'"):
        load("paper/imagenet-resnet-18")


def test_a_file_is_read_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "cifar10-cnn-small").write_text("name: mine\n")
    assert load("paper/cifar10-cnn-small").name == "mine"
    assert load("paper/cifar10-cnn-medium").name == "paper/cifar10-cnn-medium"
    with pytest.raises(RecipeError, match="elsewhere/mine"):
        load("elsewhere/mine")


def test_another_kind_can_be_set_on_any_recipe():
    for name in (*embedded(), None):
        kept = load(name).collect.kind == "seeds"
        found = load(name, ["collect.kind=seeds", "task.kind=multi-class", "rpg.core.kind=lstm"])
        assert (found.collect == SeedsConfig() or kept) and found.task.kind == "multi-class"
        assert found.rpg.core.kind == "lstm"


def test_a_stored_recipe_takes_other_kinds_and_keys_below_null(tmp_path):
    write_bytes(tmp_path / "recipe.json", canonical(Recipe().to_json()))
    found = read_stored(tmp_path / "recipe.json", ["generate.sampler.kind=ddpm", "rpg.core.kind=none"])
    assert found.generate.sampler == DdpmConfig() and found.rpg.core == NoCoreConfig()


def test_a_section_holds_only_its_stages_settings():
    found = Recipe()
    assert section(found, "tokens", "seed") == {"tokens": found.tokens.model_dump(mode="json"), "seed": 0}


def test_a_setting_that_did_not_exist_when_an_artifact_was_made_has_its_default():
    whole = section(load(None), "rpg")
    old = json.loads(json.dumps(whole))
    del old["rpg"]["core"]["num_layers"], old["rpg"]["tokens_per_step"]
    assert as_today(old | {"request": "all"}) == whole | {"request": "all"}
    old["rpg"]["core"]["unknown"] = 1
    assert as_today(old) == old
