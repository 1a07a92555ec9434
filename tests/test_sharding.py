"""Shards: whoever computes the blocks of a stage, in whatever order, the artifact is that of a single process."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rpgcli import artifact, command, pipeline, sharding
from rpgcli.artifact import Artifact, Draft
from rpgcli.collection import START, OptimiserConfig, SeedsConfig, TasksConfig, TrajectoryConfig, collect, collect_shard
from rpgcli.conditions import Asked
from rpgcli.errors import ArtifactError, Interrupted, LockedError, OutputError, RpgError, UsageError
from rpgcli.generation import Request
from rpgcli.models import find_source
from rpgcli.progress import OnStep, Step, silent
from rpgcli.recipe import read_stored
from rpgcli.sharding import Block, Blocks, Executor, Shard, Share, merge
from rpgcli.targets import Mlp3Config
from tests.conftest import SMALL_RPG, Rpg, TinyRun, settings
from tests.helpers import stop_after, tiny_problem

# --- a stage of numbers -----------------------------------------------------------------------------------------------

NUM = 7


class Counting:
    """A stage of seven blocks, each a file with its square; it counts how often each was computed."""

    def __init__(self, folder: Path, *, factor: int = 1, fail_at: int = -1) -> None:
        self.target, self.factor, self.fail_at = folder / "squares", factor, fail_at
        self.computed: list[int] = []

    def work(self) -> list[Block]:
        def write(i: int, draft: Draft, on_step: OnStep) -> dict[str, int]:
            on_step(Step(1, 1))
            if i == self.fail_at:
                raise RpgError(f"block {i} cannot be computed.")
            draft.save_tensors(f"{i}.safetensors", {"x": torch.tensor([self.factor * i * i])})
            self.computed.append(i)
            return {"square": self.factor * i * i}

        return [Block(f"{i:05d}", 1, partial(write, i)) for i in range(NUM)]

    def share(self, shard: str, *, force: bool = False, on_step: OnStep = silent) -> Share:
        blocks = Blocks(self.target, "squares", {"factor": self.factor}, {}, force=force)
        with blocks.working() as finished:
            if finished is not None:
                return Share(blocks.folder, finished=finished)
            return blocks.share(Shard.parse(shard), self.work(), on_step)

    def whole(self, *, force: bool = False, resume: bool = True, on_step: OnStep = silent) -> Artifact:
        run = pipeline.Run(self.target.parent, force=force, resume=resume)
        with run.draft("squares", "squares", {"factor": self.factor}, {}) as draft:
            if draft.finished is not None:
                return draft.finished
            return draft.commit({"blocks": merge(draft, self.work(), on_step)}, {"spent": draft.spent})


@pytest.mark.parametrize("text", ["4/4", "1", "1/0", "-1/4", "a/b", "1/4/2", "", "1 /4", "²/4", "0/100001", "1.0/2"])
def test_a_shard_that_does_not_exist_is_refused_and_the_message_shows_how_they_count(text):
    with pytest.raises(UsageError, match="is not I/N with I from 0 to N - 1") as error:
        Shard.parse(text)
    assert "0/4, 1/4, 2/4 and 3/4" in str(error.value)


def test_shards_compute_every_block_once_for_every_n(tmp_path):
    for n in range(1, NUM + 3):
        stage = Counting(tmp_path / str(n))
        shares = [stage.share(f"{i}/{n}") for i in range(n)]
        assert sorted(stage.computed) == list(range(NUM))
        assert [s.num_blocks for s in shares] == [len(range(i, NUM, n)) for i in range(n)]
        assert all(s.num_computed == s.num_blocks and s.num_all == NUM for s in shares)
        assert stage.share(f"0/{n}").num_computed == 0  # up to date


@pytest.mark.parametrize(
    "shards",
    [["0/1"], ["0/2", "1/2"], ["2/3", "0/3", "1/3"], ["1/4", "0/2"], ["0/3"], ["6/7", "7/8"]],
    ids=lambda shards: " ".join(shards),
)
def test_any_mixture_of_shards_gives_the_artifact_of_one_process_and_the_merge_computes_the_rest(tmp_path, shards):
    expected = Counting(tmp_path / "whole").whole()
    stage = Counting(tmp_path / "run")
    steps: list[Step] = []
    for shard in shards:
        stage.share(shard)
    found = stage.whole(on_step=steps.append)
    assert found.id == expected.id
    assert found.manifest.files == expected.manifest.files
    assert sorted(stage.computed) == list(range(NUM))
    assert [p.name for p in sorted((tmp_path / "run").iterdir())] == [".squares.lock", "squares"]
    assert all(step.total == NUM for step in steps)
    assert {p.stat().st_nlink for p in found.path.iterdir()} == {1}
    assert stage.share("0/2").finished is not None
    assert not stage.share("0/2").folder.exists()


def test_finished_blocks_are_not_taken_and_not_lost_without_resume_or_force(tmp_path):
    stage = Counting(tmp_path)
    stage.share("0/2")
    with pytest.raises(OutputError, match=r"is unfinished: .*blocks holds blocks of it") as error:
        stage.whole(resume=False)
    assert "--resume" in str(error.value)
    assert stage.whole(resume=False, force=True)
    assert stage.computed == [0, 2, 4, 6, *range(NUM)]


def test_blocks_of_other_settings_are_refused_by_shards_and_merge_until_they_are_forced(tmp_path):
    Counting(tmp_path, factor=1).share("0/2")
    stage = Counting(tmp_path, factor=3)
    for attempt in (lambda: stage.share("1/2"), stage.whole):
        with pytest.raises(OutputError, match="made with other settings") as error:
            attempt()
        assert "factor: 1 there, 3 now" in str(error.value)
    assert not stage.computed
    assert stage.share("1/4", force=True).num_computed == 2
    assert stage.share("1/4", force=True).num_computed == 0
    found = stage.whole(force=True)
    assert found.facts["blocks"] == [{"square": 3 * i * i} for i in range(NUM)]
    assert stage.computed == [1, 5, 0, 2, 3, 4, 6]
    assert found.id == Counting(tmp_path / "whole", factor=3).whole().id


def test_a_finished_stage_of_other_settings_is_refused_at_once_and_replaced_at_the_end(tmp_path):
    old = Counting(tmp_path, factor=1).whole()
    stage = Counting(tmp_path, factor=3)
    with pytest.raises(OutputError, match="exists and was made with other settings"):
        stage.share("0/1")
    stage.share("0/1", force=True)
    assert artifact.read(stage.target, "squares").id == old.id
    # The old settings are up to date, and leave the blocks of the new ones alone.
    assert Counting(tmp_path, factor=1).whole().id == old.id
    assert stage.whole(force=True).facts["blocks"][2] == {"square": 12}
    assert sorted(stage.computed) == list(range(NUM))


def test_an_interrupted_merge_goes_on_with_its_own_blocks_and_those_of_shards(tmp_path):
    expected = Counting(tmp_path / "whole").whole()
    stage = Counting(tmp_path / "run")
    stage.share("1/2")
    with pytest.raises(Interrupted):
        stage.whole(on_step=stop_after(2))
    assert sorted(stage.computed) == [0, 1, 3, 5]
    stage.share("2/7")
    assert stage.whole().id == expected.id
    assert sorted(stage.computed) == list(range(NUM))


def test_a_block_that_fails_leaves_the_finished_ones_and_nothing_of_its_own(tmp_path):
    stage = Counting(tmp_path, fail_at=4)
    with pytest.raises(RpgError, match="block 4"):
        stage.share("0/2")
    assert sorted(p.name for p in (tmp_path / "squares.blocks").glob("[0-9]*")) == ["00000", "00002"]
    stage.fail_at = -1
    assert stage.share("0/2").num_computed == 2


@pytest.mark.parametrize(
    ("name", "there", "now"),
    [("2.safetensors", b"\x04\x00\x00", b"\x05\x00\x00"), ("manifest.json", b'"square":4', b'"square":5')],
)
def test_a_damaged_block_is_found_before_it_is_used_and_forced_shards_compute_it_anew(tmp_path, name, there, now):
    stage = Counting(tmp_path)
    stage.share("0/1")
    path = tmp_path / "squares.blocks" / "00002" / name
    assert path.read_bytes().count(there) == 1
    path.write_bytes(path.read_bytes().replace(there, now))
    with pytest.raises(ArtifactError, match=r"is not the (file|manifest) that was committed") as error:
        stage.whole()
    assert "rpg squares --shard --force" in str(error.value)
    assert stage.share("0/1", force=True).num_computed == 1
    assert stage.whole(force=True).id == Counting(tmp_path / "whole").whole().id


@pytest.mark.parametrize(
    "record",
    [
        {"facts": 1, "files": {"../../x": "0"}, "seconds": 0.0},
        {"files": {}},
        [],
        {"facts": 1, "files": [], "seconds": 1},
    ],
)
def test_a_record_that_is_not_ours_is_refused(tmp_path, record):
    stage = Counting(tmp_path)
    with pytest.raises(Interrupted):
        stage.whole(on_step=stop_after(3))
    (tmp_path / "squares.partial" / "block-00001.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="block-00001"):
        stage.whole()


def test_the_seconds_of_shards_count_as_those_of_the_stage(tmp_path):
    stage = Counting(tmp_path)
    stage.share("0/1")
    for path in (tmp_path / "squares.blocks").glob(f"*/{artifact.MANIFEST}"):
        value = json.loads(path.read_text())
        value["volatile"]["seconds"] = 10.0
        path.write_text(json.dumps(value))
    assert stage.whole().manifest.volatile["spent"] == 10.0 * NUM


# --- several at once --------------------------------------------------------------------------------------------------


def test_a_merge_waits_for_nobody_and_shards_share_the_lock(tmp_path):
    stage = Counting(tmp_path)
    blocks = Blocks(stage.target, "squares", {"factor": 1}, {})
    busy = pytest.raises(LockedError, match=rf"being written by another process \(pid {os.getpid()}\)")
    with blocks.working(), blocks.working(), busy:
        stage.whole()
    with artifact.lock(stage.target), pytest.raises(LockedError), blocks.working():
        pass
    stage.whole()


def test_a_block_that_another_process_computes_is_waited_for(tmp_path):
    blocks = Blocks(tmp_path / "squares", "squares", {}, {})
    begun, waits, computed = threading.Event(), threading.Event(), []

    def write(draft: Draft, on_step: OnStep) -> int:
        computed.append(1)
        begun.set()
        assert waits.wait(60)
        return 1

    def on_step(step: Step) -> None:
        assert "wait for block start" in step.phase
        waits.set()

    first = threading.Thread(target=blocks.make, args=("start", write, silent))
    first.start()
    assert begun.wait(60)
    found = blocks.make("start", write, on_step)
    first.join()
    assert not found.made_now
    assert len(computed) == 1


SLOW_SHARD = """
import sys, time
from pathlib import Path
from rpgcli.sharding import Block, Blocks, Shard
from tests.test_sharding import Counting
stage = Counting(Path(sys.argv[1]))
def on_step(step):
    if step.done == 3:
        print("in the third block", flush=True)
        time.sleep(600)
