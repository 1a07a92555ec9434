"""Training from different starts: the curves, when targets are reached, and what can be started from."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rpgcli.collection import Feed, OptimiserConfig, Stacked, train
from rpgcli.evaluation.finetuning import to_train
from rpgcli.evaluation.initialisation import (
    InitialisationConfig,
    compare_starts,
    first_epoch,
    learn,
    mean_and_error,
    median,
    nearest,
    reach,
    speed_up,
    tasks_of,
)
from rpgcli.problem import Problem
from rpgcli.progress import Step, silent
from rpgcli.subsets import Tail
from rpgcli.targets import Mlp3Config
from rpgcli.tasks import complement
from rpgcli.tokens import TokenStore
from rpgcli.zoo import Network, Zoo
from tests.conftest import run_rpg, settings
from tests.helpers import draw, make, stop_after, tiny_problem, token_store

State = dict[str, Tensor]
TRAINING = OptimiserConfig(epochs=3, batch_size=16, learning_rate=1e-2)
STILL = OptimiserConfig(epochs=2, batch_size=32, learning_rate=1e-30)
"""Changes no value."""


def question() -> Problem:
    return tiny_problem(Mlp3Config(hidden=(6,)), bits=False)


def fresh(problem: Problem, i: int) -> State:
    return problem.build("test", i).state_dict()


def zoo_of(folder: Path, states: list[State], *, stage: str = "collect", section: Any = None, **facts: Any) -> Zoo:
    """An artifact of networks, each with `facts`."""
    networks = [Network(f"{i}.safetensors", "seen", run=i, **facts) for i in range(len(states))]

    def body(draft):
        for network, state in zip(networks, states):
            draft.save_tensors(network.file, state)
        return {"networks": [network.to_json() for network in networks]}

    return Zoo(make(folder, body, stage=stage, section=section))


@pytest.fixture
def small(tmp_path: Path) -> tuple[Problem, Zoo, TokenStore]:
    """Four networks that were trained a little, and their tokens."""
    problem = question()
    networks, feed = to_train(problem, [fresh(problem, i) for i in range(4)], ["zoo"] * 4, tail=None, seed=0)
    (snapshot,) = train(networks, problem.labels("train", [None] * 4), feed, TRAINING, save_at=[12], on_step=silent)
    accuracy = problem.accuracy(snapshot.states, [None] * 4, "test").mean().item()
    section = {"collect": {"kind": "seeds", "training": TRAINING.model_dump(mode="json")}}
    zoo = zoo_of(
        tmp_path / "zoo", snapshot.states, section=section, accuracy={"validation": accuracy, "test": accuracy}
    )
    return problem, zoo, token_store(tmp_path / "tokens", snapshot.states)


def curves_of(found: dict[str, Any]) -> dict[str, list[float]]:
    return {start["name"]: start["test"]["mean"] for start in found["starts"]}


# --- the curves -------------------------------------------------------------------------------------------------------


def test_curve_is_the_accuracy_before_training_and_of_the_snapshot_after_each_epoch():
    problem = question()
    starts = [fresh(problem, i) for i in range(3)]
    networks, feed = to_train(problem, starts, ["x"] * 3, tail=None, seed=0)
    curve, seconds = learn(networks, feed, problem, starts, [None] * 3, TRAINING, silent)
    again, labels = Stacked(problem, starts), problem.labels("train", [None] * 3)
    each = math.ceil(60 / 16)
    snapshots = train(
        again, labels, Feed(problem, 0, ["x"]), TRAINING, save_at=[each, 2 * each, 3 * each], on_step=silent
    )
    for i, split in enumerate(("validation", "test")):
        states = [starts, *(snapshot.states for snapshot in snapshots)]
        expected = torch.stack([problem.accuracy(those, [None] * 3, split) for those in states], 1)  # type: ignore[arg-type]
        assert torch.equal(curve[..., i], expected)
    assert curve.shape == (3, 4, 2) and seconds > 0


def test_measuring_does_not_disturb_the_training():
    problem = question()
    seen: list[Step] = []
    starts = [fresh(problem, 0)]
    networks, feed = to_train(problem, starts, ["x"], tail=None, seed=0)
    learn(networks, feed, problem, starts, [None], TRAINING, seen.append)
    (snapshot,) = train(
        Stacked(problem, starts), problem.labels("train", [None]), feed, TRAINING, save_at=[12], on_step=silent
    )
    assert all(torch.equal(a, b) for a, b in zip(networks.snapshot()[0].values(), snapshot.states[0].values()))
    assert [step.done for step in seen] == list(range(1, 13))


def test_equal_starts_of_a_seed_learn_the_same_and_another_order_does_not():
    problem = question()
    starts = [fresh(problem, 0)] * 3
    networks, feed = to_train(problem, starts, ["a", "a", "b"], tail=None, seed=0)
    learn(networks, feed, problem, starts, [None] * 3, TRAINING, silent)
    a, b, other = (state["layers.0.weight"] for state in networks.snapshot())
    assert torch.allclose(a, b, rtol=0, atol=1e-6)  # Rounding of products of different sizes.
    assert (a - other).abs().max() > 1e-3


def test_of_a_subset_nothing_else_is_trained_and_each_start_is_loaded():
    problem = question()
    base, given = fresh(problem, 0), fresh(problem, 1)
    tail = Tail(problem, base, ["layers.2.bias"])
    networks, feed = to_train(problem, [given], ["x"], tail=tail, seed=0)
    curve, _ = learn(networks, feed, tail, [given], [None], TRAINING, silent)
    mixed = {**base, "layers.2.bias": given["layers.2.bias"]}
    assert curve[0, 0].tolist() == [problem.accuracy([mixed], [None], s).item() for s in ("validation", "test")]
    assert not torch.equal(tail.snapshot()[0]["layers.2.bias"], given["layers.2.bias"])
    assert torch.equal(tail.model.state_dict()["layers.0.weight"], base["layers.0.weight"])


# --- when targets are reached -----------------------------------------------------------------------------------------


def test_first_epoch_median_and_speed_up():
    assert first_epoch([0.1, 0.5, 0.4, 0.9], 0.5) == 1
    assert first_epoch([0.5], 0.5) == 0
    assert first_epoch([0.1, 0.2], 0.5) is None
    assert median([3, 1, 2]) == 2
    assert median([1, 2, None, 4]) == 4  # The upper one: never is later than 4.
    assert median([1, None, None]) is None
    assert median([None, None]) is None
    assert median([0, 0, None]) == 0
    assert speed_up(12, 3) == 4
    assert speed_up(None, 3) is None and speed_up(12, None) is None
    assert speed_up(12, 0) is None  # No training at all.
    assert speed_up(0, 0) is None


def test_targets_are_found_on_validation_images_and_reported_on_test_images():
    validation = torch.tensor([[0.1, 0.6, 0.9], [0.1, 0.4, 0.7]])
    test = torch.tensor([[0.0, 0.5, 0.8], [0.0, 0.9, 0.6]])
    curves = torch.stack([validation, test], -1)[:, None]  # (R, T, E + 1, 2)
    targets = [{"fraction": f, "validation": f, "test": f} for f in (0.05, 0.6, 0.8, 1.0)]
    rows = reach(curves, targets)
    assert [row["each"] for row in rows] == [[0, 0], [1, 2], [2, None], [None, None]]
    assert [row["epochs"] for row in rows] == [0, 2, None, None]
    assert [row["test"] for row in rows] == pytest.approx([0.0, 0.55, 0.8, None])


def test_observations_are_seeds_of_one_question_and_tasks_otherwise():
    curves = torch.arange(12, dtype=torch.float64).view(2, 3, 2)  # (R, T, E + 1)
    tasks = curves.mean(0)  # (T, E + 1)
    found = mean_and_error(curves)
    assert found["mean"] == tasks.mean(0).tolist()
    assert found["se"] == pytest.approx((tasks.std(0) / math.sqrt(3)).tolist())
    seeds = mean_and_error(curves[:, :1])
    assert seeds["se"] == pytest.approx((curves[:, 0].std(0) / math.sqrt(2)).tolist())


# --- the starts -------------------------------------------------------------------------------------------------------


def test_starts_of_one_question_are_what_they_say(small, tmp_path):
    problem, zoo, store = small
    copies = zoo_of(tmp_path / "made", [zoo.state(n) for n in zoo.networks], stage="generate")
    config = InitialisationConfig(num_seeds=4, training=STILL, targets=(0.5, 2.0))
    found = compare_starts(problem, config, zoo, store, copies, seed=0, on_step=silent)
    curves = curves_of(found)
    assert list(curves) == ["generated", "fresh", "average", "trained"]
    own = problem.accuracy([zoo.state(n) for n in zoo.networks], [None] * 4, "test").mean().item()
    mean = sum(store.vector(i) for i in range(4)) / 4
    average = problem.accuracy([store.rebuilt(mean)], [None], "test").item()
    assert curves["generated"] == pytest.approx([own] * 3)  # Each of the four once, and training changes nothing.
    assert curves["trained"] == pytest.approx([own] * 3)
    assert curves["average"] == pytest.approx([average] * 3)
    by_name = {start["name"]: start for start in found["starts"]}
    assert found["trained"]["test"] == pytest.approx(own)
    assert [r["epochs"] for r in by_name["trained"]["reached"]] == [0, None]
    assert by_name["generated"]["seconds_per_start"] is None  # Nobody measured it.
    json.dumps(found, allow_nan=False)


def test_without_settings_networks_are_trained_as_those_of_the_zoo(small, tmp_path):
    _, zoo, _ = small
    assert InitialisationConfig().training_of(zoo) == TRAINING
    elsewhere = zoo_of(tmp_path / "a", [{"w": draw(2)}], section={"from": "x", "collect": {"kind": "tasks"}})
    assert InitialisationConfig().training_of(elsewhere) == OptimiserConfig()
    published = {"collect": {"kind": "trajectory", "training": {"epochs": 0}}}
    assert InitialisationConfig().training_of(zoo_of(tmp_path / "b", [{"w": draw(2)}], section=published)).epochs > 0
    with pytest.raises(ValidationError, match="nothing would be trained"):
        InitialisationConfig(training=OptimiserConfig(epochs=0))


@pytest.mark.parametrize("num_failed", [1, 2])
def test_networks_that_are_not_finite_are_left_out(small, tmp_path, num_failed):
    problem, zoo, store = small
    good = zoo.state(zoo.networks[0])
    failed = {**good, "layers.0.bias": torch.full_like(good["layers.0.bias"], torch.nan)}
    made = zoo_of(tmp_path / "made", [failed, good if num_failed == 1 else failed], stage="generate")
    config = InitialisationConfig(num_seeds=3, training=STILL)
    curves = curves_of(compare_starts(problem, config, zoo, store, made, seed=0, on_step=silent))
    if num_failed == 1:
        assert curves["generated"] == pytest.approx([problem.accuracy([good], [None], "test").item()] * 3)
    else:
        assert list(curves) == ["fresh", "average", "trained"]


def test_an_interruption_ends_it_and_the_same_seed_gives_the_same_figures(small, tmp_path):
    problem, zoo, store = small
    made = zoo_of(tmp_path / "made", [zoo.state(zoo.networks[0])], stage="generate")
    config = InitialisationConfig(num_seeds=2)
    steps: list[Step] = []
    first = compare_starts(problem, config, zoo, store, made, seed=1, on_step=steps.append)
    again = compare_starts(problem, config, zoo, store, made, seed=1, on_step=silent)
    other = compare_starts(problem, config, zoo, store, made, seed=2, on_step=silent)
    assert curves_of(first) == curves_of(again) != curves_of(other)
    assert steps[-1] == Step(8, 8, phase="train from starts", unit="network")
    with pytest.raises(Exception, match="signal 2"):
        compare_starts(problem, config, zoo, store, made, seed=1, on_step=stop_after(3))


def test_of_a_task_and_its_complement_only_one_is_trained_for(tmp_path):
    tasks = ["0000000111", complement("0000000111"), "0000000001", "0000000011"]
    networks = [Network(f"{i}.safetensors", "unseen", task) for i, task in enumerate(tasks)]
    networks.append(Network("s.safetensors", "seen", "1000000001"))
    made = zoo_of(tmp_path / "made", [{"w": draw(1)}], stage="generate")
    made.networks = networks
    assert tasks_of(made, 2) == ("unseen", [tasks[0], tasks[2]])
    assert tasks_of(made, 9)[1] == [tasks[0], tasks[2], tasks[3]]
    made.networks = networks[-1:]
    assert tasks_of(made, 2) == ("seen", ["1000000001"])


def test_nearest_are_all_networks_of_the_task_with_the_fewest_different_bits():
    networks = [Network(f"{i}", "seen", bits) for i, bits in enumerate(["1100", "0111", "0111", "0000"])]
    assert nearest("0110", networks) == networks[1:3]


# --- the command ------------------------------------------------------------------------------------------------------


def test_finetune_on_a_zoo_of_tasks(tiny, tmp_path):
    run = Path(shutil.copytree(tiny.folder, tmp_path / "run"))
    options = settings(["evaluate.mlp=[]", "evaluate.initialisation={num_seeds: 2, num_tasks: 2}"])
    outcome = run_rpg("evaluate", "--run", run, *options, "--force", "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json["initialisation"]
    assert [s["name"] for s in found["starts"]] == ["generated", "fresh", "average", "trained", "shared start"]
    assert found["split"] == "unseen" and len(found["tasks"]) == 2
    assert all(s["count"] == 4 and len(s["test"]["mean"]) == 2 for s in found["starts"])
    by_name = {s["name"]: s for s in found["starts"]}
    per_task = outcome.json["per_task"]["rpg unseen"]
    expected = sum(per_task[task] for task in found["tasks"]) / 2
    assert by_name["generated"]["test"]["mean"][0] == pytest.approx(expected)
    assert by_name["fresh"]["seconds_once"] == 0 < by_name["average"]["seconds_once"]
    assert by_name["average"]["seconds_once"] < by_name["generated"]["seconds_once"]
    shown = run_rpg("evaluate", "--run", run, *options, "--finetune")
    assert shown.code == 0 and "up to date" in shown.err  # The flag adds nothing to what is configured.
    assert "training for 1 epochs" in shown.out and "shared start" in shown.out


def test_finetune_is_part_of_the_key_and_of_the_plan(tiny, tmp_path):
    run = Path(shutil.copytree(tiny.folder, tmp_path / "run"))
    outcome = run_rpg("evaluate", "--run", run, "--finetune")
    assert outcome.code == 4 and "initialisation" in outcome.err
    (plan,) = run_rpg("evaluate", "--run", run, "--finetune", "--dry-run", "--json").json["plans"]
    assert plan["trainings from each start"] == 5 * 6
    (plan,) = run_rpg("evaluate", "--run", run, "--dry-run", "--json").json["plans"]
    assert "trainings from each start" not in plan
