"""Every recipe of the package parses, builds, and says first how it is run."""

import re
from pathlib import Path

import pytest
import torch

from rpgcli import recipe
from rpgcli.artifact import canonical, write_bytes
from rpgcli.collection import SeedsConfig
from rpgcli.cores.none import NoCoreConfig
from rpgcli.errors import UsageError
from rpgcli.layout import make_layout
from rpgcli.methods.rpg import RPG
from rpgcli.recipe import Recipe, embedded, load, read_stored, section
from rpgcli.samplers import DdpmConfig
from rpgcli.targets import TimmConfig
from rpgcli.tasks import FashionMnistConfig

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
EVERY_RECIPE = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
IMAGES = {"digits": (1, (8, 8), 10), "fashion-mnist": (1, (28, 28), 10), "cifar10": (3, (32, 32), 10)}
"""Channels, size and classes, so that no data set is read."""


def test_the_package_holds_the_recipes_of_the_folder():
    assert list(embedded()) == [path.stem for path in RECIPES]
    assert {recipe.DEFAULT, recipe.DEFAULT_TIMM} <= set(embedded())


@EVERY_RECIPE
def test_a_recipe_parses_and_builds(path):
    """On `meta`, without memory, whatever its size."""
    found = load(str(path))
    assert found.name == path.stem
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
    write_bytes(tmp_path / "recipe.json", canonical(found.to_json()))
    assert read_stored(tmp_path / "recipe.json") == found
    assert load(path.stem) == found


def test_the_default_is_the_demo_and_timm_has_its_own():
    assert load(None) == load(recipe.DEFAULT)
    assert load(None, target=TimmConfig(name="resnet18")).name == recipe.DEFAULT_TIMM
    assert load(None, dataset=FashionMnistConfig()).dataset.kind == "fashion-mnist"


def test_overrides_and_unknown_names():
    assert load(None, ["collect.num_seen=8", "rpg.training.num_steps=3"]).rpg.training.num_steps == 3
    with pytest.raises(UsageError, match="did you mean 'digits-demo'"):
        load("digit-demo")


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
