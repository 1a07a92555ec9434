"""Trivial generators on the command line: each writes networks as a learned one does, from the tokens alone.

Wherever a command is refused, every byte of the run must be as it was.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from rpgcli import artifact
from rpgcli.methods import METHODS, OF_ONE_QUESTION, OF_TASKS, SHORT
from rpgcli.pipeline import generated_folder
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.recipe import read_stored
from rpgcli.tokens import TokenStore
from rpgcli.zoo import Zoo
from tests.conftest import run_rpg, settings
from tests.helpers import same_bits
from tests.test_cli import refused, signal_at, tree

SEEDS = [
    "collect={kind: seeds, num_networks: 12, training: {epochs: 6}}", "task.kind=multi-class", "target.kind=mlp3",
    "autoencoder.network={kind: pca, latent_dim: 4}",
    "evaluate.finetune={epochs: 1, batch_size: 512, learning_rate: 1e-3}",
]  # fmt: skip
"""Twelve independent starts: raw, their average is not a good network."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of one question, its tokens (aligned) and an autoencoder. Do not change it: copy `run`."""
    folder = tmp_path_factory.mktemp("seeds") / "run"
    for command in (["collect", *settings(SEEDS)], ["tokenize"], ["train-ae"]):
        outcome = run_rpg(*command, "--run", folder)
        assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def seeds(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "seeds"))


@pytest.fixture
def tasks(tiny, tmp_path: Path) -> Path:
    """A copy of the tiny run with nothing but its zoo and tokens."""
    folder = tmp_path / "tasks"
    for name in ("zoo", "tokens"):
        shutil.copytree(tiny.folder / name, folder / name)
    value: dict[str, Any] = json.loads((tiny.folder / "recipe.json").read_text())
    value["evaluate"]["finetune"] |= {"epochs": 1, "batch_size": 512, "learning_rate": 1e-3}
    (folder / "recipe.json").write_bytes(artifact.canonical(value) + b"\n")
    return folder


def generate(folder: Path, *options: object) -> Path:
    """Run `rpg generate` and give the folder that it wrote."""
    outcome = run_rpg("generate", "--run", folder, *options, "--json")
    assert outcome.code == 0, outcome.err
    return Path(outcome.json["path"])


def states(generated: Path) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted(generated.glob("*.safetensors"))]


def problem_of(folder: Path) -> Problem:
    section = Zoo.read(folder / "zoo").artifact.section
    return ProblemConfig.of(section).open(data_root=None, download=False, device=torch.device("cpu"))


def accuracy(problem: Problem, networks: Iterable[dict[str, Tensor]]) -> float:
    found = list(networks)
    return float(problem.accuracy(found, [None] * len(found), "test").mean())


def generated_row(report: dict[str, Any], split: str) -> dict[str, Any]:
    (row,) = (g for g in report["groups"] if (g["kind"], g["split"]) == ("generated", split))
    return dict(row)


# --- every one of them ------------------------------------------------------------------------------------------------


def test_all_write_whole_networks_of_one_question_and_leave_the_run_as_it_was(seeds, rpg):
    """The originals, too, are the same bits after all have drawn from them."""
    before, problem = tree(seeds), problem_of(seeds)
    folders = [generate(seeds, "--method", method, "--count", 2) for method in OF_ONE_QUESTION]
    assert [f.name for f in folders] == [f"{method}-all-s0-n2" for method in OF_ONE_QUESTION]
    assert {name: digest for name, digest in tree(seeds).items() if not name.startswith("generated/")} == before
    for method, folder in zip(OF_ONE_QUESTION, folders):
        networks = states(folder)
        for state in networks:
            problem.build("fresh").load_state_dict(state, strict=True)
            assert all(bool(value.isfinite().all()) for value in state.values())
        alike = method in {"average", "soup-16"}  # of all twelve
        assert same_bits(*networks) == alike
        inputs = artifact.read(folder, "generate").manifest.inputs
        assert set(inputs) == ({"tokens", "autoencoder"} if method.startswith("latent") else {"tokens"})
    again = rpg("generate", "--run", seeds, "--method", "average", "--count", 2)
    assert again.code == 0 and "up to date" in again.err


