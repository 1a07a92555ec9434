"""p-diff on the command line: the whole pipeline on tiny zoos, its plans, and what happens to a user who errs.

Wherever a command is refused, every byte of the run must be as it was.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rpgcli import artifact, rng
from rpgcli.problem import ProblemConfig
from rpgcli.targets import CnnConfig
from rpgcli.zoo import Zoo
from tests.conftest import run_rpg, settings
from tests.test_cli import identity, refused, signal_at, tree

SMALL_AE = [
    "autoencoder.network={kind: mlp, latent_dim: 4, widths: [32]}",
    "autoencoder.training={num_steps: 120, batch_size: 16, learning_rate: 3e-3, checkpoint_every: 50}",
]
SMALL_DIFFUSION = [
    "diffusion.condition_dim=16", "diffusion.denoiser={kind: mlp, width: 64, depth: 1}",
    "diffusion.training={num_steps: 300, batch_size: 64, learning_rate: 5e-3, ema_decay: 0.98}",
    "diffusion.selection.num_steps=[2]", "diffusion.selection.temperatures=[0.5]",
]  # fmt: skip
BRIEFLY = [*SMALL_DIFFUSION, "diffusion.training={num_steps: 5, batch_size: 16}"]
"""Too few steps to learn anything: to be used with --allow-bad."""
TRAJECTORY = (
    "{kind: trajectory, parameters: PARAMETERS, num_checkpoints: 30, training: {epochs: 1}, "
    "save: {epochs: 1, batch_size: 32, learning_rate: 2e-3}}"
)
SUBSET = "[linear:last, 'c1.*']"
STAGES = {
    "collect": "zoo",
    "tokenize": "tokens",
    "train-ae": "autoencoder",
    "train-diffusion": "diffusion",
    "generate": "generated/pdiff-all-s0-n4",
    "evaluate": "report",
}
"""Command -> the folder that it writes."""
NEXT = {
    "collect": "tokenize",
    "tokenize": "train-ae",
    "train-ae": "train-diffusion",
    "train-diffusion": "generate",
    "generate": "evaluate",
}


def zoo_options(parameters: str, target: str = "cnn") -> list[str]:
    """The options that a small zoo without tasks is collected with."""
    return settings([
        f"collect={TRAJECTORY.replace('PARAMETERS', parameters)}", "task.kind=multi-class", f"target.kind={target}",
        "generate={method: pdiff, count: 4}", "evaluate.finetune={epochs: 1, batch_size: 256}",
        *SMALL_AE, *SMALL_DIFFUSION,
    ])  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A finished run and the last line of each stage. Do not change it: copy `run`."""

    folder: Path
    last: dict[str, str]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All stages on a zoo in which the head and the first convolution of a small CNN vary."""
    found = Made(tmp_path_factory.mktemp("pdiff") / "run", {})
    for stage in STAGES:
        options = zoo_options(SUBSET) if stage == "collect" else []
        outcome = run_rpg(stage, "--run", found.folder, *options)
        assert outcome.code == 0, outcome.err
        found.last[stage] = outcome.last
    return found


@pytest.fixture
def run(made: Made, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(made.folder, tmp_path / "run"))


@pytest.fixture(scope="session")
def both(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of tasks with both models. Do not change it."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path_factory.mktemp("both") / "run"))
    for command in (["train-ae", *settings(SMALL_AE)], ["train-diffusion", *settings(BRIEFLY), "--allow-bad"]):
        outcome = run_rpg(*command, "--run", folder)
        assert outcome.code == 0, outcome.err
    return folder


def assert_loads(folder: Path, generated: Path) -> list[dict[str, torch.Tensor]]:
    """Every file of a request fits the target as it is."""
    zoo = Zoo.read(folder / "zoo")
    problem = ProblemConfig.of(zoo.artifact.section).open(data_root=None, download=False, device=torch.device("cpu"))
    states = [load_file(path) for path in sorted(generated.glob("*.safetensors"))]
    for state in states:
        problem.build("fresh").load_state_dict(state, strict=True)
        assert all(bool(value.isfinite().all()) for value in state.values())
    return states


# --- a good run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", NEXT)
def test_last_line_of_a_stage_is_the_next_command(made, stage):
    assert made.last[stage] == f"next: rpg {NEXT[stage]} --run {made.folder}"


@pytest.mark.parametrize("stage", STAGES)
def test_second_run_is_up_to_date_and_changes_no_byte(run, rpg, stage):
    before = tree(run)
    outcome = rpg(stage, "--run", run, "--resume")
    assert outcome.code == 0
    assert f"{run / STAGES[stage]}: up to date" in outcome.err
    assert tree(run) == before


def test_networks_of_a_subset_zoo_are_written_whole(made):
    states = assert_loads(made.folder, made.folder / STAGES["generate"])
    zoo = Zoo.read(made.folder / "zoo")
    subset = zoo.artifact.facts["parameters"]
    assert set(subset) == {"head.weight", "head.bias", "c1.weight", "c1.bias"}
    assert len(states) == 4 and not torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    for state in states:
        assert set(state) == {*subset, *zoo.shared}
        assert all(torch.equal(state[name], zoo.shared[name]) for name in zoo.shared)


def test_diffusion_of_the_small_run_has_learned(made):
    latents = artifact.read(made.folder / "diffusion", "train-diffusion").facts["latents"]
    assert latents["learned"] and latents["num_samples"] == 30


def test_report_holds_the_trivial_generators_of_latents_too(made):
    report = json.loads((made.folder / "report/report.json").read_text())
    rows = {(g["name"], g["kind"], g["split"]): g["count"] for g in report["groups"]}
    assert rows["trained", "trained", "seen"] == 30 and rows["pdiff", "generated", "all"] == 4
    assert {"average", "gaussian-full", "latent-kde", "finetuned", "noise-0.1"} <= {name for name, _, _ in rows}


def test_whole_networks_and_wanted_accuracies(tmp_path, rpg):
    run = tmp_path / "run"
    for command in (["collect", *zoo_options("all", "mlp3")], ["tokenize"], ["train-ae"]):
        outcome = rpg(*command, "--run", run)
        assert outcome.code == 0, outcome.err
    reached = sorted(n.accuracy["validation"] for n in Zoo.read(run / "zoo").networks if n.accuracy is not None)
    middle = reached[len(reached) // 2]
    assert reached[0] < middle < 1
    levels = settings(["diffusion.condition=accuracy-level", f"diffusion.levels=[[0, {middle}], [{middle}, 1]]"])
    train = ["train-diffusion", "--run", run, *settings(BRIEFLY), "--allow-bad"]
    assert rpg(*train, *levels).code == 0
    assert rpg("generate", "--run", run, "--json", "--dry-run").json["networks"] == 2 * 4  # It never saw no condition.
    assert rpg(*train, *levels, "--set", "diffusion.condition_dropout=0.3", "--force").code == 0
    asked = rpg("generate", "--run", run, "--accuracy", 0.01, "--json")
    assert asked.code == 0, asked.err
    assert [n["asked_accuracy"] for n in asked.json["facts"]["networks"]] == [0.01] * 4
    assert_loads(run, Path(asked.json["path"]))
    everything = rpg("generate", "--run", run, "--json")  # each level, and without one
    assert len(everything.json["facts"]["networks"]) == 3 * 4
    assert "the diffusion has not learned" in everything.err
    report = rpg("evaluate", "--run", run, "--json").json
    assert "the diffusion has not learned" in report["findings"][-1]["sentence"]
    shown = report["levels"]
    assert [row["asked"]["count"] for row in shown] == [4, 4] and shown[0]["unasked"]["count"] == 4
    before = tree(run)
    refused(rpg("generate", "--run", run, "--task-bits", "0010100000"), 2, "knows no --task-bits", "--accuracy")
    refused(rpg("generate", "--run", run, "--accuracy", 2), 2, "--accuracy")
    assert tree(run) == before
    assert rpg(*train, "--set", "diffusion.condition=accuracy", "--force").code == 0
    assert rpg("generate", "--run", run, "--accuracy", 0.5, "--out", tmp_path / "out").code == 0


def test_labels_are_names_of_folders(tmp_path, rpg):
    source, run = tmp_path / "networks", tmp_path / "run"
    for i in range(8):
        (source / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        with rng.initialising(i):
            state = CnnConfig().build(1, (8, 8), 10).state_dict()
        artifact.write_tensors(source / "ab"[i % 2] / f"net{i}.safetensors", state)
    options = settings(["task.kind=multi-class", *SMALL_AE, *BRIEFLY, "diffusion.condition=label"])
    refused(rpg("train-diffusion", "--run", run, *options[:2], "--dry-run"), 2, "reads only the section")
    for command in (["collect", "--from", source, *options], ["tokenize"], ["train-ae"]):
        outcome = rpg(*command, "--run", run)
        assert outcome.code == 0, outcome.err
    assert rpg("train-diffusion", "--run", run, "--dry-run", "--json").json["plans"][0]["of the condition"] > 0
    assert rpg("train-diffusion", "--run", run, "--allow-bad").code == 0
    asked = rpg("generate", "--run", run, "--label", "b", "--count", 2, "--json")
    assert asked.code == 0, asked.err
    assert [n["label"] for n in asked.json["facts"]["networks"]] == ["b", "b"]
    assert_loads(run, Path(asked.json["path"]))
    refused(rpg("generate", "--run", run, "--label", "c"), 2, "--label 'c' is unknown", "a, b")


# --- two models in a run ----------------------------------------------------------------------------------------------


def test_method_decides_where_a_run_holds_both_models(both, tmp_path, rpg):
    run = Path(shutil.copytree(both, tmp_path / "run"))
    before = tree(run)
    for command in (["generate"], ["generate", "--task-bits", "0010100000"], ["evaluate"]):
        refused(rpg(*command, "--run", run), 2, "holds several models", "--method rpg or pdiff")
    refused(rpg("generate", "--run", run, "--method", "pdif"), 2, "did you mean 'pdiff'")
    assert tree(run) == before
    outcome = rpg("generate", "--run", run, "--method", "pdiff")
    assert outcome.code == 0, outcome.err
    assert outcome.last == f"next: rpg evaluate --method pdiff --run {run}"
    outcome = rpg(*outcome.last.removeprefix("next: rpg ").split(), "--force", "--json")
    assert outcome.code == 0, outcome.err
    rows = {(g["name"], g["split"]): g["count"] for g in outcome.json["groups"]}
    assert rows["pdiff", "unseen"] == 4 and rows["ridge", "unseen"] == 4


def test_conditional_networks_load_and_each_method_has_its_own_folder(both, tmp_path, rpg):
    run = Path(shutil.copytree(both, tmp_path / "run"))
    folders = {}
    for method in ("rpg", "pdiff"):
        outcome = rpg("generate", "--run", run, "--method", method, "--task-bits", "0010100000", "--json")
        assert outcome.code == 0, outcome.err
        folders[method] = Path(outcome.json["path"])
        (state,) = assert_loads(run, folders[method])
        assert state["head.weight"].shape == (2, 24)
    assert {method: path.name for method, path in folders.items()} == {
        "rpg": "0010100000-s0-n1", "pdiff": "pdiff-0010100000-s0-n1",
    }  # fmt: skip


def test_next_command_after_training_names_the_method_where_it_must(both, tmp_path, rpg):
    run = Path(shutil.copytree(both, tmp_path / "run"))
    assert rpg("train-rpg", "--run", run).last == f"next: rpg generate --method rpg --run {run}"
    shutil.rmtree(run / "rpg")
    options = [*settings(BRIEFLY), "--run", run]
    assert rpg("train-diffusion", *options).last == f"next: rpg generate --run {run}"


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "step"), [("train-ae", 60), ("train-ae", 120), ("train-diffusion", 150)])
def test_ctrl_c_and_resume_give_the_artifact_of_an_uninterrupted_run(made, run, rpg, monkeypatch, stage, step):
    folder = run / STAGES[stage]
    shutil.rmtree(folder)
    before = tree(run)
    with monkeypatch.context() as patch:
        signal_at(patch, step)
        refused(rpg(stage, "--run", run), 130, "stopped by signal 2", "--resume")
    assert not folder.exists()
    assert {name: digest for name, digest in tree(run).items() if ".partial/" not in name} == before
    refused(rpg(stage, "--run", run), 4, "is unfinished", "--resume")
    outcome = rpg(stage, "--run", run, "--resume")
    assert outcome.code == 0, outcome.err
    assert identity(folder) == identity(made.folder / STAGES[stage])
    assert not list(run.rglob("*.partial"))


def test_ctrl_c_while_sampling_is_chosen_loses_no_training(both, tmp_path, rpg, monkeypatch):
    run = Path(shutil.copytree(both, tmp_path / "run"))
    shutil.rmtree(run / "diffusion")
    command = ["train-diffusion", "--run", run, *settings(BRIEFLY), "--allow-bad"]
    with monkeypatch.context() as patch:
        signal_at(patch, 6)
        refused(rpg(*command), 130, "--resume")
    outcome = rpg(*command, "--resume")
    assert outcome.code == 0 and "/5 steps" not in outcome.err, outcome.err
    assert identity(run / "diffusion") == identity(both / "diffusion")


# --- a diffusion that has not learned ---------------------------------------------------------------------------------


def test_untrained_diffusion_ends_with_5_and_is_kept_only_when_asked_for(run, rpg):
    shutil.rmtree(run / "diffusion")
    shutil.rmtree(run / "generated")
    before = tree(run)
    command = ["train-diffusion", "--run", run, "--set", "diffusion.training.num_steps=1"]
    refused(rpg(*command), 5, "has not learned", "expected 0.7 to 1.1", "--allow-bad --resume")
    after = tree(run)
    assert "diffusion.partial/checkpoint.safetensors" in after
    assert {name: digest for name, digest in after.items() if not name.startswith("diffusion.partial/")} == before
    refused(rpg(*command, "--allow-bad"), 4, "is unfinished", "--resume")
    refused(rpg(*command, "--resume"), 5, "has not learned")
    refused(rpg("generate", "--run", run), 3, "diffusion is unfinished")
    outcome = rpg(*command, "--allow-bad", "--resume")
    assert outcome.code == 0, outcome.err
    assert "has not learned" in outcome.err and "step" not in outcome.err.splitlines()[0]  # nothing is trained again
    assert artifact.read(run / "diffusion", "train-diffusion").facts["latents"]["learned"] is False
    assert not (run / "diffusion.partial").exists()
    assert rpg("generate", "--run", run).code == 0


def test_diverging_diffusion_leaves_nothing_but_what_was_there(run, rpg):
    before = tree(run)
    options = ["diffusion.training.learning_rate=1e30", "diffusion.training.gradient_clip=0"]
    outcome = rpg("train-diffusion", "--run", run, *settings(options), "--force")
    refused(outcome, 1, "no longer finite", "learning_rate")
    assert tree(run) == before


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["collect.parameters=haed"], ["no parameter of the network is named 'haed'", "did you mean 'head'"]),
        (["collect.parameters=[head, 'd1*']"], ["'d1*'", "Expected a list of names of parameters"]),
        (["collect.parameters=nrom:last2"], ["unknown role 'nrom'", "did you mean 'norm'"]),
        (["collect.parameters=linear:last9"], ["'linear:last9' does not fit", "layers of this role"]),
        (["collect.parameters=linear:lst"], ["unknown range 'lst'"]),
        (["collect.parameters=[]"], ["collect.parameters"]),
        (["collect.num_checkpoints=999"], ["999", "takes only 40 steps", "Ask for at most 40"]),
        (["diffusion.levels=[[0.5, 0.9], [0.8, 1]]"], ["0.5-0.9, 0.8-1", "do not overlap"]),
    ],
)  # fmt: skip
def test_wrong_zoo_is_refused_before_anything_is_trained(run, rpg, options, words):
    before = tree(run)
    for more in (["--force"], ["--dry-run"]):
        refused(rpg("collect", "--run", run, *zoo_options(SUBSET), *settings(options), *more), 2, *words)
    assert tree(run) == before


def test_subset_of_statistics_alone_is_frozen(run, rpg):
    before = tree(run)
    options = [*zoo_options("['*.running_mean']"), "--set", "target={kind: timm, name: resnet18}", "--force"]
    refused(rpg("collect", "--run", run, *options), 2, "only statistics", "nothing would be trained")
    assert tree(run) == before


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["train-ae", "--set", "autoencoder.network.latent_dim=9999"], 2, ["9999 dimensions", "latent_dim to 330"]),
        (["train-ae", "--set", "autoencoder.network={kind: pca, latent_dim: 40}"], 2, ["principal components", "40"]),
        (["train-ae", "--set", "autoencoder.network.kind=cnn"], 2, ["unknown", "conv, mlp, pca, vae"]),
        (["train-diffusion", "--set", "diffusion.condition=task-bits"], 2, ["have no task", "none or auto"]),
        (["train-diffusion", "--set", "diffusion.condition=label"], 2, ["have none", "sub-folder"]),
        (["train-diffusion", "--set", "diffusion.condition=accuracy-level"], 2, ["without diffusion.levels"]),
        (
            ["train-diffusion", *settings(["diffusion.condition=accuracy-level", "diffusion.levels=[[0.998, 0.999]]"])],
            2,
            ["in level 0.998-0.999", "They reach", "networks in each level: 0"],
        ),
        (["generate", "--task-bits", "0010100000"], 2, ["unconditional", "Leave out --task-bits"]),
        (["generate", "--accuracy", "0.5"], 2, ["unconditional"]),
        (["generate", "--label", "a"], 2, ["unconditional"]),
        (["generate", "--method", "rpg"], 3, ["rpg does not exist", "rpg train-rpg"]),
        (["evaluate", "--method", "rpg"], 3, ["rpg does not exist"]),
    ],
)  # fmt: skip
def test_wrong_settings_of_later_stages_are_refused(run, rpg, command, code, words):
    before = tree(run)
    more = ["--force"] if command[0].startswith("train") else []
    refused(rpg(*command, "--run", run, *more), code, *words)
    assert rpg(*command, "--run", run, *more, "--json").json["error"]["exit_code"] == code
    assert tree(run) == before


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("train-ae", ["tokens does not exist", "rpg tokenize"]),
        ("train-diffusion", ["autoencoder does not exist", "rpg train-ae"]),
    ],
)
def test_stage_before_what_it_reads_is_refused(run, rpg, stage, words):
    for folder in ("tokens", "autoencoder", "diffusion"):
        if words[0].startswith(folder) or folder != "tokens":
            shutil.rmtree(run / folder)
    before = tree(run)
    refused(rpg(stage, "--run", run), 3, *words)
    assert tree(run) == before


def test_zoo_of_one_network_has_nothing_to_learn(tmp_path, rpg):
    run = tmp_path / "run"
    outcome = rpg("collect", "--run", run, *zoo_options(SUBSET), "--set", "collect.num_checkpoints=1")
    assert outcome.code == 0, outcome.err
    before = tree(run)
    refused(rpg("tokenize", "--run", run), 3, "holds 1 seen network:", "Collect several")
    assert tree(run) == before


def test_autoencoder_of_other_tokens_is_refused(run, rpg):
    assert rpg("collect", "--run", run, *zoo_options(SUBSET), "--set", "seed=5", "--force").code == 0
    assert rpg("tokenize", "--run", run, "--force").code == 0
    before = tree(run)
    for more in ([], ["--force"]):
        outcome = rpg("train-diffusion", "--run", run, *more)
        refused(outcome, 3, "autoencoder was not made from", "rpg train-ae --force")
        refused(rpg("evaluate", "--run", run, *more), 3, "was not made from", "--force")
    assert tree(run) == before


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("train-ae", "tokens/tokens-00000.safetensors"),
        ("train-diffusion", "autoencoder/model.safetensors"),
        ("generate", "diffusion/model.safetensors"),
        ("generate", "diffusion/autoencoder.safetensors"),
        ("evaluate", "autoencoder/model.safetensors"),
    ],
)
def test_damaged_input_of_each_stage_is_refused(run, rpg, stage, file):
    shutil.rmtree(run / STAGES[stage])
    (run / file).write_bytes((run / file).read_bytes()[:-100])
    before = tree(run)
    refused(rpg(stage, "--run", run), 3, file)
    assert tree(run) == before


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_dry_run_writes_nothing(run, rpg, stage):
    before = tree(run)
    assert rpg(stage, "--run", run, "--dry-run").code == 0
    assert tree(run) == before


def test_plans_agree_with_what_was_made(made, rpg):
    def plan(stage: str) -> Any:
        return rpg(stage, "--run", made.folder, "--dry-run", "--json").json["plans"][0]

    def facts(stage: str) -> Any:
        return artifact.read(made.folder / STAGES[stage], stage).facts

    collected, tokenized = plan("collect"), plan("tokenize")
    zoo = artifact.read(made.folder / "zoo", "collect").manifest
    sizes = [record.size for name, record in zoo.files.items() if name.endswith(".safetensors")]
    assert (collected["networks"], collected["of the subset"]) == (30, facts("tokenize")["num_parameters"])
    assert collected["steps of each block"] == 40
    headers = sum(sizes) - collected["zoo_bytes"]
    assert 0 < headers < 31 * 1000
    for name in ("checkpoints", "tokens", "parameters"):
        assert tokenized[name] == facts("tokenize")[f"num_{name}"]
    assert tokenized["parameters"] + tokenized["stored once"] == facts("collect")["num_parameters"]
    autoencoder, diffusion = plan("train-ae"), plan("train-diffusion")
    assert autoencoder["model parameters"] == facts("train-ae")["num_weights"]
    assert autoencoder["of the encoder"] + autoencoder["of the decoder"] == autoencoder["model parameters"]
    assert (autoencoder["steps"], autoencoder["latent_dim"], autoencoder["checkpoints"]) == (120, 4, 30)
    assert diffusion["model parameters"] == facts("train-diffusion")["num_weights"]
    assert (diffusion["steps"], diffusion["latent_dim"], diffusion["of the condition"]) == (300, 4, 0)
    for one in (autoencoder, diffusion):
        assert one["fits"] is True and one["estimated_seconds"] > 0
        assert one["peak_memory_bytes"] > 4 * one["model_bytes"]
    rows = {
        (g["name"], g["split"]): g["count"]
        for g in json.loads((made.folder / "report/report.json").read_text())["groups"]
    }
    judged = plan("evaluate")
    assert judged["trained, seen"] == rows["trained", "seen"]
    named = [name for name in ("average", "soup-4", "gaussian-full", "noise-0.1", "finetuned") if name in judged]
    assert len(named) == 5 and all(judged[name] == rows[name, "all"] for name in named[:4])


def test_plan_of_a_later_stage_reads_what_the_run_holds(run, rpg):
    """Earlier stages may have been given other settings than those that the recipe of the run names."""
    assert rpg("tokenize", "--run", run, "--set", "tokens.token_dim=16", "--force").code == 0
    network = "autoencoder.network={kind: pca, latent_dim: 3}"
    assert rpg("train-ae", "--run", run, "--set", network, "--force").code == 0
    assert rpg("train-rpg", "--run", run, "--dry-run", "--json").json["plans"][0]["token_dim"] == 16
    assert rpg("train-diffusion", "--run", run, "--dry-run", "--json").json["plans"][0]["latent_dim"] == 3


def test_principal_components_are_planned_without_steps(run, rpg):
    network = "autoencoder.network={kind: pca, latent_dim: 4}"
    (plan,) = rpg("train-ae", "--run", run, "--set", network, "--dry-run", "--json").json["plans"]
    assert plan["kind"] == "pca" and plan["steps"] == 0 and plan["fits"] is True
    wide = rpg("train-ae", "--run", run, "--set", "autoencoder.network.latent_dim=9999", "--dry-run")
    refused(wide, 2, "9999 dimensions")


def test_micro_batches_are_planned_with_less_memory_and_the_same_work(run, rpg):
    def plan(*more: str) -> Any:
        return rpg("train-ae", "--run", run, *settings(list(more)), "--dry-run", "--json").json["plans"][0]

    network = "autoencoder.network={kind: conv, latent_dim: 8}"
    whole, parts = plan(network), plan(network, "autoencoder.micro_batch=2")
    assert (whole["networks at once"], parts["networks at once"]) == (16, 2)
    assert parts["peak_memory_bytes"] < whole["peak_memory_bytes"]
    assert parts["model parameters"] == whole["model parameters"]


def test_several_recipes_of_subsets_are_planned_together_without_memory(rpg, tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text(
        "name: large\ntask: {kind: multi-class}\ntarget: {kind: timm, name: resnet18}\n"
        "collect: {kind: trajectory, parameters: [norm:last2], num_checkpoints: 40, save: {batch_size: 30}}\n"
    )
    tokens, zoo = (
        rpg(stage, path, "--run", tmp_path / "run", "--dry-run", "--json").json["plans"][0]
        for stage in ("tokenize", "collect")
    )
    assert (tokens["parameters"], tokens["tokens"], tokens["checkpoints"]) == (2048, 16, 40)
    assert tokens["stored once"] > 1e7 and zoo["zoo_bytes"] < 5e7
    assert zoo["of the subset"] == 2048
    plans = rpg("train-ae", path, "pdiff-digits-mlp3", "--dry-run", "--json").json["plans"]
    assert [plan["recipe"] for plan in plans] == ["large", "pdiff-digits-mlp3"]
    assert plans[0]["parameters"] == 2048
    levels = rpg("train-diffusion", "pdiff-digits-accuracy", "--dry-run", "--json").json["plans"][0]
    assert levels["of the condition"] == 4 * 64 + 64 + 64 * 64 + 64
    refused(rpg("train-ae", path, "digits-demo"), 2, "several only with --dry-run")
    assert not (tmp_path / "run").exists()
