"""Generated networks as a start of training: how many epochs do they save? (p-diff Tab. 9 and 11, Fig. 7)

    generated     a generated network
    fresh         a newly initialised one
    average       the mean of the networks that the generator learned from
    trained       one of these; of a zoo of tasks that of the nearest seen task
    shared start  what the networks of a zoo of tasks started from themselves

All starts of a seed are trained side by side, on the same images in the same order; of a zoo of subsets the subset
alone. Validation images say in which epoch a target is reached, test images how good the network is then.

Letters: S starts, R seeds, T tasks (1 where all networks answer the same question), E epochs, N networks of a block.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from rpgcli import rng
from rpgcli.collection import START, Feed, Learner, OptimiserConfig, train
from rpgcli.config import Config
from rpgcli.evaluation.finetuning import at_once, to_train
from rpgcli.evaluation.groups import standard_error
from rpgcli.problem import Problem, Split, State
from rpgcli.progress import OnStep, Step
from rpgcli.subsets import Tail
from rpgcli.tasks import complement
from rpgcli.tokens import TokenStore
from rpgcli.zoo import Network, Zoo

FRESH = "fresh"
"""The start that speed-ups are measured against."""
SPLITS: tuple[Split, ...] = ("validation", "test")
Start = Callable[[str | None, int], State]
"""The network that training number s (of R) starts from, for a task."""


class InitialisationConfig(Config):
    """How the training from different starts is compared."""

    num_seeds: PositiveInt = 5
    """Trainings from each start: other networks, other orders of the images."""
    num_tasks: PositiveInt = 6
    """Of a zoo of tasks: so many are trained for, unseen ones where networks were generated for any."""
    targets: tuple[PositiveFloat, ...] = (0.9, 0.95, 0.99, 1.0)
    """Accuracies to be reached, as fractions of the trained networks' mean."""
    training: OptimiserConfig | None = None
    """How networks are trained from every start; left out: as those of the zoo were."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> "InitialisationConfig":
        if self.training is not None and not self.training.epochs:
            raise ValueError("training.epochs is 0: nothing would be trained")
        return self

    def training_of(self, zoo: Zoo) -> OptimiserConfig:
        """The training, resolved; the default one where nobody knows how the networks were trained."""
        if self.training is not None:
            return self.training
        made = zoo.artifact.section
        own = OptimiserConfig.model_validate_json(json.dumps({} if "from" in made else made["collect"]["training"]))
        return own if own.epochs else OptimiserConfig()


def compare_starts(
    problem: Problem, config: InitialisationConfig, zoo: Zoo, store: TokenStore, generated: Zoo,
    *, seed: int, on_step: OnStep,
) -> dict[str, Any]:  # fmt: skip
    """Train from every start with several seeds; `initialisation` of the report.

    Args:
        problem: Data set, task, target.
        config: Seeds, tasks, targets, training.
        zoo: The trained networks.
        store: Those that the generator learned from, in its coordinates.
        generated: Networks that are not finite are left out.
        seed: Of all draws.
        on_step: Called after every optimizer step; `done` counts networks.
    """
    split, tasks = tasks_of(generated, config.num_tasks) if problem.has_bits else ("seen", [None])
    starts = starts_of(problem, zoo, store, generated, tasks, seed)
    training, tail = config.training_of(zoo), None
    if store.layout.shared:
        tail = Tail(problem, zoo.state(zoo.networks[0]), [spec.name for spec in store.layout.generated])
    asked = [(s, start, task) for s in range(config.num_seeds) for start in starts.values() for task in tasks]
    rows: list[Tensor] = []
    seconds, size = 0.0, at_once(problem, tail, training, len(starts) * len(tasks))
    for first in range(0, len(asked), size):
        block = asked[first : first + size]

        def report(step: Step, first: int = first, num: int = len(block)) -> None:
            done = first + num * step.done // step.total
            on_step(Step(done, len(asked), phase="train from starts", unit="network"))

        states = [start(task, s) for s, start, task in block]
        names = [f"initialisation {s}" for s, _, _ in block]
        learner, feed = to_train(problem, states, names, tail=tail, seed=seed)
        curve, spent = learn(learner, feed, tail or problem, states, [task for *_, task in block], training, report)
        rows += curve
        seconds += spent
    curves = torch.stack(rows).unflatten(0, (config.num_seeds, len(starts), len(tasks))).transpose(0, 1)

    trained = trained_accuracy(zoo, split, tasks, last=problem.has_bits)
    targets = [{"fraction": f, **{s: f * trained[s] for s in SPLITS}} for f in config.targets]
    reached = {name: reach(of_start, targets) for name, of_start in zip(starts, curves)}
    once, each = costs(zoo, generated)
    return {
        "training": training.model_dump(mode="json"), "num_seeds": config.num_seeds,
        "split": split if problem.has_bits else "all", "tasks": tasks if problem.has_bits else [],
        "trained": trained, "targets": targets,
        "seconds_per_epoch": seconds / (training.epochs * len(asked)),
        "starts": [
            {
                "name": name, "count": of_start[..., 0, 0].numel(),
                **{s: mean_and_error(of_start[..., i]) for i, s in enumerate(SPLITS)},
                "reached": [
                    {**mine, "speed_up": speed_up(fresh["epochs"], mine["epochs"])}
                    for mine, fresh in zip(reached[name], reached[FRESH])
                ],
                "seconds_once": once.get(name, once["zoo"]), "seconds_per_start": each.get(name, 0.0),
            }
            for name, of_start in zip(starts, curves)  # (R, T, E + 1, 2)
        ],
    }  # fmt: skip


# --- the starts -------------------------------------------------------------------------------------------------------


def tasks_of(generated: Zoo, num_tasks: int) -> tuple[str, list[str | None]]:
    """The first unseen tasks (else validation, else seen ones) that networks were generated for, and their split.

    Of a task and its complement only one: they are the same problem.
    """
    split = next(s for s in ("unseen", "validation", "seen") if generated.tasks(s))
    pairs: dict[str, str | None] = {}
    for bits in generated.tasks(split):
        pairs.setdefault(min(bits, complement(bits)), bits)
    return split, list(pairs.values())[:num_tasks]


def starts_of(
    problem: Problem, zoo: Zoo, store: TokenStore, generated: Zoo, tasks: Sequence[str | None], seed: int
) -> dict[str, Start]:
    """What can be started from; generated networks only where some are finite."""
    seen = zoo.select("seen", last=problem.has_bits)
    mean = sum((store.vector(i) for i in range(1, len(store))), store.vector(0)) / len(store)  # (P,)
    average = store.rebuilt(mean)
    made: dict[str | None, list[Network]] = {
        task: shuffled(
            [n for n in generated.networks if n.task_bits == task and is_finite(generated.state(n))], seed, "generated"
        )
        for task in tasks
    }
    near: dict[str | None, list[Network]] = {
        task: shuffled(seen if task is None else nearest(task, seen), seed, "trained") for task in tasks
    }

    def take(where: Zoo, networks: Mapping[str | None, Sequence[Network]]) -> Start:
        return lambda task, s: where.state(networks[task][s % len(networks[task])])

    starts: dict[str, Start] = {"generated": take(generated, made)} if all(made.values()) else {}
    starts[FRESH] = lambda task, s: problem.build("initialisation", s, seed=seed).cpu().state_dict()
    starts["average"] = lambda task, s: average
    starts["trained"] = take(zoo, near)
    if START in zoo.artifact.manifest.files:
        shared = zoo.artifact.tensors(START)
        starts["shared start"] = lambda task, s: shared
    return starts


def nearest(task: str, networks: Sequence[Network]) -> list[Network]:
    """Those of the task with the fewest different bits; the first of several."""

    def differing(network: Network) -> int:
        assert network.task_bits is not None, "a zoo of tasks"
        return sum(a != b for a, b in zip(task, network.task_bits))

    found = min(networks, key=differing).task_bits
    return [network for network in networks if network.task_bits == found]


def shuffled(networks: Sequence[Network], seed: int, name: str) -> list[Network]:
    """In random order."""
    order = torch.randperm(len(networks), generator=rng.stream(seed, "initialisation", name))
    return [networks[i] for i in order.tolist()]


def is_finite(state: State) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(value.isfinite().all()) for value in state.values())


def costs(zoo: Zoo, generated: Zoo) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Seconds spent once before any such start can be had, and for each start; None where nobody knows."""
    of_zoo = None if "from" in zoo.artifact.section else zoo.artifact.manifest.volatile.get("seconds")
    volatile = generated.artifact.manifest.volatile
    training, each = volatile.get("training_seconds"), volatile.get("seconds_per_network")
    of_generator = None if of_zoo is None or training is None else of_zoo + training
    return (
        {"zoo": of_zoo, "generated": of_generator, FRESH: 0.0},
        {"generated": sum(each) / len(each) if each else None},
    )


