"""The command line: exit codes, streams, resumption, and what happens to a user who errs.

Commands run in this process (`rpg` of conftest); a few real processes check signals, pipes and start-up. Wherever a
command is refused, every byte of the run must be as it was.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rpgcli import __version__, artifact, recipe, rng
from rpgcli.command import running
from rpgcli.problem import ProblemConfig
from rpgcli.targets import CnnConfig
from rpgcli.zoo import Zoo

STAGES = {
    "collect": "zoo",
    "tokenize": "tokens",
    "train-rpg": "rpg",
    "generate": "generated/tasks-s0-n1",
    "evaluate": "report",
}
"""Command -> the folder that it writes."""
OTHER_SETTINGS = {
    "collect": "collect.training.learning_rate=0.01",
    "tokenize": "tokens.token_dim=32",
    "train-rpg": "rpg.training.num_steps=7",
    "evaluate": "evaluate.seed=1",
}
NEXT = {"collect": "tokenize", "tokenize": "train-rpg", "train-rpg": "generate", "generate": "evaluate"}
COMMANDS = [*STAGES, "recipes", "inspect", "verify", "doctor"]


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its hash; locks, which are empty of meaning, left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def identity(folder: Path) -> str:
    return artifact.read_manifest(folder / "manifest.json").identity()


def own(tiny, stage: str) -> list[str]:
    """The options that make a stage of the tiny run what it is."""
    return [*tiny.collect] if stage == "collect" else []


def refused(outcome, code: int, *words: str) -> None:
    """One clear message with what to do, and no traceback."""
    assert outcome.code == code, outcome.err
    assert outcome.err.count("error: ") == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err, outcome.err


def signal_at(monkeypatch, step: int, number: signal.Signals = signal.SIGINT) -> None:
    """Send this process a signal just before the progress of its `step`-th step is shown."""
    shown, count = running.on_step, 0

    def on_step(self, progress):
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), number)
        shown(self, progress)

    monkeypatch.setattr(running, "on_step", on_step)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def process(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """`python -m rpgcli` in a process of its own."""
    command = [sys.executable, "-m", "rpgcli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, **options)


# --- what a user sees of a good run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", NEXT)
def test_last_line_of_a_stage_is_the_next_command(tiny, stage):
    assert tiny.outcomes[stage].last == f"next: rpg {NEXT[stage]} --run {tiny.folder}"


def test_last_line_of_the_last_stage_checks_the_run(tiny, rpg):
    last = tiny.outcomes["evaluate"].last
    assert last == f"next: rpg verify {tiny.folder}"
    outcome = rpg(*last.removeprefix("next: rpg ").split())
    assert outcome.code == 0
    assert "damaged" not in outcome.out


@pytest.mark.parametrize("stage", STAGES)
def test_results_are_on_stdout_and_everything_else_on_stderr(tiny, stage):
    outcome = tiny.outcomes[stage]
    assert "next: rpg" not in outcome.out
    assert f"{stage}" in outcome.err and " %" in outcome.err  # progress as plain lines
    tables = {"collect": "lowest", "train-rpg": "chosen", "generate": "asked for", "evaluate": "ridge-pairs"}
    if stage in tables:
        assert tables[stage] in outcome.out and tables[stage] not in outcome.err


@pytest.mark.parametrize("stage", STAGES)
def test_output_to_a_pipe_has_no_escape_codes_and_no_cut_lines(tiny, stage):
    outcome = tiny.outcomes[stage]
    assert "\x1b" not in outcome.out + outcome.err
    assert "…" not in outcome.out


def test_tables_fit_a_terminal_of_80_columns(run, rpg, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(run.parent)
    for command in ("collect", "generate", "evaluate", "inspect"):
        outcome = rpg(command, "--run", run.name, terminal=True)
        assert outcome.code == 0, outcome.err
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", outcome.out).splitlines()
        assert max(map(len, lines)) <= 80, command
        assert outcome.out.count("\x1b") > 0  # bold heads


def test_no_color_is_obeyed_on_a_terminal(run, rpg, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    colour = re.compile(r"\x1b\[(?:\d+;)*3\d")
    assert colour.search(rpg("tokenize", "--run", run, terminal=True).err)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(rpg("tokenize", "--run", run, terminal=True).err)


@pytest.mark.parametrize("stage", STAGES)
def test_second_run_is_up_to_date_and_changes_no_byte(tiny, run, rpg, stage):
    before = tree(run)
    outcome = rpg(stage, "--run", run, *own(tiny, stage), "--resume")
    assert outcome.code == 0
    assert f"{run / STAGES[stage]}: up to date" in outcome.err
    assert tree(run) == before


def test_later_stages_and_collect_read_the_recipe_of_the_run(run, rpg):
    outcome = rpg("collect", "--run", run)
    assert "up to date" in outcome.err


@pytest.mark.parametrize("stage", STAGES)
def test_json_is_one_object_on_stdout(run, rpg, stage):
    outcome = rpg(stage, "--run", run, "--json")
    assert outcome.code == 0
    if stage == "evaluate":
        assert outcome.json == json.loads((run / "report/report.json").read_text())
    else:
        assert outcome.json["id"] == identity(run / STAGES[stage])
        assert outcome.json["up_to_date"] is True
        assert outcome.json["path"] == str(run / STAGES[stage])


def test_quiet_leaves_results_alone(run, rpg):
    outcome = rpg("evaluate", "--run", run, "--force", "-q")
    assert outcome.code == 0
    assert outcome.err == ""
    assert "ridge-pairs" in outcome.out


def test_report_has_the_rows_that_are_always_there(run):
    report = json.loads((run / "report/report.json").read_text())
    rows = {(g["name"], g["kind"], g["split"]) for g in report["groups"]}
    always = {("trained", "trained"), ("rpg", "generated")}
    assert {(name, kind, split) for name, kind in always for split in ("seen", "unseen")} <= rows
    trivial = {name for name, kind, _ in rows if kind == "baseline"}
    assert trivial == {"majority", "average", "average-trunk", "nearest", "ridge", "ridge-pairs", "mlp"}
    assert report["schema"] == 1 and isinstance(report["beats_baselines"], bool) and report["verdict"]


def test_run_folder_can_come_from_the_environment(run, rpg, monkeypatch):
    monkeypatch.setenv("RPG_RUN", str(run))
    assert "up to date" in rpg("tokenize").err
    assert rpg("verify").code == 0


# --- networks that are written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [["--task-bits", "0010100000"], ["--classes", "2,4"], ["--task-bits", "00_1010 0000"]]
)
def test_generated_files_load_strictly_and_are_scored(run, rpg, asked):
    outcome = rpg("generate", "--run", run, *asked, "--count", 5, "--json")
    assert outcome.code == 0, outcome.err
    folder = run / "generated/0010100000-s0-n5"
    networks = outcome.json["facts"]["networks"]
    assert [n["path"] for n in networks] == [str(p) for p in sorted(folder.glob("*.safetensors"))]
    assert len(networks) == 5
    zoo = Zoo.read(run / "zoo")
    problem = ProblemConfig.of(zoo.artifact.section).open(data_root=None, download=False, device=torch.device("cpu"))
    states = []
    for network in networks:
        assert network["task_bits"] == "0010100000" and network["seconds"] >= 0
        state = load_file(network["path"])
        problem.build("fresh").load_state_dict(state, strict=True)
        assert all(value.isfinite().all() for value in state.values())
        states.append(state)
    accuracy = problem.accuracy(states, ["0010100000"] * 5, "test")
    assert bool(((accuracy >= 0) & (accuracy <= 1)).all())


def test_sample_does_not_depend_on_how_many_are_asked_for(run, rpg):
    for count in (1, 3):
        assert rpg("generate", "--run", run, "--task-bits", "0010100000", "--count", count).code == 0
    one, three = (run / f"generated/0010100000-s0-n{n}/0010100000-0000.safetensors" for n in (1, 3))
    assert one.read_bytes() == three.read_bytes()


def test_many_tasks_come_from_a_file_or_from_stdin(run, rpg):
    text = "0010100000  # two and four\n\n1100000000\n"
    (run / "tasks.txt").write_text(text)
    from_file = rpg("generate", "--run", run, "--tasks", run / "tasks.txt", "--json")
    from_stdin = rpg("generate", "--run", run, "--tasks", "-", "--json", stdin="0010100000\n1100000000")
    assert from_file.json["id"] == from_stdin.json["id"] and from_stdin.json["up_to_date"]
    assert not rpg("generate", "--run", run, "--tasks", "-", "--json", stdin="1100000000").json["up_to_date"]
    assert [n["task_bits"] for n in from_file.json["facts"]["networks"]] == ["0010100000", "1100000000"]


def test_another_task_or_setting_is_another_folder_and_needs_no_force(run, rpg):
    folders = set()
    for more in (
        [],
        ["--steps", "3"],
        ["--sampler", "ddpm"],
        ["--temperature", "0"],
        ["--seed", "1"],
        ["--state", "none"],
    ):
        outcome = rpg("generate", "--run", run, "--task-bits", "0010100000", *more, "--json")
        assert outcome.code == 0, outcome.err
        folders.add(outcome.json["path"])
    assert len(folders) == 6


@pytest.mark.parametrize("kind", ["new", "seen"])
def test_evaluate_judges_a_request_for_single_tasks(run, rpg, kind):
    bits = "0010100000" if kind == "new" else Zoo.read(run / "zoo").select("seen")[0].task_bits
    assert rpg("generate", "--run", run, "--task-bits", bits, "--count", 2).code == 0
    outcome = rpg("evaluate", "--run", run, "--request", f"{bits}-s0-n2", "--out", run / "other", "--json")
    assert outcome.code == 0, outcome.err
    rows = {(g["name"], g["split"]): g["count"] for g in outcome.json["groups"]}
    split = "unseen" if kind == "new" else "seen"
    assert rows["rpg", split] == 2 and rows["ridge", split] == 1


def test_pipeline_runs_without_tasks_too(tmp_path, rpg, tiny):
    run = tmp_path / "run"
    zoo = "{kind: seeds, num_networks: 4, block: 2, training: {epochs: 1}}"
    options = [*tiny.collect, "--set", f"collect={zoo}", "--set", "task.kind=multi-class", "--arch", "mlp3"]
    for command in (["collect", *options], ["tokenize"], ["train-rpg"], ["generate", "--count", "3"], ["generate"]):
        outcome = rpg(*command, "--run", run)
        assert outcome.code == 0, outcome.err
    assert artifact.read(run / "rpg", "train-rpg").facts["num_states"] == 4
    assert rpg("generate", "--run", run, "--state", "3", "--json").json["facts"]["networks"][0]["run"] == 3
    refused(rpg("generate", "--run", run, "--task-bits", "0010100000"), 2, "unconditional")
    assert rpg("generate", "--run", run, "--dry-run", "--json").json["networks"] == 20
    assert artifact.read(run / "generated/all-s0-n20", "generate").section["generate"]["count"] == 20
    report = rpg("evaluate", "--run", run, "--json").json
    rows = {(g["name"], g["split"]): g["count"] for g in report["groups"]}
    main = {("trained", "seen"): 4, ("rpg", "seen"): 0, ("rpg", "all"): 20, ("average", "all"): 1}
    assert main.items() < rows.items()
    plan = rpg("evaluate", "--run", run, "--dry-run", "--json").json["plans"][0]
    assert plan["generated, all"] == 20
    assert {name: count for (name, _), count in rows.items() if name not in {"trained", "rpg"}}.items() <= plan.items()


def test_a_setting_alone_changes_the_recipe_of_the_run_not_the_default_one(rpg, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    stored = recipe.load("pdiff-digits-accuracy", ["collect.num_checkpoints=30"])
    (run / "recipe.json").write_text(json.dumps(stored.to_json()))
    plan = rpg("collect", "--run", run, "--runs", 2, "--seed", 6, "--dry-run", "--json").json["plans"][0]
    assert plan["recipe"] == "pdiff-digits-accuracy" and plan["networks"] == 2 * 30


def test_an_artifact_whose_file_is_gone_or_cut_is_not_up_to_date(run, rpg, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "tokens/statistics.safetensors").unlink()
    for command in ("tokenize", "train-rpg"):
        refused(rpg(command, "--run", copy), 3, "statistics.safetensors cannot be read", "rpg tokenize --force")
    assert rpg("tokenize", "--run", copy, "--force").code == 0
    (network,) = list((copy / "zoo").glob("00000*"))[:1]
    network.write_bytes(network.read_bytes()[:-1])
    refused(rpg("evaluate", "--run", copy, "--force"), 3, "is not the file that was committed")


def test_default_recipe_takes_another_kind_of_zoo(rpg, tmp_path):
    options = ["--set", "collect.kind=seeds", "--set", "task.kind=multi-class", "--run", tmp_path / "run"]
    assert rpg("collect", *options, "--dry-run", "--json").json["plans"][0]["networks"] == 100


def test_mlp_can_be_left_out_of_the_baselines(run, rpg):
    report = rpg("evaluate", "--run", run, "--set", "evaluate.mlp=[]", "--force", "--json").json
    assert {g["name"] for g in report["groups"]} >= {"ridge-pairs"} and "mlp" not in report["baseline_settings"]


def test_networks_made_without_a_task_cannot_be_judged_on_tasks(run, rpg):
    assert rpg("train-rpg", "--run", run, "--set", "rpg.condition=none", "--force").code == 0
    assert rpg("generate", "--run", run).code == 0
    refused(rpg("evaluate", "--run", run, "--force"), 3, "without a task", "condition `auto`")


# --- other settings, --force, --resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", OTHER_SETTINGS)
def test_other_settings_are_refused_with_the_fields_that_differ(tiny, run, rpg, stage):
    before = tree(run)
    outcome = rpg(stage, "--run", run, *own(tiny, stage), "--set", OTHER_SETTINGS[stage])
    name, _, value = OTHER_SETTINGS[stage].partition("=")
    refused(outcome, 4, f"{name}: ", f"{value} now", "--force")
    assert tree(run) == before


def test_generate_into_the_folder_of_another_request_is_refused(run, rpg):
    before = tree(run)
    outcome = rpg("generate", "--run", run, "--count", 2, "--out", run / STAGES["generate"])
    refused(outcome, 4, "generate.count: 1 there, 2 now", "--force")
    assert tree(run) == before


def test_force_replaces_and_what_follows_is_told(run, rpg):
    outcome = rpg("tokenize", "--run", run, "--set", "tokens.token_dim=32", "--force")
    assert outcome.code == 0
    assert artifact.read(run / "tokens", "tokenize").facts["token_dim"] == 32
    before = tree(run)
    refused(rpg("train-rpg", "--run", run), 4, "what it was made from has changed since: tokens")
    refused(rpg("evaluate", "--run", run), 4, "what it was made from has changed since: tokens")
    assert tree(run) == before


def test_evaluate_refuses_what_was_not_made_from_this_zoo(tiny, run, rpg):
    assert rpg("collect", "--run", run, *tiny.collect, "--set", "seed=5", "--force").code == 0
    before = tree(run)
    refused(rpg("evaluate", "--run", run, "--force"), 3, "tokens was not made from", "rpg tokenize --force")
    assert tree(run) == before


def test_unfinished_stage_needs_resume_or_force(tiny, run, rpg, monkeypatch):
    shutil.rmtree(run / "zoo")
    with monkeypatch.context() as patch:
        signal_at(patch, 25)  # in the second block
        assert rpg("collect", "--run", run, *tiny.collect).code == 130
    before = tree(run)
    assert any(name.startswith("zoo.partial/") for name in before)
    refused(rpg("collect", "--run", run, *tiny.collect), 4, "is unfinished", "--resume", "--force")
    other = rpg("collect", "--run", run, *tiny.collect, "--set", OTHER_SETTINGS["collect"], "--resume")
    refused(other, 4, "with other settings", "--force")
    refused(rpg("tokenize", "--run", run, "--force"), 3, "is unfinished", "rpg collect --resume")
    assert tree(run) == before
    assert rpg("collect", "--run", run, *tiny.collect, "--force").code == 0
    assert identity(run / "zoo") == identity(tiny.folder / "zoo")
    assert not (run / "zoo.partial").exists()


def test_force_that_is_interrupted_leaves_the_old_artifact(tiny, run, rpg, monkeypatch):
    before = tree(run)
    command = ["collect", "--run", run, *tiny.collect, "--set", OTHER_SETTINGS["collect"], "--force"]
    with monkeypatch.context() as patch:
        signal_at(patch, 25)
        assert rpg(*command).code == 130
    assert {name: digest for name, digest in tree(run).items() if not name.startswith("zoo.partial/")} == before
    assert rpg("tokenize", "--run", run).code == 0
    assert rpg(*command, "--resume").code == 0
    assert artifact.read(run / "zoo", "collect").section["collect"]["training"]["learning_rate"] == 0.01


def test_zoo_of_another_run_is_read_planned_and_named_in_the_next_command(tiny, tmp_path, rpg):
    run, zoo, other = tmp_path / "run", tiny.folder / "zoo", ["--set", "tokens.token_dim=128"]
    tokenize = ["tokenize", "--run", run, "--zoo", zoo, *other]
    (plan,) = rpg(*tokenize, "--dry-run", "--json").json["plans"]
    assert plan["checkpoints"] == 8 and not run.exists()
    outcome = rpg(*tokenize)
    assert outcome.last == f"next: rpg train-rpg --run {run}"
    small = [word for word in tiny.collect if word.startswith("rpg.")]
    train = ["train-rpg", "--run", run, *(word for setting in small for word in ("--set", setting))]
    (plan,) = rpg(*train, "--dry-run", "--json").json["plans"]
    assert (plan["checkpoints"], plan["token_dim"]) == (8, 128)
    assert rpg(*train).code == 0
    outcome = rpg("generate", "--run", run)
    assert outcome.last == f"next: rpg evaluate --zoo {zoo} --run {run}"
    (plan,) = rpg("evaluate", "--run", run, "--zoo", zoo, "--dry-run", "--json").json["plans"]
    assert plan["trained, unseen"] == 4
    evaluate = [*outcome.last.removeprefix("next: rpg ").split(), "--set", "evaluate.mlp=[]"]
    assert rpg(*evaluate).code == 0


@pytest.mark.parametrize(
    ("options", "request_"), [(["--seed", "1"], "tasks-s1-n1"), (["--count", "2"], "tasks-s0-n2"), (["--out"], None)]
)
def test_next_command_after_generate_judges_what_was_generated(run, rpg, options, request_):
    if options == ["--out"]:
        options, request_ = ["--out", run.parent / "out"], str(run.parent / "out")
    outcome = rpg("generate", "--run", run, *options)
    assert outcome.last == f"next: rpg evaluate --request {request_} --run {run}"
    evaluate = [*outcome.last.removeprefix("next: rpg ").split(), "--set", "evaluate.mlp=[]", "--force"]
    assert rpg(*evaluate).code == 0


def test_stored_recipe_of_an_older_version_is_still_that_recipe(tmp_path, rpg, tiny):
    """Its recipe lacks what was added since; a default that changed, or another setting, is another recipe."""
    stored, run = recipe.load("digits-tasks").to_json(), tmp_path / "run"
    for name in ("autoencoder", "diffusion"):
        del stored[name]
    for path in (("tokens", "granularity"), ("rpg", "levels"), ("generate", "method"), ("collect", "block")):
        del stored[path[0]][path[1]]
    command = ["tokenize", "digits-tasks", "--run", run, "--zoo", tiny.folder / "zoo"]
    artifact.make_folder(run)
    (run / "recipe.json").write_text(json.dumps(stored))
    assert rpg(*command).code == 0
    stored["tokens"]["token_dim"] = 77
    (run / "recipe.json").write_text(json.dumps(stored))
    refused(rpg(*command), 2, "has a recipe already")


def test_resume_with_nothing_there_starts_afresh(run, rpg):
    shutil.rmtree(run / "tokens")
    assert rpg("tokenize", "--run", run, "--resume").code == 0


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        ("collect", 5),  # the shared start
        ("collect", 15),  # the first block
        ("collect", 25),  # the second block
        ("tokenize", 3),
        ("train-rpg", 4),
        ("train-rpg", 7),  # choosing how to sample
        ("generate", 3),
        ("evaluate", 2),
        ("evaluate", 5),
    ],
)
def test_ctrl_c_and_resume_give_the_artifact_of_an_uninterrupted_run(tiny, run, rpg, monkeypatch, stage, step):
    command = [stage, "--run", run, *own(tiny, stage)]
    folder = run / STAGES[stage]
    shutil.rmtree(folder)
    before = tree(run)
    with monkeypatch.context() as patch:
        signal_at(patch, step)
        outcome = rpg(*command)
    refused(outcome, 130, "stopped by signal 2", "--resume")
    assert not folder.exists()
    kept = {name: digest for name, digest in tree(run).items() if ".partial/" not in name}
    assert kept == before
    outcome = rpg(*command, "--resume")
    assert outcome.code == 0, outcome.err
    assert identity(folder) == identity(tiny.folder / STAGES[stage])
    assert not list(run.rglob("*.partial"))


def test_training_goes_on_where_it_was_stopped(run, rpg, monkeypatch):
    shutil.rmtree(run / "rpg")
    with monkeypatch.context() as patch:
        signal_at(patch, 4)
        assert rpg("train-rpg", "--run", run).code == 130
    assert "5/6 steps" in rpg("train-rpg", "--run", run, "--resume").err.splitlines()[0]


def test_sigterm_ends_with_143_and_json_says_so(run, rpg, monkeypatch):
    shutil.rmtree(run / "rpg")
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGTERM)
        outcome = rpg("train-rpg", "--run", run, "--json")
    assert outcome.code == 143
    assert outcome.json["error"]["exit_code"] == 143
    assert outcome.json["error"]["kind"] == "Interrupted"


def test_signal_after_the_last_step_is_not_lost(run, rpg, monkeypatch):
    shutil.rmtree(run / "tokens")
    commit = artifact.Draft.commit

    def late(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(artifact.Draft, "commit", late)
        refused(rpg("tokenize", "--run", run), 130, "was complete")
    assert "up to date" in rpg("tokenize", "--run", run).err


def test_real_process_ends_on_ctrl_c_without_a_traceback(tiny, tmp_path):
    options = [*tiny.collect, "--set", "collect.training.epochs=500"]  # minutes, but for the signal
    command = [sys.executable, "-m", "rpgcli", "collect", "--run", str(tmp_path / "run"), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as child:
        assert child.stderr is not None and child.stdout is not None
        lines = [child.stderr.readline()]  # the first progress: the stage is at work
        assert lines[0].startswith("collect: shared start"), lines[0]
        child.send_signal(signal.SIGINT)
        lines += child.stderr.readlines()
        assert child.stdout.read() == ""
    assert child.returncode == 130
    assert "Traceback" not in "".join(lines)
    assert "error: stopped by signal 2" in "".join(lines)
    assert not (tmp_path / "run/zoo").exists()


def test_two_processes_on_one_run_do_not_meet(tiny, run, rpg):
    script = (
        "import fcntl, os, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write(str(os.getpid())); file.flush(); print('held', flush=True); sys.stdin.read()"
    )
    before = tree(run)
    with subprocess.Popen(
        [sys.executable, "-c", script, run / ".zoo.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        outcome = rpg("collect", "--run", run, *tiny.collect, "--set", "seed=5", "--force")
        refused(outcome, 4, f"is being written by another process (pid {other.pid})", "Wait")
        assert rpg("tokenize", "--run", run).code == 0  # readers are not held up
        assert other.stdin is not None
        other.stdin.close()
    assert tree(run) == before
    assert rpg("collect", "--run", run, *tiny.collect).code == 0


# --- bad requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task-bits", "001"], ["3 bits", "10 classes", "0, 1, 2, 3"]),
        (["--task-bits", "00101000000"], ["11 bits", "10 classes"]),
        (["--task-bits", "00101000ab"], ["'a', 'b'", "neither 0 nor 1"]),
        (["--task-bits", "２０１０１０００００"], ["neither 0 nor 1"]),
        (["--task-bits", ""], ["0 bits"]),
        (["--task-bits", "0000000000"], ["no class into the subset"]),
        (["--task-bits", "1111111111"], ["every class into the subset"]),
        (["--classes", "2,x"], ["unknown class 'x'"]),
        (["--classes", ""], ["unknown class ''"]),
        (["--classes", "0,1,2,3,4,5,6,7,8,9"], ["every class"]),
        (["--tasks", "/nowhere/tasks.txt"], ["cannot be read", "one bit string a line"]),
        (["--tasks", "/"], ["cannot be read"]),
        (["--tasks", "-"], ["line 1", "line 3"]),
        (["--task-bits", "0010100000", "--classes", "2"], ["Give one of them"]),
        (["--sampler", "dim"], ["unknown sampler 'dim'", "did you mean 'ddim'"]),
        (["--sampler", '"'], ["--set generate.sampler"]),
        (["--state", "7"], ["--state '7' does not exist"]),
        (["--state", '"'], ["--set generate.state"]),
        (["--count", "0"], ["--count"]),
        (["--steps", "0"], ["--steps"]),
        (["--steps", "5000"], ["5000", "1000"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--method", ""], ["--method ''"]),
        (["--set", "rpg.training.num_steps=9"], ["reads only the section 'generate'"]),
        (["--set", "generate.cuont=9"], ["unknown key; did you mean 'count'"]),
        (["--set", "generate.count"], ["expected key.key=value"]),
        (["--device", "cuda:99"], ["does not exist here"]),
        (["--device", "gpu"], ["Give auto, cpu, cuda or cuda:I"]),
        (["--dtype", "float8"], ["'float8' is unknown"]),
        (["--threads", "0"], ["--threads"]),
    ],
)  # fmt: skip
def test_wrong_request_is_a_usage_error_that_says_what_was_expected(run, rpg, arguments, words):
    before = tree(run)
    outcome = rpg("generate", "--run", run, *arguments, stdin="00101000\n0010100000\nhello\n")
    refused(outcome, 2, *words)
    in_json = rpg("generate", "--run", run, *arguments, "--json", stdin="00101000\n0010100000\nhello\n")
    assert in_json.code == 2
    assert in_json.json["error"]["exit_code"] == 2
    assert tree(run) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["colect"], ["colect", "Did you mean 'collect'"]),
        (["collect", "--resum"], ["--resum", "--resume"]),
        (["collect", "--arch", "resnet81"], ["unknown architecture 'resnet81'", "did you mean"]),
        (["collect", "--dataset", "digit"], ["unknown data set 'digit'", "did you mean 'digits'"]),
        (["collect", "digits-dmo"], ["no recipe 'digits-dmo'", "did you mean 'digits-demo'"]),
        (["collect", "/nowhere/x.yaml"], ["/nowhere/x.yaml cannot be read"]),
        (["collect", "--set", "colect.block=1"], ["unknown key; did you mean 'collect'"]),
        (["collect", "--set", "collect.block=many"], ["expected a whole number, got the text 'many'"]),
        (["collect", "--set", "collect.num_seen=7"], ["must be even", "seen 7"]),
        (["collect", "--set", "collect.num_seen=2000"], ["10 classes have 1022"]),
        (["collect", "--set", "task.kind=multi-class"], ["does not fit task.kind"]),
        (["collect", "--set", "collect.snapshots=9"], ["snapshots (9) exceed"]),
        (["collect", "--dataset", "cifar10"], ["cifar10 is read from files", "--data-root"]),
        (["collect", "--dataset", "fashion-mnist", "--data-root", "/nowhere"], ["no such folder", "--data-root"]),
        (["collect", "--dataset", "folder"], ["--data-root DIR"]),
        (["tokenize", "--set", "collect.block=1"], ["reads only the section 'tokens'"]),
        (["train-rpg", "--set", "rpg.core.dstate=8"], ["unknown key; did you mean 'd_state'"]),
        (["train-rpg", "digits-demo", "digits-tasks"], ["several only with --dry-run"]),
        (["train-rpg", "digits-tasks"], ["has a recipe already"]),
        (["evaluate", "--min-accuracy", "2"], ["--min-accuracy"]),
        (["recipes", "digits-dmo"], ["did you mean 'digits-demo'"]),
    ],
)  # fmt: skip
def test_wrong_argument_is_a_usage_error_that_suggests_a_name(tiny, run, rpg, arguments, words):
    before = tree(run)
    command, *rest = arguments
    options = own(tiny, command) if "--set" in rest else []
    options += ["--force"] if command == "collect" else []
    outcome = rpg(command, *options, *rest, *(["--run", run] if command in COMMANDS else []))
    refused(outcome, 2, *words)
    assert tree(run) == before


def test_data_folder_with_other_files_is_refused_before_anything_is_written(run, rpg, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "notes.txt").write_text("no images")
    before = tree(run)
    for name in ("fashion-mnist", "cifar10", "cifar100", "svhn", "stl10", "folder"):
        outcome = rpg("collect", "--run", run, "--dataset", name, "--data-root", folder, "--force")
        refused(outcome, 2, str(folder), "Expected")
        assert tree(run) == before


def test_failed_first_collection_does_not_leave_its_recipe_behind(tmp_path, rpg):
    run = tmp_path / "run"
    assert rpg("collect", "--run", run, "--dataset", "cifar10").code == 2
    assert tree(run) == {}


RECIPES = {
    "a tab": ("collect:\n\tblock: 8\n", ["bad.yaml:2:1", "a tab in the indentation"]),
    "a duplicate key": ("seed: 1\nname: x\nseed: 2\n", ["bad.yaml:3:1", "duplicate key 'seed'; first on line 1"]),
    "octal-looking bits": ("seed: 0010100000\n", ["bad.yaml:1:1", "got the text '0010100000'"]),
    "a wrong type": ("collect: {block: yes}\n", ["bad.yaml:1:11", "expected a whole number, got the text 'yes'"]),
    "an unknown key": ("rpg:\n  core:\n    dstate: 8\n", ["bad.yaml:3:5", "did you mean 'd_state'"]),
    "an unknown kind": ("dataset: {kind: digit}\n", ["bad.yaml:1:11", "did you mean 'digits'"]),
    "2 MiB": ("# " + "x" * 2**21 + "\n", ["more than 1 MiB"]),
    "no mapping": ("- 1\n", ["expected a mapping"]),
    "no YAML": ("a: [1\n", ["not YAML"]),
    "several problems": ("sed: 1\ncollect: {block: -1}\n", ["2 problems", "bad.yaml:1:1", "bad.yaml:2:11"]),
}  # fmt: skip


@pytest.mark.parametrize("what", RECIPES)
def test_bad_recipe_is_refused_with_file_line_and_column(run, rpg, tmp_path, what):
    text, words = RECIPES[what]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    before = tree(run)
    refused(rpg("collect", path, "--run", run, "--force"), 2, *words)
    refused(rpg("train-rpg", path, "--run", tmp_path / "other"), 2, *words)
    refused(rpg("collect", path, "--dry-run"), 2, *words)
    assert tree(run) == before
    assert not (tmp_path / "other").exists()


def test_recipe_that_is_a_folder_or_not_text_is_refused(rpg, tmp_path):
    refused(rpg("collect", tmp_path, "--run", tmp_path / "run"), 2, "cannot be read")
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\n")
    refused(rpg("collect", tmp_path / "x.yaml", "--run", tmp_path / "run"), 2, "not UTF-8")


# --- bad artifacts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tokenize"], ["zoo does not exist", "rpg collect"]),
        (["train-rpg"], ["tokens does not exist", "rpg tokenize"]),
        (["generate"], ["holds no trained model", "rpg train-rpg"]),
        (["generate", "--task-bits", "0010100000"], ["holds no trained model", "rpg train-rpg"]),
        (["evaluate"], ["holds no trained model", "rpg train-rpg"]),
        (["verify"], ["holds no artifact"]),
        (["inspect"], ["holds no artifact"]),
    ],
)  # fmt: skip
def test_stage_before_what_it_reads_is_refused(rpg, tmp_path, arguments, words):
    outcome = rpg(*arguments, "--run", tmp_path / "run")
    refused(outcome, 3, *words)
    assert rpg(*arguments, "--run", tmp_path / "run", "--json").json["error"]["exit_code"] == 3
    assert not (tmp_path / "run").exists()


def test_evaluate_before_generate_is_refused(run, rpg):
    shutil.rmtree(run / "generated")
    refused(rpg("evaluate", "--run", run), 3, "generated/tasks-s0-n1 does not exist", "rpg generate")
    refused(rpg("evaluate", "--run", run, "--request", "nothing"), 3, "generated/nothing does not exist")


def rewrite(folder: Path, name: str, change) -> None:
    """Change a network of a zoo and let the manifest agree, as another program might."""
    state = {key: value.clone() for key, value in load_file(folder / name).items()}
    change(state)
    artifact.write_tensors(folder / name, state)
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del manifest["volatile"]["id"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def poison(state: dict[str, torch.Tensor]) -> None:
    state["fc.weight"][3, 3] = float("nan")


def reshape(state: dict[str, torch.Tensor]) -> None:
    state["fc.bias"] = torch.zeros(7)


def rename(state: dict[str, torch.Tensor]) -> None:
    state["fc.offset"] = state.pop("fc.bias")


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a truncated file": (lambda zoo: truncate(zoo / "00003.safetensors"), ["00003.safetensors", "size or hash"]),
    "a flipped bit": (lambda zoo: flip(zoo / "00003.safetensors"), ["00003.safetensors", "size or hash"]),
    "a missing file": (lambda zoo: (zoo / "00003.safetensors").unlink(), ["00003.safetensors", "cannot be read"]),
    "a missing manifest": (lambda zoo: (zoo / "manifest.json").unlink(), ["holds no manifest.json"]),
    "a damaged manifest": (lambda zoo: flip(zoo / "manifest.json"), ["manifest"]),
    "a truncated manifest": (lambda zoo: truncate(zoo / "manifest.json"), ["manifest.json is not valid JSON"]),
    "a NaN": (lambda zoo: rewrite(zoo, "00003.safetensors", poison), ["00003.safetensors", "fc.weight holds NaN"]),
    "mixed shapes": (lambda zoo: rewrite(zoo, "00003.safetensors", reshape), ["00003.safetensors", "fc.bias is (7,)"]),
    "other names": (lambda zoo: rewrite(zoo, "00003.safetensors", rename), ["00003.safetensors", "missing: fc.bias"]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_zoo_is_refused_and_nothing_is_written(run, rpg, what):
    damage, words = DAMAGE[what]
    shutil.rmtree(run / "tokens")
    damage(run / "zoo")
    before = tree(run)
    outcome = rpg("tokenize", "--run", run)
    refused(outcome, 3, *words)
    assert len(outcome.err.splitlines()) >= 2  # what to do
    assert tree(run) == before


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("train-rpg", "tokens/tokens-00000.safetensors"),
        ("train-rpg", "tokens/layout.json"),
        ("generate", "rpg/model.safetensors"),
        ("generate", "rpg/statistics.safetensors"),
        ("evaluate", "generated/tasks-s0-n1/manifest.json"),
    ],
)
@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_input_of_each_stage_is_refused(run, rpg, stage, file, damage):
    shutil.rmtree(run / STAGES[stage])
    if stage == "evaluate":
        damage = truncate  # a flipped bit of a manifest may still be a manifest, of another id
    damage(run / file)
    before = tree(run)
    refused(rpg(stage, "--run", run), 3)
    assert tree(run) == before


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"rpg": 3}', '{"tokens": {"width": 1}}'])
def test_damaged_recipe_of_a_run_is_refused_and_can_be_given_anew(tiny, run, rpg, text):
    (run / "recipe.json").write_text(text)
    before = tree(run)
    for command in (["collect"], ["tokenize"], ["tokenize", "--set", "tokens.token_dim=8"]):
        outcome = rpg(*command, "--run", run)
        refused(outcome, 3 if text in {"{", "[]", "null"} else 2, "recipe.json")
    assert tree(run) == before
    assert rpg("collect", "digits-demo", "--run", run, *tiny.collect).code == 0
    assert "up to date" in rpg("tokenize", "--run", run).err


def test_verify_finds_every_damaged_file(run, rpg):
    assert rpg("verify", run, "--json").json["problems"] == []
    flip(run / "zoo/00001.safetensors")
    truncate(run / "tokens/layout.json")
    (run / "rpg/stray.txt").write_text("")
    before = tree(run)
    outcome = rpg("verify", run)
    assert outcome.code == 3
    for name in ("zoo/00001.safetensors", "tokens/layout.json", "rpg/stray.txt"):
        assert name in outcome.err
    outcome = rpg("verify", run, "--json")
    assert len(outcome.json["problems"]) == 3
    assert tree(run) == before


def test_networks_of_a_folder_are_taken_and_noticed_when_they_change(tmp_path, rpg):
    target = CnnConfig()
    source, run = tmp_path / "networks", tmp_path / "run"
    source.mkdir()
    for i in range(3):
        with rng.initialising(i):
            artifact.write_tensors(source / f"net{i}.safetensors", target.build(1, (8, 8), 10).state_dict())
    command = ["collect", "--from", source, "--run", run, "--set", "task.kind=multi-class"]
    outcome = rpg(*command, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["facts"]["seen"]["networks"] == 3
    assert "up to date" in rpg(*command).err
    before = tree(run)
    with rng.initialising(9):
        artifact.write_tensors(source / "net1.safetensors", target.build(1, (8, 8), 10).state_dict())
    refused(rpg(*command), 4, "from: ")
    with rng.initialising(9):
        artifact.write_tensors(source / "net1.safetensors", target.build(1, (8, 8), 2).state_dict())
    refused(rpg(*command, "--force"), 3, "head.weight", "(2, 24)", "(10, 24)")
    (source / "net1.safetensors").write_bytes(b"no network")
    refused(rpg(*command, "--force"), 3, "net1.safetensors is not a safetensors file")
    refused(rpg("collect", "--from", "/nowhere", *command[3:]), 3, "/nowhere")
    assert tree(run) == before


def test_weights_to_start_from_are_known_by_their_content(tiny, tmp_path, rpg):
    weights, run = tmp_path / "start.safetensors", tmp_path / "run"

    def collect(path: Path, *more: str):
        return rpg("collect", *tiny.collect, "--set", f"collect.pretrained={path}", "--run", run, *more)

    def write(seed: int) -> None:
        with rng.initialising(seed):
            artifact.write_tensors(weights, CnnConfig().build(1, (8, 8), 2).state_dict())

    write(0)
    assert collect(weights).code == 0
    elsewhere = shutil.copy(weights, tmp_path / "copy.safetensors")
    assert "up to date" in collect(elsewhere).err
    write(1)
    refused(collect(weights), 4, "collect.pretrained: ", "--force")
    refused(collect(tmp_path / "nowhere.pth"), 3, "nowhere.pth cannot be read")
    assert collect(weights, "--force").code == 0


# --- bad places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*STAGES, "verify", "inspect", "doctor"])
def test_run_that_is_a_file_is_refused(rpg, tmp_path, command):
    path = tmp_path / "file"
    path.write_text("mine")
    refused(rpg(command, "--run", path), 2, "is not a folder")
    assert path.read_text() == "mine"
    if command == "collect":
        refused(rpg(command, "--run", path / "below"), 2, "is not a folder")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that even root cannot write")
def test_unwritable_run_is_refused(tiny, rpg):
    refused(rpg("collect", "--run", "/proc/x", *tiny.collect), 2, "/proc/x cannot be created", "--run")
    outcome = rpg("generate", "--run", tiny.folder, "--out", "/proc/x", "--task-bits", "0010100000")
    refused(outcome, 2, "cannot be written")


def test_out_that_no_stage_wrote_is_never_replaced(run, rpg, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    outcome = rpg("tokenize", "--run", run, "--out", mine, "--force")
    refused(outcome, 3, "not an artifact of rpg")
    assert tree(mine).keys() == {"thesis.txt"}
    refused(rpg("tokenize", "--run", run, "--out", mine / "thesis.txt", "--force"), 2, "is not a folder")
    assert (mine / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    assert rpg("tokenize", "--run", run, "--out", tmp_path / "empty").code == 0
    assert identity(tmp_path / "empty") == identity(run / "tokens")


def test_hostile_names_cannot_write_to_the_terminal(rpg, tmp_path):
    outcome = rpg("inspect", f"{tmp_path}/\x1b[31m\nnext: rpg", terminal=True)
    assert outcome.code == 3
    assert "\x1b[31m\n" not in outcome.err
    assert "\\x1b" in re.sub(r"\x1b\[[0-9;]*m|[│\s]", "", outcome.err)  # The panel breaks long lines anywhere.


# --- gates ------------------------------------------------------------------------------------------------------------


def test_gate_that_is_not_met_ends_with_5_and_everything_is_written(run, rpg):
    shutil.rmtree(run / "report")
    outcome = rpg("evaluate", "--run", run, "--min-accuracy", 0.999)
    assert outcome.code == 5
    assert "below --min-accuracy 0.999" in outcome.err
    assert (run / "report/manifest.json").is_file()
    assert rpg("evaluate", "--run", run, "--min-accuracy", 0.999, "--json").json["schema"] == 1
    assert rpg("evaluate", "--run", run, "--min-accuracy", "nan").code == 2
    assert rpg("evaluate", "--run", run, "--min-accuracy", 0).code == 0


# --- helpers ----------------------------------------------------------------------------------------------------------


def test_help_is_shown_without_importing_torch():
    script = (
        "import sys\nsys.argv = ['rpg', '--help']\nfrom rpgcli.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "slow = {'torch', 'numpy', 'pydantic', 'timm', 'sklearn'} & sys.modules.keys()\nassert not slow, slow\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    for command in COMMANDS:
        assert command in found.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_the_common_options(rpg, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = rpg(command, "--help")
    assert outcome.code == 0
    for option in ("--run", "--device", "--dtype", "--threads", "--json", "--quiet", "--verbose"):
        assert option in outcome.out
    for option in ("--force", "--resume", "--dry-run", "--set"):
        assert (option in outcome.out) == (command in STAGES)


def test_no_command_shows_the_help(rpg):
    outcome = rpg()
    assert outcome.code == 2
    assert "train-rpg" in outcome.out
    assert outcome.err == ""


def test_module_runs_as_a_program():
    found = process("--version")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"rpg {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "digits-demo"], ["inspect"], ["inspect", "--json"]])
def test_reader_that_leaves_ends_the_program_silently(tiny, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rpgcli", *arguments, "--run", str(tiny.folder)]
    with os.fdopen(writer, "w") as gone:
        found = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert (found.returncode, found.stderr) == (128 + signal.SIGPIPE, "")


def test_unforeseen_error_is_one_line_and_a_traceback_only_with_vv(tiny):
    script = (
        "import sys\nfrom rpgcli import artifact, cli\n"
        "def broken(path): raise KeyError('surprise')\nartifact.verify = broken\n"
        "sys.argv = ['rpg', 'verify', *sys.argv[1:]]\ncli.main()"
    )

    def verify(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(tiny.folder), *more]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)

    found = verify("--json")
    assert found.returncode == 1
    assert "internal error: KeyError" in found.stderr and "Traceback" not in found.stderr
    assert json.loads(found.stdout)["error"]["exit_code"] == 1
    assert "Traceback" in verify("-vv").stderr


def test_vv_shows_where_an_error_was_raised(rpg, tmp_path):
    outcome = rpg("tokenize", "--run", tmp_path, "-vv")
    assert outcome.code == 3
    assert "Traceback" in outcome.err


def test_recipes_are_listed_shown_and_copied(rpg, tmp_path):
    assert "digits-demo" in rpg("recipes", "--json").json["recipes"]
    shown = rpg("recipes", "digits-tasks").out
    assert rpg("recipes", "digits-tasks", "--copy", tmp_path / "mine.yaml").code == 0
    assert (tmp_path / "mine.yaml").read_text() == shown
    refused(rpg("recipes", "digits-tasks", "--copy", tmp_path / "mine.yaml"), 2, "exists")
    assert rpg("collect", tmp_path / "mine.yaml", "--dry-run", "--json").code == 0


def test_inspect_shows_a_run_an_artifact_and_a_file(run, rpg):
    found = rpg("inspect", run, "--json").json["artifacts"]
    assert {a["stage"] for a in found} == set(STAGES)
    assert {a["id"] for a in found} == {identity(run / folder) for folder in STAGES.values()}
    assert "num_tokens" in rpg("inspect", run / "tokens").out
    tensors = rpg("inspect", run / "zoo/00000.safetensors", "--json").json["tensors"]
    assert tensors["head.weight"] == {"dtype": "F32", "shape": [2, 24]}
    refused(rpg("inspect", run / "recipe.json"), 3, "is not a safetensors file")


def test_doctor_finds_what_is_there(rpg, tmp_path):
    outcome = rpg("doctor", "--run", tmp_path / "run", "--json", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    # A package may leave its build (+cu126) out of its metadata.
    assert torch.__version__.startswith(found["versions"]["torch"]) and found["versions"]["rpg"] == __version__
    assert found["scan_difference"] < 1e-5 and found["kernel_difference"] is None
    assert found["kernels"]["available"] is False and "rpgcli[cuda]" in found["kernels"]["install"]
    assert found["data_sets"]["digits"] == "embedded in scikit-learn"
    assert found["memory_bytes"] > 2**28 and found["free_disk_bytes"] > 0 and found["cores"] >= 1
    assert found["run_writable"] is True and found["broken"] == []
    assert not (tmp_path / "run").exists()
    assert "chunked scan" in rpg("doctor", "--run", tmp_path).out


def test_doctor_fails_where_the_run_cannot_be_written_or_the_scan_is_wrong(rpg, tmp_path, monkeypatch):
    from rpgcli import diagnosis

    monkeypatch.setattr(diagnosis, "compare_scans", lambda: float("nan"))
    monkeypatch.setattr(diagnosis, "is_writable", lambda folder: False)
    outcome = rpg("doctor", "--run", tmp_path, "--json")
    assert outcome.code == 1
    assert len(outcome.json["broken"]) == 2


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_dry_run_writes_nothing(tiny, run, rpg, stage):
    before = tree(run)
    outcome = rpg(stage, "--run", run, *own(tiny, stage), "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert tree(run) == before
    assert rpg(stage, "--run", run, *own(tiny, stage), "--dry-run").code == 0


def test_plans_agree_with_what_was_made(tiny, rpg):
    def plan(stage: str) -> Any:
        return rpg(stage, "--run", tiny.folder, *own(tiny, stage), "--dry-run", "--json").json["plans"][0]

    zoo, tokens, trained = (
        artifact.read(tiny.folder / n, s) for n, s in (("zoo", "collect"), ("tokens", "tokenize"), ("rpg", "train-rpg"))
    )
    collected = plan("collect")
    assert collected["networks"] == len(zoo.facts["networks"])
    assert collected["trainings"] == sum(n["last"] for n in zoo.facts["networks"])
    assert collected["parameters"] == zoo.facts["num_parameters"]
    networks = [zoo.manifest.files[n["file"]].size for n in zoo.facts["networks"]]
    assert sum(networks) == pytest.approx(collected["zoo_bytes"], rel=0.1)  # and a header each
    tokenized = plan("tokenize")
    assert tokenized["checkpoints"] == tokens.facts["num_checkpoints"]
    assert tokenized["tokens"] == tokens.facts["num_tokens"]
    assert tokenized["tokens_bytes"] == pytest.approx(tokens.manifest.files["tokens-00000.safetensors"].size, rel=0.01)
    training = plan("train-rpg")
    assert training["model parameters"] == trained.facts["num_weights"]
    parts = ("of the core", "of the denoiser", "of the condition", "of the states", "of positions")
    assert sum(training[part] for part in parts) == training["model parameters"]
    assert training["steps"] == 6 and training["fits"] is True
    rows = {
        (g["name"], g["split"]): g["count"]
        for g in json.loads((tiny.folder / "report/report.json").read_text())["groups"]
    }
    judged = plan("evaluate")
    assert judged["generated, unseen"] == rows["rpg", "unseen"] and judged["ridge"] == rows["ridge", "unseen"]


def test_several_recipes_are_planned_together_and_large_ones_without_memory(rpg, tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text(
        "name: large\ntask: {kind: multi-class}\ntarget: {kind: timm, name: resnet50}\ntokens: {token_dim: 8192}\n"
        "collect: {kind: trajectory}\n"
        "rpg: {state: checkpoint, core: {d_model: 8192, d_state: 128}, tokens_per_step: 1024,\n"
        "      denoiser: {kind: conv}, training: {batch_size: 8}}\n"
    )
    plans = rpg("train-rpg", path, "digits-tasks", "--dry-run", "--json").json["plans"]
    assert [plan["recipe"] for plan in plans] == ["large", "digits-tasks"]
    assert plans[0]["model parameters"] > 5e8
    assert plans[0]["peak_memory_bytes"] > 5 * plans[0]["model_bytes"]
    assert plans[0]["estimated_seconds"] > plans[1]["estimated_seconds"] > 0
