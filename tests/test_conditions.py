"""Conditions: what is asked becomes features, and what cannot be asked is refused in clear words."""

import json
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rpgcli.conditions import Asked, Condition, Levels, asked_of, check_levels, make_condition
from rpgcli.errors import UsageError
from rpgcli.methods.pdiff import LatentDiffusionConfig
from rpgcli.methods.rpg import RpgConfig

LEVELS: Levels = ((0.5, 0.7), (0.7, 0.9), (0.95, 1.0))
TASK_BITS = Condition("task-bits", 4)
LABEL = Condition("label", 3, labels=("cat", "dog", "owl"))
LEVEL = Condition("accuracy-level", 3, levels=LEVELS)
ACCURACY = Condition("accuracy", 1, mean=0.8, std=0.05)
EACH = pytest.mark.parametrize("condition", [TASK_BITS, LABEL, LEVEL, ACCURACY], ids=lambda c: str(c.kind))


def checkpoint(**facts: Any) -> dict[str, Any]:
    """What the token store says of a checkpoint."""
    return {"task_bits": None, "label": None, "run": 0, "step": 0, "accuracy": None, **facts}


def measured(*accuracies: float) -> list[dict[str, Any]]:
    """Checkpoints with these accuracies on validation images, and others on test images."""
    return [checkpoint(accuracy={"validation": a, "test": 1 - a}) for a in accuracies]


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "asked", "features"),
    [
        (TASK_BITS, Asked(task_bits="0110"), [-1.0, 1.0, 1.0, -1.0]),
        (LABEL, Asked(label="dog"), [0.0, 1.0, 0.0]),
        (LEVEL, Asked(accuracy=0.96), [0.0, 0.0, 1.0]),
        (ACCURACY, Asked(accuracy=0.9), [2.0]),
        (ACCURACY, Asked(accuracy=0.8), [0.0]),
    ],
)
def test_features_of_each_kind(condition, asked, features):
    found = condition.features([asked])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([features]))


@EACH
def test_what_is_not_said_has_zeros_and_changes_no_other_row(condition):
    told = Asked("seen", "0110", "owl", 0.6)
    rows = condition.features([Asked(), told, Asked("unseen")])
    assert rows.shape == (3, condition.num_features)
    assert not rows[0].any()
    assert not rows[2].any()
    assert torch.equal(rows[1:2], condition.features([told]))
    assert rows[1].any()


@EACH
def test_only_what_the_kind_is_about_enters_the_features(condition):
    everything = Asked("seen", "0110", "owl", 0.6)
    own = {
        "task-bits": Asked(task_bits="0110"), "label": Asked(label="owl"),
        "accuracy-level": Asked(accuracy=0.6), "accuracy": Asked(accuracy=0.6),
    }[condition.kind]  # fmt: skip
    assert torch.equal(condition.features([everything]), condition.features([own]))


@EACH
def test_a_condition_survives_json(condition):
    assert Condition.from_json(json.loads(json.dumps(condition.to_json()))) == condition


def test_different_wishes_have_different_words():
    wishes = [Asked(), Asked(task_bits="0110"), Asked(label="cat"), Asked(accuracy=0.9), Asked(accuracy=0.95)]
    assert len({asked.words for asked in wishes}) == len(wishes)
    assert Asked("seen", "0110").words == Asked("unseen", "0110").words == "0110"


def test_a_checkpoint_is_what_the_store_says_with_its_accuracy_on_validation_images():
    facts = checkpoint(task_bits="01", label="cat", accuracy={"validation": 0.75, "test": 0.5})
    assert asked_of(facts) == Asked("seen", "01", "cat", 0.75)
    assert asked_of({"task_bits": None, "run": 0, "step": 0}) == Asked("seen")


# --- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "level"),
    [
        (0.5, 0), (math.nextafter(0.5, 0), None), (math.nextafter(0.7, 0), 0), (0.7, 1), (0.9, None), (0.92, None),
        (0.95, 2), (1.0, 2), (0.0, None), (None, None),
    ],
)  # fmt: skip
def test_a_level_begins_with_its_smallest_value_and_ends_before_its_largest_but_for_1(accuracy, level):
    assert LEVEL.level(accuracy) == level
    expected = torch.zeros(1, 3)
    if level is not None:
        expected[0, level] = 1
    assert torch.equal(LEVEL.features([Asked(accuracy=accuracy)]), expected)


@pytest.mark.parametrize("levels", [(), LEVELS, ((0.0, 1.0),), ((0.0, 0.5), (0.5, 1.0))])
def test_ranges_in_order_are_levels(levels):
    assert check_levels(levels) == levels


@pytest.mark.parametrize(
    "levels",
    [
        ((0.5, 0.7), (0.6, 0.9)), ((0.7, 0.9), (0.5, 0.6)), ((0.9, 0.5),), ((0.5, 0.5),), ((-0.1, 0.5),), ((0.5, 1.1),),
        ((0.5, 0.7), (0.5, 0.7)),
    ],
    ids=["overlap", "unsorted", "reversed", "empty", "below 0", "above 1", "twice"],
)  # fmt: skip
@pytest.mark.parametrize("config", [RpgConfig, LatentDiffusionConfig])
def test_other_levels_are_refused(levels, config):
    with pytest.raises(ValueError, match="low to high that do not overlap"):
        check_levels(levels)
    with pytest.raises(ValidationError, match="low to high that do not overlap"):
        config(levels=levels)


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "asked"),
    [
        (TASK_BITS, Asked(task_bits="0110")), (LABEL, Asked(label="owl")), (LEVEL, Asked(accuracy=1.0)),
        (ACCURACY, Asked(accuracy=0.3)), (TASK_BITS, Asked()), (LABEL, Asked()), (LEVEL, Asked()), (ACCURACY, Asked()),
    ],
)  # fmt: skip
def test_what_a_model_has_learned_can_be_asked_of_it(condition, asked):
    condition.check(asked)