def test_all_write_a_network_for_every_task_and_leave_the_run_as_it_was(tasks):
    before, problem = tree(tasks), problem_of(tasks)
    for method in OF_TASKS:
        folder = generate(tasks, "--method", method)
        assert folder.name == f"{method}-tasks-s0-n1"
        found = Zoo.read(folder, "generate")
        assert {s: len(found.select(s)) for s in ("seen", "validation", "unseen")} == {
            "seen": 8, "validation": 4, "unseen": 4,
        }  # fmt: skip
        assert set(found.artifact.manifest.inputs) == {"tokens"}
        assert ("evaluate" in found.artifact.section) == (method in {"mlp", "finetuned"})
        for state in states(folder):
            problem.build("fresh").load_state_dict(state, strict=True)
    assert {name: digest for name, digest in tree(tasks).items() if not name.startswith("generated/")} == before


@pytest.mark.parametrize("method", OF_ONE_QUESTION)
def test_network_i_is_the_same_however_many_are_asked_for(made, tmp_path, method):
    three, two, other = (
        states(generate(made, "--method", method, "--count", count, "--seed", seed, "--out", tmp_path / name))
        for name, count, seed in (("three", 3, 0), ("two", 2, 0), ("other", 3, 1))
    )
    assert all(same_bits(a, b) for a, b in zip(three, two))
    means = method in {"average", "soup-16"}
    assert all(same_bits(a, b) == means for a, b in zip(three, other))


@pytest.mark.parametrize("method", OF_TASKS)
def test_the_network_of_a_task_is_the_same_whatever_else_is_asked_for(tasks, method):
    whole = Zoo.read(generate(tasks, "--method", method), "generate")
    chosen = whole.select("unseen")[1]
    alone = generate(tasks, "--method", method, "--task-bits", chosen.task_bits, "--count", 2)
    first, second = states(alone)
    assert same_bits(first, whole.state(chosen))
    assert same_bits(first, second) == (method not in {"average-trunk", "finetuned"})


# --- what they make ---------------------------------------------------------------------------------------------------


def test_average_of_raw_networks_is_useless_and_of_aligned_ones_it_is_not(seeds, tmp_path, rpg):
    """A baseline draws in the coordinates of the tokens: the raw one is had with `tokens.align=none`."""
    raw, problem = tmp_path / "raw", problem_of(seeds)
    none = ["--zoo", seeds / "zoo", "--set", "tokens.align=none"]
    assert rpg("tokenize", seeds / "recipe.json", "--run", raw, *none).code == 0
    zoo = Zoo.read(seeds / "zoo")
    trained = accuracy(problem, (zoo.state(network) for network in zoo.networks))
    found = {
        folder.name: accuracy(problem, states(generate(folder, "--method", "average", "--count", 1)))
        for folder in (raw, seeds)
    }
    expected = {n: torch.stack([zoo.state(m)[n] for m in zoo.networks]).mean(0) for n in zoo.state(zoo.networks[0])}
    torch.testing.assert_close(states(raw / "generated/average-all-s0-n1")[0], expected, rtol=1e-3, atol=1e-5)
    assert found["raw"] < trained - 0.25
    assert found["seeds"] > trained - 0.1


def test_nearest_is_the_trained_network_of_a_seen_task(tasks):
    store = TokenStore(artifact.read(tasks / "tokens", "tokenize"))
    found = Zoo.read(generate(tasks, "--method", "nearest"), "generate")
    for network in found.select("seen"):
        rows = [i for i, checkpoint in enumerate(store.checkpoints) if checkpoint["task_bits"] == network.task_bits]
        expected = store.state(rows[-1])
        assert same_bits({name: found.state(network)[name] for name in expected}, expected)