stage.share("0/2", on_step=on_step)
"""


def test_a_killed_shard_goes_on_at_the_block_it_was_in(tmp_path):
    stage = Counting(tmp_path)
    with subprocess.Popen([sys.executable, "-c", SLOW_SHARD, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.kill()
    assert not (tmp_path / "squares.blocks" / "00004").exists()
    assert stage.share("0/2").num_computed == 2
    assert stage.computed == [4, 6]
    assert stage.whole().id == Counting(tmp_path / "whole").whole().id


# --- zoos -------------------------------------------------------------------------------------------------------------

SHORT = OptimiserConfig(epochs=1, batch_size=16)
TASKS = TasksConfig(
    num_seen=4, num_validation=2, num_unseen=2, runs=2, snapshots=1, block=3, training=SHORT, pretrain=SHORT
)
KINDS: dict[str, Any] = {
    "tasks": TASKS.model_copy(update={"snapshots": 2, "training": OptimiserConfig(epochs=2, batch_size=60)}),
    "seeds": SeedsConfig(num_networks=5, block=2, training=SHORT),
    "trajectory": TrajectoryConfig(runs=3, num_checkpoints=2, block=1, training=SHORT, save=SHORT),
    "subset": TrajectoryConfig(runs=3, num_checkpoints=2, parameters="linear:last", training=SHORT, save=SHORT),
}


class Zoos:
    """Collections of one kind of zoo, whole or in shards."""

    def __init__(self, config: Any) -> None:
        self.problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=config.kind == "tasks")
        self.config = config

    def settings(self) -> dict[str, Any]:
        return {"collect": self.config.model_dump(mode="json")}

    def share(self, folder: Path, shard: str, *, on_step: OnStep = silent) -> Share:
        blocks = Blocks(folder / "zoo", "collect", self.settings(), {})
        with blocks.working():
            return collect_shard(
                self.problem, self.config, 0, blocks, Shard.parse(shard), download=False, on_step=on_step
            )

    def whole(self, folder: Path, *, on_step: OnStep = silent) -> Artifact:
        with pipeline.Run(folder, resume=True).draft("zoo", "collect", self.settings(), {}) as draft:
            networks = collect(self.problem, self.config, 0, draft, download=False, on_step=on_step)
            return draft.commit({"networks": [n.to_json() for n in networks]}, {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_zoo_of_shards_is_the_zoo_of_one_process(tmp_path, kind):
    zoos = Zoos(KINDS[kind])
    expected = zoos.whole(tmp_path / "whole")
    for shards in (["0/1"], ["1/2", "0/2"], ["2/3", "0/3", "1/3"], ["1/3", "0/2"]):
        folder = tmp_path / "-".join(shards).replace("/", "of")
        for shard in shards:
            zoos.share(folder, shard)
        left: list[Step] = []
        found = zoos.whole(folder, on_step=left.append)
        assert found.id == expected.id
        assert found.manifest.files == expected.manifest.files
        assert artifact.verify(found.path)[1] == []
        assert shards == ["1/3", "0/2"] or not left


def test_what_all_networks_start_from_is_trained_by_one_shard_for_all(tmp_path):
    zoos = Zoos(TASKS)
    first: list[Step] = []
    second: list[Step] = []
    zoos.share(tmp_path, "0/2", on_step=first.append)
    zoos.share(tmp_path, "1/2", on_step=second.append)
    assert any(step.phase == "shared start" for step in first)
    assert not any(step.phase for step in second)


def test_blocks_are_not_put_together_with_networks_from_another_start(tmp_path):
    zoos = Zoos(TASKS)
    zoos.share(tmp_path, "0/2")
    with pytest.raises(Interrupted):
        zoos.whole(tmp_path, on_step=stop_after(3))
    start = artifact.read_tensors(tmp_path / "zoo.partial" / START)
    other = {name: value + 1e-6 for name, value in start.items()}
    artifact.write_tensors(tmp_path / "zoo.partial" / START, other)
    with pytest.raises(OutputError, match=r"start\.safetensors is not what the blocks in .* start from"):
        zoos.whole(tmp_path)


def test_blocks_of_a_start_that_is_gone_are_trained_again(tmp_path):
    zoos = Zoos(TASKS)
    zoos.share(tmp_path, "0/2")
    for path in (tmp_path / "zoo.blocks" / "start").iterdir():
        path.unlink()
    (tmp_path / "zoo.blocks" / "start").rmdir()
    assert zoos.whole(tmp_path).id == zoos.whole(tmp_path / "whole").id


# --- the command line -------------------------------------------------------------------------------------------------

ZOO = settings([
    "task.kind=multi-class", "target={kind: mlp3, hidden: [4]}",
    "collect={kind: seeds, num_networks: 4, block: 1, training: {epochs: 1}}",
])  # fmt: skip


def same(a: Path, b: Path) -> bool:
    """Whether two artifacts have one id, and every hashed byte is as it should be."""
    found = [artifact.verify(path) for path in (a, b)]
    return [wrong for _, wrong in found] == [[], []] and found[0][0].id == found[1][0].id


def test_collect_in_shards_from_the_command_line(tmp_path, rpg: Rpg):
    assert rpg("collect", "--run", tmp_path / "whole", *ZOO).code == 0
    run = tmp_path / "run"
    shard = rpg("collect", "--run", run, *ZOO, "--shard", "1/3", "--json")
    assert shard.code == 0, shard.err
    assert shard.json == {
        "shard": "1/3", "path": str(run / "zoo.blocks"), "blocks": 1, "computed": 1, "blocks_of_all": 4,
        "up_to_date": False,
    }  # fmt: skip
    assert not (run / pipeline.RECIPE).exists()
    again = rpg("collect", "--run", run, *ZOO, "--shard", "1/3")
    assert "shard 1/3: 1 of 4 blocks" in again.err and "up to date" in again.err
    assert rpg("collect", "--run", run, *ZOO, "--shard", "3/3").code == 2
    assert rpg("collect", "--run", run, *ZOO, "--seed", 1, "--shard", "0/3").code == 4
    assert rpg("collect", "--run", run, *ZOO, "--shard", "0/3", "--executor", "local:2").code == 2
    assert rpg("collect", "--run", run, *ZOO, "--from", tmp_path, "--shard", "0/3").code == 2
    refused = rpg("collect", "--run", run, *ZOO)
    assert refused.code == 4 and "--resume" in refused.err
    assert rpg("collect", "--run", run, *ZOO, "--resume").code == 0
    assert same(run / "zoo", tmp_path / "whole" / "zoo")
    assert not (run / "zoo.blocks").exists()
    done = rpg("collect", "--run", run, *ZOO, "--shard", "0/3")
    assert done.code == 0 and f"{run / 'zoo'}: up to date" in done.err


def test_generate_in_shards_whatever_their_number(run: Path, rpg: Rpg, monkeypatch):
    monkeypatch.setattr(pipeline, "BLOCK_NETWORKS", 2)
    asked = ["generate", "--run", run, "--task-bits", "0010100000", "--count", 7]
    made = []
    for shards in ([], ["0/1"], ["1/2", "0/2"], ["2/3", "1/3", "0/3"], ["3/4"]):
        out = run / "generated" / f"in-{len(shards)}{shards[:1] == ['3/4']}"
        for shard in shards:
            done = rpg(*asked, "--out", out, "--shard", shard)
            assert done.code == 0, done.err
        whole = rpg(*asked, "--out", out, "--resume", "--json")
        assert whole.code == 0, whole.err
        assert len(whole.json["facts"]["networks"]) == 7
        assert all(network["seconds"] > 0 for network in whole.json["facts"]["networks"])
        made.append(out)
    assert all(same(made[0], other) for other in made[1:])


def test_generated_networks_of_an_interrupted_request_are_not_sampled_again(run: Path, monkeypatch):
    monkeypatch.setattr(pipeline, "BLOCK_NETWORKS", 2)
    maker = pipeline.open_maker
    made: list[int] = []

    def counting(*args: Any) -> Any:
        found = maker(*args)

        def make(sample: Any) -> Any:
            made.append(sample.index)
            return found.make(sample)

        return replace(found, make=make)

    monkeypatch.setattr(pipeline, "open_maker", counting)
    recipe, source = read_stored(run / pipeline.RECIPE), find_source(run, None)
    request = Request("many", [Asked(task_bits="0010100000")], 5)
    with pytest.raises(Interrupted):
        pipeline.run_generate(pipeline.Run(run, on_step=stop_after(3)), recipe, source, request)
    pipeline.run_generate(pipeline.Run(run, resume=True), recipe, source, request)
    assert made == [0, 1, 2, 2, 3, 4]


def without_seconds(value: Any) -> Any:
    """A report without what varies from run to run."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in k}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("shards", [["0/1"], ["1/2", "0/2"], ["1/3", "2/3"]], ids=lambda shards: " ".join(shards))