# --- training ---------------------------------------------------------------------------------------------------------


def learn(
    networks: Learner, feed: Feed, measured_by: Problem | Tail, starts: Sequence[State],
    tasks: Sequence[str | None], config: OptimiserConfig, on_step: OnStep,
) -> tuple[Tensor, float]:  # fmt: skip
    """Train the networks of a block and measure them after each epoch.

    Args:
        networks: N of them, as they start.
        feed: Which images when.
        measured_by: Accuracies.
        starts: The same networks as state dicts.
        tasks: What each is asked.
        config: The optimiser.
        on_step: Called after every optimizer step.

    Returns:
        Accuracies on validation and test images before training and after each epoch, (N, E + 1, 2) float64, and the
        seconds that training took.
    """
    problem = feed.problem
    labels = problem.labels("train", tasks)  # (N, n)
    steps_per_epoch = config.num_steps(labels.shape[1]) // config.epochs
    curve: list[Tensor] = []
    spent, begun = 0.0, 0.0

    def measure(states: Sequence[State]) -> None:
        curve.append(torch.stack([measured_by.accuracy(states, tasks, split) for split in SPLITS], 1))  # (N, 2)

    def look(step: Step) -> None:
        nonlocal spent, begun
        if step.done % steps_per_epoch == 0:
            states = networks.snapshot()  # Waits for the device.
            spent += time.perf_counter() - begun
            measure(states)
            begun = time.perf_counter()
        on_step(step)

    measure(starts)
    begun = time.perf_counter()
    train(networks, labels, feed, config, save_at=(), on_step=look)
    return torch.stack(curve, 1), spent