@pytest.mark.parametrize(
    ("condition", "asked", "words"),
    [
        (TASK_BITS, Asked(accuracy=0.9), ["knows no --accuracy", "trained with --task-bits"]),
        (TASK_BITS, Asked(label="cat"), ["knows no --label", "trained with --task-bits"]),
        (LABEL, Asked(task_bits="0110"), ["knows no --task-bits", "trained with --label"]),
        (LEVEL, Asked(task_bits="0110"), ["knows no --task-bits", "trained with --accuracy"]),
        (ACCURACY, Asked(label="cat"), ["knows no --label", "trained with --accuracy"]),
        (LABEL, Asked(label="cow"), ["'cow' is unknown", "cat, dog, owl"]),
        (LEVEL, Asked(accuracy=0.92), ["--accuracy 0.92 lies in no level", "0.5-0.7, 0.7-0.9, 0.95-1"]),
    ],
)
def test_what_it_has_not_is_refused_with_what_it_knows(condition, asked, words):
    with pytest.raises(UsageError) as error:
        condition.check(asked)
    assert all(word in str(error.value) for word in words)


# --- the condition of a zoo -------------------------------------------------------------------------------------------


def test_auto_is_the_task_bits_where_there_are_some():
    tasks = [checkpoint(task_bits="011"), checkpoint(task_bits="100")]
    assert make_condition("auto", (), tasks, section="rpg") == Condition("task-bits", 3)
    assert make_condition("task-bits", (), tasks, section="rpg") == Condition("task-bits", 3)
    assert make_condition("none", (), tasks, section="rpg") is None
    assert make_condition("auto", (), measured(0.5, 0.6), section="rpg") is None


def test_labels_are_sorted_and_each_known_once():
    zoo = [checkpoint(label=label) for label in ("owl", "cat", None, "owl")]
    condition = make_condition("label", (), zoo, section="rpg")
    assert condition == Condition("label", 2, labels=("cat", "owl"))
    rows = condition.features([asked_of(one) for one in zoo])
    assert rows.tolist() == [[0, 1], [1, 0], [0, 0], [0, 1]]


def test_accuracies_are_standardised_over_the_zoo():
    zoo = [*measured(0.6, 0.7, 0.8, 0.95), checkpoint()]
    condition = make_condition("accuracy", (), zoo, section="diffusion")
    assert condition is not None
    features = condition.features([asked_of(one) for one in zoo[:-1]])
    assert features.mean().abs() < 1e-6  # float32 of numbers near 1
    torch.testing.assert_close(features.std(correction=0), torch.tensor(1.0))


def test_a_zoo_of_one_accuracy_has_no_deviation_to_divide_by():
    zoo = measured(0.7, 0.7, 0.7)
    condition = make_condition("accuracy", (), zoo, section="diffusion")
    assert condition is not None
    assert condition.features([*(asked_of(one) for one in zoo), Asked(accuracy=1.0)]).abs().max() < 1


def test_levels_of_a_zoo_are_kept_as_given():
    zoo = [*measured(0.5, 0.8, 1.0, 0.92), checkpoint()]
    condition = make_condition("accuracy-level", LEVELS, zoo, section="diffusion")
    assert condition == LEVEL
    rows = condition.features([asked_of(one) for one in zoo])
    assert rows.argmax(1)[:3].tolist() == [0, 1, 2]
    assert rows.sum(1).tolist() == [1, 1, 1, 0, 0]  # one between two levels, one that nobody measured


def test_a_level_that_nobody_reaches_is_refused_with_what_they_reach():
    with pytest.raises(UsageError) as error:
        make_condition("accuracy-level", LEVELS, measured(0.5, 0.6, 0.97, 0.92), section="diffusion")
    message = str(error.value)
    assert "in level 0.7-0.9." in message
    assert "0.500 to 0.970" in message
    assert "networks in each level: 2, 0, 1." in message


@pytest.mark.parametrize(
    ("kind", "checkpoints", "words"),
    [
        ("task-bits", measured(0.5), ["diffusion.condition is task-bits", "have no task", "none or auto"]),
        ("label", measured(0.5), ["diffusion.condition is label", "have none", "--from DIR"]),
        ("accuracy", [checkpoint()], ["diffusion.condition is accuracy", "nobody measured"]),
        ("accuracy-level", [checkpoint()], ["diffusion.condition is accuracy-level", "nobody measured"]),
        ("accuracy-level", measured(0.5), ["without diffusion.levels", "[[0.5, 0.7], [0.9, 1]]"]),
    ],
)
def test_a_condition_that_the_zoo_does_not_tell_is_refused(kind, checkpoints, words):
    with pytest.raises(UsageError) as error:
        make_condition(kind, (), checkpoints, section="diffusion")
    assert all(word in str(error.value) for word in words)