def test_a_report_of_shards_is_the_report_of_one_process(tiny: TinyRun, tmp_path, rpg: Rpg, shards):
    asked = ["evaluate", "--run", tiny.folder, "--out", tmp_path / "report"]
    blocks = 0
    for shard in shards:
        done = rpg(*asked, "--shard", shard, "--json")
        assert done.code == 0, done.err
        blocks += done.json["computed"]
        assert done.json["blocks_of_all"] == 7
    assert (blocks == 7) == (len(shards) < 2 or "0" in shards[1])
    assert len(list((tmp_path / "report.blocks").glob("*/manifest.json"))) == blocks
    assert rpg(*asked, "--resume").code == 0
    assert same(tmp_path / "report", tiny.folder / "report")
    found, expected = (
        without_seconds(artifact.read(folder, "evaluate").json("report.json"))
        for folder in (tmp_path / "report", tiny.folder / "report")
    )
    assert found == expected


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "finetune"])
def test_a_report_of_one_question_in_shards(tmp_path, rpg: Rpg, augment):
    run = tmp_path / "run"
    few = settings([*SMALL_RPG, "tokens.token_dim=16", "generate.count=3", "rpg.training.num_steps=2"])
    zoo = settings([
        "task.kind=multi-class", "target={kind: mlp3, hidden: [2]}",
        "collect={kind: seeds, num_networks: 4, training: {epochs: 1}}",
    ])  # fmt: skip
    assert rpg("collect", "--run", run, *zoo, *few).code == 0
    for stage in ("tokenize", "train-rpg", "generate"):
        assert (done := rpg(stage, "--run", run)).code == 0, done.err
    more = (
        ["--finetune", *settings(["evaluate.initialisation={num_seeds: 1, training: {epochs: 1}}"])] if augment else []
    )
    asked = ["evaluate", "--run", run, *more]
    assert (done := rpg(*asked)).code == 0, done.err
    for shard in ("0/3", "2/3"):
        assert (done := rpg(*asked, "--out", tmp_path / "report", "--shard", shard)).code == 0, done.err
    assert (done := rpg(*asked, "--out", tmp_path / "report", "--resume")).code == 0, done.err
    assert same(tmp_path / "report", run / "report")
    found, expected = (
        without_seconds(artifact.read(folder, "evaluate").json("report.json"))
        for folder in (tmp_path / "report", run / "report")
    )
    assert found == expected
    assert ("initialisation" in found) == augment


