"""A run of both methods that is as small as a run can be, and what each of its stages should have made."""

import hashlib
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rpgcli import artifact
from rpgcli.errors import ArtifactError
from tests.conftest import SMALL_RPG, settings
from tests.torture.worker import Worker

ZOO = settings([
    "target={kind: mlp3, hidden: [8]}", "collect.num_seen=4", "collect.num_validation=2", "collect.num_unseen=2",
    "collect.block=4", "collect.snapshots=2", "collect.training.epochs=2", "collect.pretrain.epochs=1",
    "collect.training.batch_size=512", "collect.pretrain.batch_size=512",
    *SMALL_RPG, "rpg.training.num_steps=8", "rpg.training.checkpoint_every=3",
    "autoencoder.network={kind: mlp, latent_dim: 4, widths: [16]}",
    "autoencoder.training={num_steps: 8, batch_size: 4, checkpoint_every: 3}",
    "diffusion.condition_dim=16", "diffusion.denoiser={kind: mlp, width: 16, depth: 1}",
    "diffusion.training={num_steps: 8, batch_size: 4, checkpoint_every: 3}",
    "diffusion.selection.num_steps=[2]", "diffusion.selection.temperatures=[0.5]",
])  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A command of the run."""

    name: str
    folder: str
    options: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    """Options with which it makes something else in the same folder; none: it never does."""

    def command(self, run: Path, *more: object, changed: bool = False) -> list[object]:
        """What is typed after `rpg`."""
        return [self.name, "--run", run, "--threads", 1, *self.options, *(self.other if changed else ()), *more]


STAGES = (
    Stage("collect", "zoo", tuple(ZOO), ("--set", "collect.training.learning_rate=0.01")),
    Stage("tokenize", "tokens", (), ("--set", "tokens.standardise=layer")),
    Stage("train-rpg", "rpg", (), ("--set", "rpg.training.num_steps=7")),
    Stage("train-ae", "autoencoder", (), ("--set", "autoencoder.training.num_steps=7")),
    Stage("train-diffusion", "diffusion", ("--allow-bad",), ("--set", "diffusion.training.num_steps=7")),
    Stage("generate", "generated/tasks-s0-n1", ("--method", "rpg")),
    Stage("evaluate", "report", ("--method", "rpg"), ("--set", "evaluate.seed=1")),
)
BY_NAME = {stage.name: stage for stage in STAGES}


@dataclass(frozen=True)
class Made:
    """What an undisturbed stage made."""

    id: str
    path: Path
    moments: int
    """Moments of its process, see `worker.Clock`."""
    seconds: float


class Reference:
    """The run, made by processes that nobody disturbed. Do not change it: take a copy with `before`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, {}
        for stage in STAGES:
            self.made[stage.name] = self._make(stage, folder / "run")
        self.others: dict[str, Made] = {}

    def _make(self, stage: Stage, run: Path, *more: str, changed: bool = False) -> Made:
        worker = Worker(*stage.command(run, *more, changed=changed), log=self.folder / "log", begin=False)
        begun = time.monotonic()
        worker.plan.begin.set()
        assert worker.wait() == 0, worker.err
        path = run / stage.folder
        found, problems = artifact.verify(path)
        assert not problems
        return Made(found.id, path, worker.moments, time.monotonic() - begun)

    @cached_property
    def ids(self) -> dict[str, str]:
        """Name of each stage and the id of its artifact."""
        return {name: made.id for name, made in self.made.items()}

    def other(self, stage: Stage) -> Made:
        """What a stage with its other options makes in place of what is there."""
        if stage.name not in self.others:
            run = self.copy(stage, self.folder / f"other-{stage.name}")
            self.others[stage.name] = self._make(stage, run, "--force", changed=True)
        return self.others[stage.name]

    def before(self, stage: Stage, run: Path) -> Path:
        """A copy of all that was there before `stage`."""
        run.mkdir(parents=True)
        for earlier in STAGES[: STAGES.index(stage)]:
            shutil.copytree(self.made[earlier.name].path, run / earlier.folder)
        if stage is not STAGES[0]:
            shutil.copy(self.folder / "run" / "recipe.json", run)
        return run

    def copy(self, stage: Stage, run: Path) -> Path:
        """A copy of all that was there after `stage`."""
        shutil.copytree(self.made[stage.name].path, self.before(stage, run) / stage.folder)
        shutil.copy(self.folder / "run" / "recipe.json", run)
        return run


def accepted(path: Path) -> str | None:
    """The id of the artifact at `path`, if `rpg verify` finds nothing wrong with it."""
    try:
        found, problems = artifact.verify(path)
    except (ArtifactError, FileNotFoundError):  # The latter: it is just being put in its place.
        return None
    return None if problems else found.id


def hashed(path: Path) -> dict[str, Any]:
    """Every file of an artifact that its id covers, with its bytes."""
    found = artifact.read_manifest(path / artifact.MANIFEST)
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in found.files}


def remains(run: Path) -> list[str]:
    """What an unfinished stage leaves behind."""
    ends = (".partial", ".tmp", ".old")
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name.endswith(ends))
