"""Collect a zoo: train target networks and keep snapshots of their parameters.

    tasks        every network fine-tuned from one shared start, one for each task (and run)
    seeds        independent trainings from independent starts
    trajectory   one training (or a few), then dense snapshots along a last epoch (RPG); of a subset of the
                 parameters (p-diff): one base network, then runs in which only the subset moves

Small targets are trained many at once: their parameters are stacked, `vmap` runs all forward passes as one, and a
plain backward pass and optimizer step follow (every operation is per network, so the result is that of training them
one by one, to rounding). Blocks are fixed by the recipe: a block gives the same networks whoever computes it, and an
interrupted collection goes on at the next one.

Letters: N networks in a block, n training images, B images in a batch, S snapshots.
"""

import filecmp
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from torch import Tensor, nn

from rpgcli import imports, rng
from rpgcli.artifact import Artifact, Draft, read_tensors, write_tensors
from rpgcli.config import Config
from rpgcli.errors import ArtifactError, OutputError, RpgError, UsageError
from rpgcli.problem import Problem, State, unstacked
from rpgcli.progress import OnStep, Step, in_phase
from rpgcli.sharding import Block, Blocks, Shard, Share, merge
from rpgcli.subsets import StackedTail, Tail, select_parameters
from rpgcli.tasks import split_tasks
from rpgcli.tokens import FLOOR
from rpgcli.zoo import SHARED, Network

logger = logging.getLogger(__name__)

START = "start.safetensors"
"""The shared start of a zoo of tasks, kept beside its networks; the base of a zoo of subsets, while it is collected."""
START_BLOCK = "start"
"""What shards call it."""
LOOKED_AT = 2**24
"""Values of all networks from elsewhere together that tell whether they lie along one training."""
NEIGHBOURS = 0.5
"""Distance to the nearest network, in units of that between any two, below which they do. Medians that we measured:
0.95 of 150 independent starts (digits, `mlp3`), 0.09 and 0.03 along single trainings."""