# --- what is to be reached, and when ----------------------------------------------------------------------------------


def trained_accuracy(zoo: Zoo, split: str, tasks: Sequence[str | None], *, last: bool) -> dict[str, float]:
    """Mean accuracy of the trained networks of these tasks (of all seen ones, where there are none), by images."""
    networks = [n for n in zoo.select(split, last=last) if n.task_bits in tasks] or zoo.select("seen", last=last)
    measured = [network.accuracy for network in networks if network.accuracy is not None]
    return {s: sum(accuracy[s] for accuracy in measured) / len(measured) for s in SPLITS}


def mean_and_error(curves: Tensor) -> dict[str, list[float]]:
    """Mean accuracy after each epoch and its standard error, of one start: (R, T, E + 1).

    Tasks are the observations; where there is one question, the seeds are.
    """
    units = curves.mean(0) if curves.shape[1] > 1 else curves[:, 0]
    return {"mean": units.mean(0).tolist(), "se": [standard_error(values) for values in units.T.tolist()]}


def reach(curves: Tensor, targets: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """When one start reaches each target on validation images.

    Args:
        curves: (R, T, E + 1, 2).
        targets: With `fraction` and the accuracy on validation images.

    Returns:
        For each target the epochs of every seed (0: before training; None: never), their median, and the mean test
        accuracy of the seeds that reached it, then.
    """
    validation, test = curves.mean(1).unbind(-1)  # (R, E + 1)
    found = []
    for target in targets:
        epochs = [first_epoch(curve, target["validation"]) for curve in validation.tolist()]
        then = [float(curve[epoch]) for curve, epoch in zip(test, epochs) if epoch is not None]
        found.append({
            "fraction": target["fraction"], "epochs": median(epochs), "each": epochs,
            "test": sum(then) / len(then) if then else None,
        })  # fmt: skip
    return found


def first_epoch(curve: Sequence[float], target: float) -> int | None:
    """The first epoch after which the accuracy is at least `target`; 0 is before training, None is never."""
    return next((epoch for epoch, accuracy in enumerate(curve) if accuracy >= target), None)


def median(epochs: Sequence[int | None]) -> int | None:
    """The upper median; None, later than any epoch, where too few reach the target."""
    never = max((epoch for epoch in epochs if epoch is not None), default=0) + 1
    found = statistics.median_high(never if epoch is None else epoch for epoch in epochs)
    return None if found == never else found


def speed_up(fresh: int | None, epochs: int | None) -> float | None:
    """How many times fewer epochs than a fresh start; None where one never gets there, or needs no training at all."""
    return fresh / epochs if fresh and epochs else None