# --- executors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["local", "local:0", "local:", "local:x", "ray:", "ray:0", "slurm:4", "ray:2:3", ""])
def test_an_unknown_executor_is_refused(text):
    with pytest.raises(UsageError, match="is unknown") as error:
        Executor.parse(text)
    assert "local:N" in str(error.value)


def test_executors_are_named_with_their_number_of_shards():
    assert Executor.parse("local:4") == Executor("local", 4)
    assert Executor.parse("ray") == Executor("ray", None)
    assert Executor.parse("ray:16") == Executor("ray", 16)


def scripted(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Shards run this script, with their arguments, instead of rpg."""
    monkeypatch.setattr(
        sharding, "_command", lambda arguments, shard: [sys.executable, "-c", script, *arguments, "--shard", shard]
    )


def test_all_shards_are_started_with_the_arguments_and_share_out_the_devices(tmp_path, monkeypatch):
    scripted(monkeypatch, "import sys; open(sys.argv[1] + '/' + sys.argv[-1][0], 'w').write(' '.join(sys.argv[2:]))")
    steps: list[Step] = []
    Executor("local", 3).run([str(tmp_path), "collect"], steps.append, devices=["cuda:0", "cuda:1"])
    assert [(tmp_path / str(i)).read_text() for i in range(3)] == [
        f"collect --device cuda:{i % 2} --shard {i}/3" for i in range(3)
    ]
    assert (steps[-1].done, steps[-1].total) == (3, 3)


FAILURES = {
    "told": (
        "import json, sys; print(json.dumps({'error': {'message': 'the moon is full.', 'advice': ['Wait.']}}));"
        "sys.exit(4 * (sys.argv[-1] != '0/3'))",
        4, "shard 1/3 (2 of 3 failed): the moon is full.", "Wait.",
    ),
    "untold": (
        "import sys; print('no memory', file=sys.stderr); sys.exit(sys.argv[-1] == '2/3')", 1, "2/3: no memory", "",
    ),
    "killed": ("import os; os.kill(os.getpid(), 9)", 1, "shard 0/3 (3 of 3 failed): ended by signal 9", ""),
    "silent": ("import sys; sys.exit(7)", 7, "it says nothing", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_the_failure_of_a_shard_is_the_failure_of_the_whole(monkeypatch, name):
    script, code, what, advice = FAILURES[name]
    scripted(monkeypatch, script)
    with pytest.raises(RpgError) as error:
        Executor("local", 3).run([], silent)
    assert error.value.exit_code == code
    assert what in error.value.what
    assert advice in str(error.value)
    assert "Finished blocks are kept" in str(error.value)


def test_warnings_of_shards_are_told_once(monkeypatch, caplog):
    scripted(monkeypatch, "import sys; print('warning: it is late\\na note', file=sys.stderr)")
    Executor("local", 2).run([], silent)
    assert [record.message for record in caplog.records] == ["it is late"]


def test_an_interrupted_executor_stops_its_shards(tmp_path, monkeypatch):
    scripted(monkeypatch, "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)")
    path = tmp_path / "pid"

    def on_step(step: Step) -> None:
        if path.exists() and path.read_text():
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        Executor("local", 1).run([str(path)], on_step)
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)


def test_shards_are_given_the_command_line_without_the_executor(monkeypatch):
    options = command.SharedOptions(run=Path("runs/x"))
    own = ["--run", "runs/x", "--json", "--quiet"]
    for words in (["--executor", "local:2"], ["--executor=local:2"]):
        monkeypatch.setattr(sys, "argv", ["rpg", "collect", "digits", *words, "--set", "seed=1"])
        assert command.shard_arguments(options) == ["collect", *own, "digits", "--set", "seed=1"]


def test_a_local_executor_gives_the_artifact_of_one_process(tmp_path, rpg: Rpg):
    assert rpg("collect", "--run", tmp_path / "whole", *ZOO).code == 0
    done = rpg("collect", "--run", tmp_path / "run", *ZOO, "--executor", "local:2")
    assert done.code == 0, done.err
    assert same(tmp_path / "run" / "zoo", tmp_path / "whole" / "zoo")
    assert not (tmp_path / "run" / "zoo.blocks").exists()


def test_ray_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="needs the package ray") as error:
        Executor("ray", 2).run([], silent)
    assert "rpgcli[ray]" in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_gives_the_artifact_of_one_process_and_passes_failures_on(tmp_path, rpg: Rpg, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)  # The shards run in the folder of the command.
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert rpg("collect", "--run", "whole", *ZOO).code == 0
        done = rpg("collect", "--run", "run", *ZOO, "--executor", "ray")
        assert done.code == 0, done.err
        assert same(tmp_path / "run" / "zoo", tmp_path / "whole" / "zoo")
        other = rpg("collect", "--run", "run", *ZOO, "--seed", 1, "--executor", "ray:1", "--json")
        assert other.code == 4 and "seed: 0 there, 1 now" in json.dumps(other.json)
    finally:
        ray.shutdown()