class OptimiserConfig(Config):
    """How a target network is trained."""

    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    """torch's; `sgd` with momentum 0.9."""
    epochs: NonNegativeInt = 20
    """Passes over the training images; 0 leaves a network as it is, for a `trajectory` from published weights."""
    batch_size: PositiveInt = 128
    """Images a step."""
    learning_rate: PositiveFloat = 2e-3
    """Highest learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """`cosine` falls to `last_fraction` of the learning rate."""
    last_fraction: float = Field(0.05, ge=0, le=1)
    """What is left of the learning rate at the end of `cosine`, so that the last snapshots differ."""
    weight_decay: NonNegativeFloat = 0.0
    """The optimiser's."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the cross entropy. It bounds the logits, so that the parameters are a smoother function of the task."""

    def make(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """The optimiser; stacked parameters are trained as if each network had its own."""
        if self.optimiser == "sgd":
            return torch.optim.SGD(parameters, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        kind = torch.optim.AdamW if self.optimiser == "adamw" else torch.optim.Adam
        return kind(parameters, self.learning_rate, weight_decay=self.weight_decay)

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of step 0, 1, ... num_steps - 1."""
        if self.schedule == "constant":
            return self.learning_rate
        cosine = (1 + math.cos(math.pi * (step + 1) / num_steps)) / 2
        return self.learning_rate * (self.last_fraction + (1 - self.last_fraction) * cosine)

    def num_steps(self, num_images: int) -> int:
        """Steps in all."""
        return self.epochs * math.ceil(num_images / self.batch_size)


class BlockConfig(Config):
    """What all kinds of zoo share."""

    block: PositiveInt = 64
    """Networks trained together; part of the recipe, because it fixes how a collection is cut and resumed."""
    pretrained: str | None = None
    """Weights to start from: a file, or `timm` for the published ones (from the hub only with --download)."""


class TasksConfig(BlockConfig):
    """One network for each binary task, all from one shared start."""

    kind: Literal["tasks"] = "tasks"
    num_seen: PositiveInt = 256
    """Tasks that a generator learns from; counted with their complements, so even."""
    num_validation: NonNegativeInt = 102
    """Tasks on which its settings are chosen."""
    num_unseen: NonNegativeInt = 102
    """Tasks that are looked at once, at the end."""
    runs: PositiveInt = 1
    """Independent trainings of each seen task (other orders of the images)."""
    snapshots: PositiveInt = 3
    """Snapshots of each seen task, one after each of the last epochs."""
    pretrain: OptimiserConfig = OptimiserConfig(epochs=40, learning_rate=3e-3)
    """Of the shared trunk, on the multi-class problem."""
    training: OptimiserConfig = OptimiserConfig()
    """Of every task, from the shared trunk and one random head."""

    @model_validator(mode="after")
    def _snapshots_fit(self) -> "TasksConfig":
        if self.snapshots > self.training.epochs:
            raise ValueError(f"snapshots ({self.snapshots}) exceed training.epochs ({self.training.epochs})")
        return self


class SeedsConfig(BlockConfig):
    """Independent trainings from independent starts."""

    kind: Literal["seeds"] = "seeds"
    num_networks: PositiveInt = 100
    """Independent trainings."""
    snapshots: PositiveInt = 1
    """Snapshots of each, one after each of the last epochs."""
    training: OptimiserConfig = OptimiserConfig()
    """Of every network."""

    @model_validator(mode="after")
    def _snapshots_fit(self) -> "SeedsConfig":
        if self.snapshots > self.training.epochs:
            raise ValueError(f"snapshots ({self.snapshots}) exceed training.epochs ({self.training.epochs})")
        return self


class TrajectoryConfig(BlockConfig):
    """Trainings followed by dense snapshots along a last stretch."""

    kind: Literal["trajectory"] = "trajectory"
    parameters: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = "all"
    """What the snapshots differ in: `all`, or one or a list of names, globs and roles (`norm:last2`, `linear:last`,
    `conv:first`, `norm:3-5`, `shortcut`). The rest is then frozen in evaluation mode and stored once."""
    runs: PositiveInt = 1
    """Separate trainings; of a subset, separate runs of `save` in other orders, all from one base network."""
    num_checkpoints: PositiveInt = 50
    """Snapshots of each run, evenly spaced over `save`."""
    training: OptimiserConfig = OptimiserConfig(epochs=10, learning_rate=1e-3, last_fraction=0.0)
    """Before anything is saved; not done to the base of a subset where `pretrained` names a whole network."""
    save: OptimiserConfig = OptimiserConfig(epochs=1, batch_size=16, learning_rate=1e-4, schedule="constant")
    """While snapshots are saved."""

    @field_validator("parameters")
    @classmethod
    def _all_is_alone(cls, parameters: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(parameters, str) and len(parameters) > 1 and "all" in parameters:
            raise ValueError("'all' means every parameter: leave out the others")
        return parameters

    @property
    def patterns(self) -> tuple[str, ...]:
        """What means the subset; empty for the whole network."""
        patterns = (self.parameters,) if isinstance(self.parameters, str) else self.parameters
        return () if "all" in patterns else patterns


CollectConfig = Annotated[TasksConfig | SeedsConfig | TrajectoryConfig, Field(discriminator="kind")]


# --- training ---------------------------------------------------------------------------------------------------------


class Feed:
    """Which images a network sees when, and how they are augmented: one row for all networks, or one for each.

    A row draws from the streams that carry its name, so a network sees the same whatever else is in its block.

    Args:
        problem: The images.
        seed: Of all draws.
        names: One for each of N networks; a single row (G = 1) if all are the same, else G = N.
    """

    def __init__(self, problem: Problem, seed: int, names: Sequence[rng.Name]) -> None:
        self.problem, self.seed = problem, seed
        self.rows = names[:1] if len(set(names)) == 1 else names
        self.num_images = len(problem.dataset.train.labels)

    def order(self, epoch: int) -> Tensor:
        """The order of the images in an epoch, (G, n)."""
        streams = [rng.stream(self.seed, "order", row, epoch) for row in self.rows]
        return torch.stack([torch.randperm(self.num_images, generator=stream) for stream in streams])

    def images(self, index: Tensor, step: int) -> Tensor:
        """The images of step 0, 1, ... at `index` (G, B), augmented: (G, B, C, H, W)."""
        streams = [rng.stream(self.seed, "augment", row, step) for row in self.rows]
        return torch.stack([self.problem.images("train", i, stream) for i, stream in zip(index, streams)])


class Numbers(Feed):
    """The numbers of the images instead of the images, for a network that keeps what it needs of each."""

    def images(self, index: Tensor, step: int) -> Tensor:
        """`index`, (G, B)."""
        return index


@dataclass(frozen=True)
class Snapshot:
    """The state dicts of N networks after `step` optimizer steps."""

    step: int
    states: list[dict[str, Tensor]]


class Stacked:
    """N small networks as one: every parameter has a leading axis of N."""

    def __init__(self, problem: Problem, starts: Sequence[State]) -> None:
        self.problem, self.num = problem, len(starts)
        self.values = {
            name: torch.stack([start[name] for start in starts]).to(problem.device).requires_grad_()
            for name in starts[0]
        }  # (N, ...)

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return list(self.values.values())

    def outputs(self, x: Tensor) -> Tensor:
        """(G, B, C, H, W) to (N, B, O)."""
        return self.problem.outputs(self.values, x[0] if len(x) == 1 else x)

    def snapshot(self) -> list[dict[str, Tensor]]:
        """N state dicts, copied."""
        return unstacked(self.values)


class Single:
    """One network of any kind, with its buffers."""

    def __init__(self, problem: Problem, start: State) -> None:
        self.model = problem.build("reference")
        self.model.load_state_dict(dict(start))
        self.model.train()

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return list(self.model.parameters())

    def outputs(self, x: Tensor) -> Tensor:
        """(1, B, C, H, W) to (1, B, O)."""
        return self.model(x[0])[None]  # type: ignore[no-any-return]

    def snapshot(self) -> list[dict[str, Tensor]]:
        """Its state dict, copied."""
        return [{name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}]


Learner = Stacked | Single | Tail | StackedTail
"""Networks that are trained side by side."""


def train(
    networks: Learner, labels: Tensor, feed: Feed, config: OptimiserConfig, *,
    save_at: Sequence[int], on_step: OnStep,
) -> list[Snapshot]:  # fmt: skip
    """Train networks side by side.

    Args:
        networks: N of them, changed in place.
        labels: What each should answer on the training images, (N, n).
        feed: Which images when.
        config: The optimiser.
        save_at: Numbers of steps after which a snapshot is taken.
        on_step: Called after every step.

    Returns:
        The snapshots, on the CPU.
    """
    optimiser = config.make(networks.parameters())
    total, done = config.num_steps(labels.shape[1]), 0
    snapshots: list[Snapshot] = []
    for epoch in range(config.epochs):
        for index in feed.order(epoch).split(config.batch_size, dim=1):  # (G, B)
            x = feed.images(index, done)  # (G, B, C, H, W)
            y = labels.gather(1, index.to(labels.device).expand(len(labels), -1))  # (N, B)
            # Batch norm cannot train on a single last image.
            if index.shape[1] > 1 or not isinstance(networks, Single):
                logits = networks.outputs(x).flatten(0, 1)  # (N * B, O)
                loss = F.cross_entropy(
                    logits, y.flatten(), reduction="none", label_smoothing=config.label_smoothing
                )  # (N * B,)
                for group in optimiser.param_groups:
                    group["lr"] = config.rate(done, total)
                optimiser.zero_grad(set_to_none=True)
                (loss.sum() / index.shape[1]).backward()  # A mean over images, a sum over networks.
                optimiser.step()
            done += 1
            if done in save_at:
                snapshots.append(Snapshot(done, networks.snapshot()))
            on_step(Step(done, total))
    return snapshots


# --- zoos -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One training to be done."""

    split: str
    run: int
    task_bits: str | None = None


def make_plan(problem: Problem, config: CollectConfig, seed: int) -> list[Plan]:
    """All trainings of a zoo, in the order of its files.

    Raises:
        UsageError: If the task and the kind of zoo do not fit, or there are more snapshots than steps.
    """
    if (config.kind == "tasks") != problem.has_bits:
        raise UsageError(
            f"collect.kind {config.kind!r} does not fit task.kind {problem.config.task.kind!r}.",
            "A zoo of tasks needs task.kind: binary-subset; seeds and trajectory need task.kind: multi-class.",
        )
    if config.kind == "tasks":
        parts = split_tasks(
            problem.dataset.num_classes, config.num_seen, config.num_validation, config.num_unseen, seed
        )
        seen, *others = [
            [(split, bits) for bits in part] for split, part in zip(("seen", "validation", "unseen"), parts)
        ]
        plan = [Plan(split, run, bits) for run in range(config.runs) for split, bits in seen]
        return plan + [Plan(split, 0, bits) for part in others for split, bits in part]
    if config.kind == "trajectory":
        steps = config.save.num_steps(len(problem.dataset.train.labels))
        if config.num_checkpoints > steps:
            raise UsageError(
                f"collect.num_checkpoints is {config.num_checkpoints}, but collect.save takes only {steps} steps.",
                f"Ask for at most {steps}, raise collect.save.epochs, or lower collect.save.batch_size.",
            )
    return [Plan("seen", run) for run in range(config.num_networks if config.kind == "seeds" else config.runs)]


def blocks(problem: Problem, config: CollectConfig, plan: Sequence[Plan]) -> list[Sequence[Plan]]:
    """The plan cut into what is trained together."""
    is_subset = config.kind == "trajectory" and bool(config.patterns)
    size = config.block if problem.config.target.batched and not is_subset else 1
    return [plan[i : i + size] for i in range(0, len(plan), size)]


def subset(model: nn.Module, config: CollectConfig) -> list[str]:
    """Names of the parameters that alone differ between the networks of a zoo; empty for whole networks.

    Raises:
        UsageError: If a pattern means nothing, or nothing that is trained.
    """
    patterns = config.patterns if config.kind == "trajectory" else ()
    return select_parameters(model, patterns) if patterns else []


def collect(
    problem: Problem, config: CollectConfig, seed: int, draft: Draft, *, download: bool, on_step: OnStep
) -> list[Network]:
    """Train every network of a zoo and write it into `draft`, block by block; finished blocks are not trained again.

    Args:
        problem: Data set, task, target.
        config: The kind of zoo.
        seed: Of tasks, starts and orders.
        draft: Where networks go.
        download: Whether published weights may be fetched.
        on_step: Called after every optimizer step; `done` counts networks.

    Returns:
        All networks with their facts.
    """
    plan, names, made = make_plan(problem, config, seed), subset(problem.skeleton, config), Blocks.of(draft)
    if (found := made.find(START_BLOCK)) is not None:
        made = made.after(START_BLOCK, found)
        _take_start(draft, found)
    state = first_state(problem, config, seed, draft, download=download, on_step=on_step)
    if state is not None and names:
        draft.save_tensors(SHARED, {name: value for name, value in state.items() if name not in names})
    parts = work(problem, config, seed, plan, state)
    return [Network(**facts) for block in merge(draft, parts, on_step, made) for facts in block]


def collect_shard(
    problem: Problem, config: CollectConfig, seed: int, made: Blocks, shard: Shard, *, download: bool, on_step: OnStep
) -> Share:
    """Train the networks of a shard; what all of them start from is a block too, which one shard makes for all."""
    plan, state = make_plan(problem, config, seed), None
    if config.kind == "tasks" or config.pretrained is not None or subset(problem.skeleton, config):

        def write(draft: Draft, on_step: OnStep) -> None:
            first_state(problem, config, seed, draft, download=download, on_step=on_step)
            draft.add(START)

        found = made.make(START_BLOCK, write, on_step)
        state, made = found.tensors(START), made.after(START_BLOCK, found)
    return made.share(shard, work(problem, config, seed, plan, state), on_step)


def work(problem: Problem, config: CollectConfig, seed: int, plan: Sequence[Plan], state: State | None) -> list[Block]:
    """The trainings of a zoo, block by block, from the state dict that all start from, if there is one."""
    names = subset(problem.skeleton, config)
    start = Tail(problem, state, names) if state is not None and names else state
    parts, first_file = [], 0
    for b, trainings in enumerate(blocks(problem, config, plan)):
        write = partial(_write_block, problem, config, seed, trainings, start, first_file)
        parts.append(Block(f"{b:05d}", len(trainings), write))
        first_file += sum(num_saved(config, training) for training in trainings)
    return parts


def num_saved(config: CollectConfig, training: Plan) -> int:
    """Snapshots of a training that are kept: only the last of a task that nobody learns from is ever looked at."""
    if training.split != "seen":
        return 1
    return config.num_checkpoints if config.kind == "trajectory" else config.snapshots


def first_state(
    problem: Problem, config: CollectConfig, seed: int, draft: Draft, *, download: bool, on_step: OnStep
) -> State | None:
    """What all networks start from, kept in `draft`; None where each has its own start."""
    make = base_network if subset(problem.skeleton, config) else shared_start
    return make(problem, config, seed, draft, download=download, on_step=on_step)


def _take_start(draft: Draft, found: Artifact) -> None:
    if not (draft.path / START).exists():
        draft.take(found.file(START))
    elif not filecmp.cmp(draft.path / START, found.file(START), shallow=False):
        raise OutputError(
            f"{draft.path / START} is not what the blocks in {found.path.parent} start from.",
            "Another machine, or other --threads, trained it. Pass --force without --resume to start afresh.",
        )


def shared_start(
    problem: Problem, config: CollectConfig, seed: int, draft: Draft, *, download: bool, on_step: OnStep
) -> dict[str, Tensor] | None:
    """What every network starts from; None where each has its own start.

    For `tasks`: the trunk trained on the multi-class problem (or given), and one random head. It is kept beside the
    networks, so that an interrupted collection goes on from the same.
    """
    if (draft.path / START).exists():
        return read_tensors(draft.add(START))
    fresh = problem.build("start", seed=seed).state_dict()
    wider = problem.build("trunk", seed=seed, num_outputs=max(problem.dataset.num_classes, problem.num_outputs + 1))
    head = {name for name, value in wider.state_dict().items() if value.shape != fresh[name].shape}
    if config.pretrained is not None:
        kept = _given(problem, config.pretrained, seed, fresh, download=download)
        if config.kind == "tasks":
            kept = {name: value for name, value in kept.items() if name not in head}
        start = {**fresh, **kept}
        draft.save_tensors(START, start)
        return start
    if config.kind != "tasks":
        return None
    whole = Problem.multi_class(problem)
    trunk = whole.build("trunk", seed=seed).state_dict()
    feed = Feed(whole, seed, ["pretrain"])
    learner = Stacked(whole, [trunk]) if problem.config.target.batched else Single(whole, trunk)
    labels = whole.labels("train", [None])
    train(learner, labels, feed, config.pretrain, save_at=(), on_step=in_phase(on_step, "shared start"))
    start = {name: fresh[name] if name in head else value for name, value in learner.snapshot()[0].items()}
    draft.save_tensors(START, start)
    draft.resumable = True
    return start


def base_network(
    problem: Problem, config: CollectConfig, seed: int, draft: Draft, *, download: bool, on_step: OnStep
) -> State:
    """The network whose subset is trained on: given whole by `pretrained`, or trained by `training`.

    It is kept in the draft until the zoo is complete, so that an interrupted collection need not train it again.
    """
    if (draft.path / START).exists():
        return read_tensors(draft.path / START)
    base = problem.build("seed", 0, seed=seed).state_dict()
    given: State = {}
    if config.pretrained is not None:
        given = _given(problem, config.pretrained, seed, base, download=download)
        base = {**base, **given}
    if config.pretrained == "timm" or given.keys() != base.keys():  # Some layer knows nothing of this data set.
        network = Single(problem, base)
        labels, feed = problem.labels("train", [None]), Feed(problem, seed, [0])
        train(network, labels, feed, config.training, save_at=(), on_step=in_phase(on_step, "base network"))
        base = network.snapshot()[0]
    base = {name: value.cpu() for name, value in base.items()}
    write_tensors(draft.path / START, base)
    draft.resumable = True
    return base


def _write_block(
    problem: Problem, config: CollectConfig, seed: int, block: Sequence[Plan], start: State | Tail | None,
    first_file: int, draft: Draft, on_step: OnStep,
) -> list[dict[str, Any]]:  # fmt: skip
    snapshots = _train_block(problem, config, seed, block, start, on_step)
    measured_by = start if isinstance(start, Tail) else problem
    return [n.to_json() for n in _save_block(measured_by, draft, config, block, snapshots, first_file)]


def _train_block(
    problem: Problem,
    config: CollectConfig,
    seed: int,
    block: Sequence[Plan],
    start: State | Tail | None,
    on_step: OnStep,
) -> list[Snapshot]:
    if isinstance(start, Tail):
        assert config.kind == "trajectory", "only its configuration has a subset"
        return _train_subset(problem, config, seed, block[0].run, start, on_step)
    starts = [start or problem.build("seed", plan.run, seed=seed).state_dict() for plan in block]
    networks = Stacked(problem, starts) if problem.config.target.batched else Single(problem, starts[0])
    labels = problem.labels("train", [plan.task_bits for plan in block])  # (N, n)
    feed = Feed(problem, seed, [plan.run for plan in block])
    total = config.training.num_steps(labels.shape[1])
    if config.kind != "trajectory":
        epoch = total // config.training.epochs
        save_at = [total - epoch * (config.snapshots - 1 - s) for s in range(config.snapshots)]
        return train(networks, labels, feed, config.training, save_at=save_at, on_step=on_step)
    extra = config.save.num_steps(labels.shape[1])

    def report(step: Step, before: int = 0) -> None:
        on_step(Step(before + step.done, total + extra))

    train(networks, labels, feed, config.training, save_at=(), on_step=report)
    dense = Feed(problem, seed, [f"save {plan.run}" for plan in block])
    return train(
        networks, labels, dense, config.save, save_at=_evenly(config, extra), on_step=lambda step: report(step, total)
    )


def _train_subset(
    problem: Problem, config: TrajectoryConfig, seed: int, run: int, tail: Tail, on_step: OnStep
) -> list[Snapshot]:
    tail.reset()
    kind = Numbers if problem.config.dataset.augment == "none" else Feed
    labels = problem.labels("train", [None])
    save_at = _evenly(config, config.save.num_steps(labels.shape[1]))
    return train(tail, labels, kind(problem, seed, [f"save {run}"]), config.save, save_at=save_at, on_step=on_step)


def _evenly(config: TrajectoryConfig, num_steps: int) -> list[int]:
    return [round((k + 1) * num_steps / config.num_checkpoints) for k in range(config.num_checkpoints)]


def _save_block(
    measured_by: Problem | Tail, draft: Draft, config: CollectConfig, block: Sequence[Plan],
    snapshots: list[Snapshot], first_file: int,
) -> list[Network]:  # fmt: skip
    found: list[Network] = []
    bits = [plan.task_bits for plan in block]
    measured = [
        [measured_by.accuracy(snapshot.states, bits, split).tolist() for split in ("validation", "test")]
        for snapshot in snapshots
    ]
    for i, plan in enumerate(block):
        for s in range(len(snapshots) - num_saved(config, plan), len(snapshots)):
            snapshot, last = snapshots[s], s == len(snapshots) - 1
            if not all(bool(value.isfinite().all()) for value in snapshot.states[i].values()):
                raise RpgError(
                    f"network {first_file + len(found)} of the zoo is no longer finite after {snapshot.step} steps.",
                    "Its training diverged: lower collect.training.learning_rate (or collect.save's).",
                )
            validation, test = measured[s]
            network = Network(
                file=f"{first_file + len(found):05d}.safetensors", split=plan.split, task_bits=plan.task_bits,
                run=plan.run, step=snapshot.step, last=last, accuracy={"validation": validation[i], "test": test[i]},
            )  # fmt: skip
            draft.save_tensors(network.file, snapshot.states[i])
            found.append(network)
    return found


def bring_in(problem: Problem, folder: Path, draft: Draft, *, on_step: OnStep) -> list[Network]:
    """Make a zoo of networks that already exist: every `.safetensors` or `.pth` file of a folder and its sub-folders.

    The name of a sub-folder becomes the label of the networks in it. What is the same in all is kept once. Networks
    that lie along one training count as one run, others each as its own.

    Raises:
        UsageError: If the problem has tasks: nobody knows those of the networks.
        LayoutError: If one does not fit the target.
    """
    if problem.has_bits:
        raise UsageError(
            "networks that already exist come without task bits, but task.kind is binary-subset.",
            "Set task.kind to multi-class.",
        )
    paths = imports.networks_in(folder)
    base = imports.read_fitting(paths[0], problem.reference)
    frozen = frozen_tensors(problem, base, paths, on_step)
    measured_by: Problem | Tail = problem
    if frozen:
        draft.save_tensors(SHARED, {name: base[name] for name in base if name in frozen})
        measured_by = Tail(problem, base, [name for name in base if name not in frozen])
    networks: list[Network] = []
    samples: list[Tensor] = []
    for i, path in enumerate(paths):
        state = imports.read_fitting(path, problem.reference)
        state = {name: value for name, value in state.items() if name not in frozen}
        measured = {s: float(measured_by.accuracy([state], [None], s)) for s in ("validation", "test")}
        label = path.parent.name if path.parent != folder else None
        network = Network(file=f"{i:05d}.safetensors", split="seen", run=i, accuracy=measured, label=label)
        draft.save_tensors(network.file, state)
        networks.append(network)
        samples.append(sample_of(state, LOOKED_AT // len(paths)))
        on_step(Step(i + 1, len(paths), unit="network"))
    if not are_neighbours(torch.stack(samples)):
        return networks
    logger.warning(
        "the networks of %s lie as close together as snapshots of one training: they count as one, and how far apart "
        "separate trainings lie is not known", folder,
    )  # fmt: skip
    return [replace(network, run=0) for network in networks]


def sample_of(state: State, num: int) -> Tensor:
    """At most `num` (and at least one) of a network's values, evenly spaced, float32."""
    values = torch.cat([value.flatten().float() for value in state.values()])
    return values[:: -(-len(values) // max(1, num))].clone()


def are_neighbours(x: Tensor) -> bool:
    """Whether networks, (K, p), lie along one training: most have a neighbour far nearer than networks lie apart."""
    x = (x - x.mean(0)).double()
    deviation = x.square().mean(0).sqrt()
    x = x / (deviation + FLOOR * deviation.mean()).clamp(min=torch.finfo(x.dtype).tiny)
    distances = torch.cdist(x, x)  # (K, K)
    apart = distances[torch.ones_like(distances, dtype=torch.bool).triu(1)]
    if not len(apart):
        return False
    nearest = distances.fill_diagonal_(torch.inf).amin(1)
    return bool(nearest.median() < NEIGHBOURS * apart.median())


def frozen_tensors(problem: Problem, base: State, paths: Sequence[Path], on_step: OnStep) -> set[str]:
    """Names of the tensors that are the same in all files, where what differs are parameters; else none.

    Args:
        problem: The target.
        base: The network of the first file.
        paths: All files.
        on_step: Called after every file.
    """
    same = set(base)
    for i, path in enumerate(paths[1:]):
        state = imports.read_fitting(path, problem.reference)
        same -= {name for name in same if not torch.equal(state[name], base[name])}
        if not same:
            return same
        on_step(Step(i + 2, len(paths), phase="compare", unit="network"))
    differing = base.keys() - same
    return same if differing and differing <= dict(problem.skeleton.named_parameters()).keys() else set()


def published(problem: Problem, seed: int, download: bool) -> State:
    """timm's published weights of the target, adapted by timm to its channels; a head of other classes is random.

    Raises:
        UsageError: If the target is not timm's, or the weights would have to be fetched without --download.
    """
    target = problem.config.target
    if target.kind != "timm":
        raise UsageError(
            f"collect.pretrained: timm needs a target of timm, not {target.kind!r}.", "Name a weights file."
        )
    if not download:
        raise UsageError(
            f"the published weights of timm/{target.name} would be fetched from the hub.",
            "Pass --download to allow it, or give collect.pretrained the path of a weights file.",
        )
    with rng.initialising(seed, "published"):
        return target.published(problem.dataset.channels, problem.dataset.size, problem.num_outputs)


def _given(problem: Problem, pretrained: str, seed: int, fresh: State, *, download: bool) -> dict[str, Tensor]:
    """The tensors of `collect.pretrained` that fit the target, whose state dict is `fresh`."""
    given = published(problem, seed, download) if pretrained == "timm" else imports.read_network(Path(pretrained))
    return _fitting(given, fresh, pretrained)


def _fitting(given: State, fresh: State, source: str) -> dict[str, Tensor]:
    """The given tensors that fit the target; at least half of its values must."""
    fitting = {n: v for n, v in given.items() if n in fresh and v.shape == fresh[n].shape and v.dtype == fresh[n].dtype}
    if sum(v.numel() for v in fitting.values()) * 2 < sum(v.numel() for v in fresh.values()):
        raise ArtifactError(f"{source} holds the weights of another architecture.", "Less than half of the values fit.")
    return fitting
