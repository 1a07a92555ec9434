"""Resuming: a stage that was stopped anywhere, and goes on, makes the artifact of one that nobody stopped.

Every training has an average of its weights, a learning rate that falls, and batches in parts.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rpgcli import artifact, pipeline
from rpgcli.artifact import Artifact
from rpgcli.errors import Interrupted
from rpgcli.pipeline import Run
from rpgcli.progress import OnStep, Step, silent
from rpgcli.recipe import Recipe, load
from rpgcli.training import CHECKPOINT, METRICS
from tests.helpers import stop_after

NUM_STEPS = 8
TRAINING = (
    f"{{num_steps: {NUM_STEPS}, batch_size: 5, learning_rate: 0.01, schedule: cosine, weight_decay: 0.1, "
    "ema_decay: 0.7, checkpoint_every: 1, log_every: 3}"
)
SETTINGS = [
    "target={kind: mlp3, hidden: [4]}", "tokens.token_dim=64",
    "collect.num_seen=6", "collect.num_validation=2", "collect.num_unseen=2", "collect.block=4", "collect.snapshots=2",
    "collect.training={epochs: 2, batch_size: 512}", "collect.pretrain={epochs: 1, batch_size: 512}",
    "rpg.core={kind: mamba2, d_model: 32, headdim: 8, d_state: 8, num_layers: 1}",
    "rpg.denoiser={kind: mlp, width: 16, depth: 1}", f"rpg.training={TRAINING}", "rpg.micro_batch=2",
    "rpg.tokens_per_step=9", "rpg.state=checkpoint",
    "autoencoder.network={kind: mlp, latent_dim: 4, widths: [16]}", f"autoencoder.training={TRAINING}",
    "autoencoder.micro_batch=2",
    "diffusion.condition_dim=16", "diffusion.denoiser={kind: mlp, width: 16, depth: 1}",
    f"diffusion.training={TRAINING}", "diffusion.micro_batch=2", "diffusion.condition_dropout=0.3",
    *(f"{part}.selection={{num_steps: [2], temperatures: [0.5]}}" for part in ("rpg", "diffusion")),
]  # fmt: skip
STAGES = {
    "collect": ("zoo", pipeline.run_collect),
    "tokenize": ("tokens", pipeline.run_tokenize),
    "train-rpg": ("rpg", pipeline.run_train_rpg),
    "train-ae": ("autoencoder", pipeline.run_train_ae),
    "train-diffusion": ("diffusion", lambda run, recipe: pipeline.run_train_diffusion(run, recipe, allow_bad=True)),
}
"""Command -> folder and function."""
READS = {"train-rpg": ["tokens"], "train-ae": ["tokens"], "train-diffusion": ["tokens", "autoencoder"]}


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody stopped. Do not change it."""

    folder: Path
    recipe: Recipe
    made: dict[str, Artifact]
    steps: dict[str, list[Step]]
    """What each stage told of its progress."""


def make(folder: Path, recipe: Recipe, stage: str, on_step: OnStep = silent) -> Artifact:
    return STAGES[stage][1](Run(folder, resume=True, on_step=on_step), recipe)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    found = Undisturbed(tmp_path_factory.mktemp("whole"), load(None, SETTINGS), {}, {})
    for stage in STAGES:
        steps = found.steps[stage] = []
        found.made[stage] = make(found.folder, found.recipe, stage, steps.append)
    return found


def same(found: Artifact, expected: Artifact) -> None:
    """The same artifact, down to the bytes of every file that its id covers."""
    assert found.id == expected.id
    assert found.manifest.files.keys() == expected.manifest.files.keys()
    for name in expected.manifest.files:
        assert (found.path / name).read_bytes() == (expected.path / name).read_bytes(), name


class Crash(Exception):
    """What no part of the package foresees."""


def crash_after(num_steps: int) -> OnStep:
    def on_step(step: Step) -> None:
        if step.done == num_steps:
            raise Crash

    return on_step


@pytest.mark.parametrize("stop", [stop_after, crash_after])
@pytest.mark.parametrize("stage", READS)
def test_a_training_stopped_after_any_step_makes_the_same_artifact(whole: Undisturbed, tmp_path, stage, stop):
    """By a signal, which saves a checkpoint, or without warning, after which the last one has to do."""
    for name in READS[stage]:
        shutil.copytree(whole.folder / name, tmp_path / name)
    folder = STAGES[stage][0]
    for step in range(1, NUM_STEPS):
        with pytest.raises((Interrupted, Crash)):
            make(tmp_path, whole.recipe, stage, stop(step))
        kept = artifact.read_tensors(tmp_path / f"{folder}.partial" / CHECKPOINT)
        assert int(kept["step"]) == step and {"model", "average", "optimizer"} <= {n.partition(".")[0] for n in kept}
        rest: list[Step] = []
        same(make(tmp_path, whole.recipe, stage, rest.append), whole.made[stage])
        assert [s.done for s in rest if s.total == NUM_STEPS] == list(range(step + 1, NUM_STEPS + 1))
        shutil.rmtree(tmp_path / folder)


@pytest.mark.parametrize("stage", READS)
def test_a_training_stopped_after_every_step_makes_the_same_artifact(whole: Undisturbed, tmp_path, stage):
    for name in READS[stage]:
        shutil.copytree(whole.folder / name, tmp_path / name)
    for _ in range(NUM_STEPS):
        with pytest.raises(Interrupted):
            make(tmp_path, whole.recipe, stage, stop_after(1))
    same(make(tmp_path, whole.recipe, stage), whole.made[stage])


def test_a_collection_stopped_after_any_block_makes_the_same_zoo(whole: Undisturbed, tmp_path):
    """And goes on with the next block; the start that all share is not trained again."""
    steps, num_blocks = whole.steps["collect"], -(-(6 + 2 + 2) // 4)
    begin = sum(bool(step.phase) for step in steps)
    per_block, rest = divmod(len(steps) - begin, num_blocks)
    assert begin and per_block and not rest
    for block in range(num_blocks):  # Stopped in the first step after so many blocks.
        with pytest.raises(Interrupted):
            make(tmp_path, whole.recipe, "collect", stop_after(begin + block * per_block + 1))
        again: list[Step] = []
        same(make(tmp_path, whole.recipe, "collect", again.append), whole.made["collect"])
        assert not any(step.phase for step in again) and len(again) == (num_blocks - block) * per_block
        shutil.rmtree(tmp_path / "zoo")


# --- the same again ---------------------------------------------------------------------------------------------------


def test_the_same_stages_in_another_folder_make_the_same_artifacts(whole: Undisturbed, tmp_path):
    for stage in STAGES:
        same(make(tmp_path, whole.recipe, stage), whole.made[stage])


def test_more_threads_change_trainings_by_rounding_alone(whole: Undisturbed, tmp_path):
    """Tokens keep every bit; sums over weights are added in another order, which AdamW's first steps enlarge."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        shutil.copytree(whole.folder / "zoo", tmp_path / "zoo")
        same(make(tmp_path, whole.recipe, "tokenize"), whole.made["tokenize"])
        found = {stage: make(tmp_path, whole.recipe, stage) for stage in ("train-rpg", "train-ae")}
    finally:
        torch.set_num_threads(before)
    for stage, again in found.items():
        losses = [
            [json.loads(line)["loss"] for line in made.file(METRICS).read_text().splitlines()]
            for made in (again, whole.made[stage])
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert again.manifest.key == whole.made[stage].manifest.key  # Up to date, whatever the threads were.