def test_finetuned_is_the_nearest_network_after_some_training_on_the_task_itself(tasks):
    problem = problem_of(tasks)
    bits = Zoo.read(tasks / "zoo").tasks("unseen")
    images = problem.images("train", torch.arange(len(problem.dataset.train.labels)))

    def loss(method: str) -> Tensor:
        found = Zoo.read(generate(tasks, "--method", method), "generate")
        last = {network.task_bits: found.state(network) for network in found.select("unseen")}
        outputs = [functional_call(problem.build("reference"), last[task], (images,)) for task in bits]
        labels = problem.labels("train", bits)
        return torch.stack([F.cross_entropy(o, y).detach() for o, y in zip(outputs, labels)])

    before, after = loss("nearest"), loss("finetuned")
    assert bool((after < before).all()), (before, after)


def test_settings_are_chosen_on_validation_tasks_and_said(tasks, rpg):
    outcome = rpg("generate", "--run", tasks, "--method", "ridge", "--json")
    chosen = outcome.json["facts"]["settings"]
    assert set(chosen["chosen"]) == {"penalty"} and 0 < chosen["validation"] <= 1
    assert outcome.json["facts"]["sampling"] is None
    shown = rpg("generate", "--run", tasks, "--method", "ridge")
    assert f"penalty {chosen['chosen']['penalty']}; accuracy {chosen['validation']:.4f}" in shown.err


# --- judged as any other ----------------------------------------------------------------------------------------------


def test_the_next_command_judges_networks_of_one_question(seeds, rpg):
    outcome = rpg("generate", "--run", seeds, "--method", "soup-4", "--count", 3)
    assert outcome.last == f"next: rpg evaluate --request soup-4-all-s0-n3 --run {seeds}"
    outcome = rpg(*outcome.last.removeprefix("next: rpg ").split(), "--json")
    assert outcome.code == 0, outcome.err
    mine = generated_row(outcome.json, "all")
    (its_own,) = (g for g in outcome.json["groups"] if (g["name"], g["kind"]) == ("soup-4", "baseline"))
    assert (mine["name"], mine["count"]) == ("soup-4", 3)
    assert mine["accuracy"] == its_own["accuracy"]  # the very same networks
    assert outcome.json["beats_baselines"] is False
    assert rpg("evaluate", "--run", seeds, "--method", "soup-4", "--force").code == 3  # 20 were never drawn


def test_the_next_command_judges_networks_of_tasks(tasks, rpg):
    outcome = rpg("generate", "--run", tasks, "--method", "ridge-pairs")
    assert outcome.last == f"next: rpg evaluate --request ridge-pairs-tasks-s0-n1 --run {tasks}"
    outcome = rpg(*outcome.last.removeprefix("next: rpg ").split(), "--json")
    assert outcome.code == 0, outcome.err
    mine = generated_row(outcome.json, "unseen")
    rows = {g["name"]: g for g in outcome.json["groups"] if g["kind"] == "baseline"}
    assert mine["accuracy"] == rows["ridge-pairs"]["accuracy"]
    assert rows["average-trunk"]["count"] == 4


def test_networks_drawn_from_other_tokens_are_not_judged(seeds, rpg):
    for method in ("average", "kde"):
        generate(seeds, "--method", method)
    assert rpg("tokenize", "--run", seeds, "--set", "tokens.token_dim=16", "--force").code == 0
    before = tree(seeds)
    for request in ("average-all-s0-n20", "latent-kde-all-s0-n20"):
        refused(rpg("evaluate", "--run", seeds, "--request", request), 3, "was not made from", "tokens as it is now")
    refused(rpg("generate", "--run", seeds, "--method", "kde", "--count", 2), 3, "autoencoder was not made", "train-ae")
    assert tree(seeds) == before


# --- the command ------------------------------------------------------------------------------------------------------


def test_families_are_called_by_short_names(seeds, rpg):
    for short, name in SHORT.items():
        assert generate(seeds, "--method", short, "--count", 1).name == f"{name}-all-s0-n1"
        again = rpg("generate", "--run", seeds, "--method", name, "--count", 1)
        assert again.code == 0 and "up to date" in again.err


def test_a_recipe_may_name_a_trivial_generator(seeds, rpg):
    value: dict[str, Any] = json.loads((seeds / "recipe.json").read_text())
    value["generate"] |= {"method": "soup", "count": 2}
    (seeds / "recipe.json").write_text(json.dumps(value))
    written = generate(seeds)
    assert written.name == "soup-16-all-s0-n2"
    assert generated_folder(seeds, None, read_stored(seeds / "recipe.json"), None) == written  # what evaluate judges
    refused(rpg("generate", "--run", seeds, "--set", "generate.method=sop"), 2, "unknown method 'sop'", "'soup'")


def test_a_plan_does_nothing(seeds, rpg):
    before = tree(seeds)
    planned = rpg("generate", "--run", seeds, "--method", "kde", "--count", 5, "--dry-run", "--json").json
    assert planned == {"networks": 5, "bytes": 5 * 4 * 3760, "request": "all"}  # 64 * 50 + 50 + 50 * 10 + 10
    assert tree(seeds) == before


def test_ctrl_c_leaves_nothing_and_the_same_command_starts_again(seeds, rpg, monkeypatch):
    before = tree(seeds)
    with monkeypatch.context() as patch:
        signal_at(patch, 3)
        refused(rpg("generate", "--run", seeds, "--method", "noise"), 130, "stopped by signal 2")
    assert tree(seeds) == before
    assert len(states(generate(seeds, "--method", "noise", "--resume"))) == 20
    outcome = rpg("generate", "--run", seeds, "--method", "noise", "--force")
    assert outcome.code == 0 and "up to date" not in outcome.err


def test_a_run_without_a_model_says_that_trivial_generators_need_none(seeds, tmp_path, rpg):
    refused(rpg("generate", "--run", seeds), 3, "holds no trained model", "--method average")
    refused(rpg("generate", "--run", tmp_path / "none", "--method", "soup"), 3, "rpg tokenize")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "ridge"], ["ridge needs a zoo of tasks", "Of this zoo: average, average-trunk, soup-4"]),
        (["--method", "sup"], ["--method 'sup' is unknown", "did you mean 'soup'?", "soup means soup-16", "kde"]),
        (["--method", "soup", "--task-bits", "0010100000"], ["soup-16 is unconditional: nothing can be asked"]),
        (["--method", "soup", "--steps", "3", "--state", "none"], ["soup-16 denoises nothing: --steps, --state"]),
    ],
)
def test_wrong_wishes_of_a_zoo_of_one_question_end_with_2(made, rpg, options, words):
    before = tree(made)
    outcome = rpg("generate", "--run", made, *options)
    refused(outcome, 2, *words)
    assert "ridge-pairs" not in outcome.err and "nearest" not in outcome.err  # not of this zoo
    assert tree(made) == before


def test_wrong_wishes_of_a_zoo_of_tasks_end_with_2(tasks, rpg):
    before = tree(tasks)
    refused(rpg("generate", "--run", tasks, "--method", "soup"), 2, "soup-16 needs a zoo without tasks", "ridge-pairs")
    refused(rpg("generate", "--run", tasks, "--method", "rigde"), 2, "did you mean 'ridge'?")
    refused(rpg("generate", "--run", tasks, "--method", "ridge", "--accuracy", 0.9), 2, "knows no --accuracy")
    refused(rpg("generate", "--run", tasks, "--method", "ridge", "--task-bits", "01"), 2, "10")
    value: dict[str, Any] = json.loads((tasks / "recipe.json").read_text())
    value["evaluate"]["mlp"] = []
    (tasks / "recipe.json").write_text(json.dumps(value))
    refused(rpg("generate", "--run", tasks, "--method", "mlp"), 2, "evaluate.mlp is empty")
    (tasks / "recipe.json").write_bytes(artifact.canonical(value) + b"\n")
    assert {name for name in tree(tasks) if name.startswith("generated")} == set()
    assert before.keys() == tree(tasks).keys()


def test_latents_need_an_autoencoder(seeds, rpg):
    shutil.rmtree(seeds / "autoencoder")
    before = tree(seeds)
    refused(rpg("generate", "--run", seeds, "--method", "kde"), 3, "autoencoder does not exist", "rpg train-ae")
    assert tree(seeds) == before


def test_every_method_is_named_once():
    assert len(set(METHODS)) == len(METHODS)
    assert set(METHODS) == {"rpg", "pdiff", *OF_TASKS, *OF_ONE_QUESTION}
