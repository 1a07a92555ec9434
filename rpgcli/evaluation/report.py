"""The report of `rpg evaluate`: trained, generated and trivially made networks on the same test images."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpgcli.autoencoder import Autoencoder
from rpgcli.conditions import Condition
from rpgcli.errors import ArtifactError, GateError
from rpgcli.evaluation import EvaluateConfig
from rpgcli.evaluation.audit import MEASURED_AT_ONCE, Auditor
from rpgcli.evaluation.finetuning import finetuned
from rpgcli.evaluation.groups import Group, verdict
from rpgcli.methods import baselines, resampling
from rpgcli.problem import Problem, State
from rpgcli.progress import OnStep, Step
from rpgcli.subsets import Tail
from rpgcli.tokens import TokenStore, detokenize
from rpgcli.zoo import Zoo

REPORT_SCHEMA = 1


def make_report(
    problem: Problem, config: EvaluateConfig, zoo: Zoo, store: TokenStore, generated: Zoo, on_step: OnStep,
    *, autoencoder: Autoencoder | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Groups, comparisons and verdict; `report.json`. With p-diff's autoencoder also what is trivial on its latents."""
    facts, volatile = generated.artifact.facts, generated.artifact.manifest.volatile
    if problem.has_bits and any(network.task_bits is None for network in generated.networks):
        raise ArtifactError(
            f"{generated.artifact.path} was generated without a task: nothing says what its networks should answer.",
            "Train with the condition `auto`, so that networks can be asked for a task.",
        )
    if problem.has_bits:
        report = of_tasks(problem, config, zoo, store, generated, on_step)
    else:
        report = of_one_question(problem, config, zoo, store, generated, autoencoder, on_step)
    return {"schema": REPORT_SCHEMA} | report | {
        "sampling": facts["sampling"], "seed": facts["seed"], "request": generated.artifact.section["request"],
        "num_test_images": len(problem.dataset.test.labels), "training_seconds": volatile.get("training_seconds"),
    }  # fmt: skip


# --- zoos of tasks ----------------------------------------------------------------------------------------------------


def of_tasks(
    problem: Problem, config: EvaluateConfig, zoo: Zoo, store: TokenStore, generated: Zoo, on_step: OnStep
) -> dict[str, Any]:
    """Networks that each answer a question of their own, compared task by task."""
    seconds = generated.artifact.manifest.volatile.get("seconds_per_network", [])
    trained = [trained_group(problem, zoo, split) for split in ("seen", "unseen")]
    made = [generated_group(problem, generated, s, seconds, on_step) for s in ("seen", "validation", "unseen")]
    judged = next(g for split in ("unseen", "validation", "seen") for g in made if g.split == split and g.tasks)
    trivial, settings = task_baselines(problem, config, zoo, store, judged, on_step)
    peers = trained_group(problem, zoo, judged.split, only=judged.by_task())
    sentence, beats, comparisons = verdict(judged, peers, trivial)
    groups = [g for g in [*trained, *made, *trivial] if g.accuracies or g.split in {"seen", "unseen"}]
    return {
        "verdict": sentence, "beats_baselines": beats, "groups": [group.to_json() for group in groups],
        "comparisons": [comparison.to_json() for comparison in comparisons], "baseline_settings": settings,
        "reconstruction": reconstruct_tasks(zoo, store, generated),
        "per_task": {f"{g.name} {g.split}": g.by_task() for g in groups if g.by_task()},
    }  # fmt: skip


def reconstruct_tasks(zoo: Zoo, store: TokenStore, generated: Zoo) -> dict[str, float]:
    """Share of the variance of trained networks that the generated network of the same task explains, by split.

    Standardised parameters, around the mean of the seen checkpoints: 0 is no better than the average network. Trained
    networks also vary with the order of their images, which nothing explains.
    """
    explained = {}
    for split in ("seen", "validation", "unseen"):
        last = {network.task_bits: network for network in zoo.select(split, last=True)}
        error = total = 0.0
        for network in generated.select(split):
            if network.task_bits in last:
                x = store.vector_of(zoo.state(last[network.task_bits]))  # (P,)
                error += float((store.vector_of(generated.state(network)) - x).square().sum())
                total += float(x.square().sum())
        if total:
            explained[split] = 1 - error / total
    return explained


def trained_group(problem: Problem, zoo: Zoo, split: str, *, only: Collection[str] = ()) -> Group:
    """Trained networks of a split (of some tasks): the last snapshot of each, as measured when they were collected."""
    networks = [n for n in zoo.select(split, last=problem.has_bits) if not only or n.task_bits in only]
    accuracies = [n.accuracy["test"] for n in networks if n.accuracy is not None]
    seconds = zoo.artifact.manifest.volatile.get("seconds", 0.0) / sum(n.last for n in zoo.networks)
    return Group("trained", "trained", split, accuracies, [n.task_bits for n in networks], seconds)


def generated_group(problem: Problem, generated: Zoo, split: str, seconds: Sequence[float], on_step: OnStep) -> Group:
    """Generated networks of a split, measured now, some at a time."""
    networks = generated.select(split)
    bits = [n.task_bits for n in networks]
    size = MEASURED_AT_ONCE if problem.config.target.batched else 1
    accuracies: list[float] = []
    for i in range(0, len(networks), size):
        states = [generated.state(n) for n in networks[i : i + size]]
        accuracies += problem.accuracy(states, bits[i : i + size], "test").tolist()
        on_step(Step(len(accuracies), len(networks), phase=f"measure {split}", unit="network"))
    each = sum(seconds) / len(seconds) if seconds else None
    return Group(generated.artifact.facts["method"], "generated", split, accuracies, bits, each)


def task_baselines(
    problem: Problem, config: EvaluateConfig, zoo: Zoo, store: TokenStore, judged: Group, on_step: OnStep
) -> tuple[list[Group], dict[str, Any]]:
    """Trivial generators, settings chosen on validation tasks and images, measured on the judged tasks' test images."""
    tasks = {split: zoo.tasks(split) for split in ("seen", "validation", "unseen")}
    rows: dict[str, list[Tensor]] = {task: [] for task in tasks["seen"]}
    for i, checkpoint in enumerate(store.checkpoints):
        rows[str(checkpoint["task_bits"])].append(store.vector(i))
    known = baselines.Known(tasks["seen"], torch.stack([torch.stack(row) for row in rows.values()]))  # (N, S, P)

    def networks(predict: baselines.Predict, bits: Sequence[str]) -> list[dict[str, Tensor]]:
        tokens = store.layout.grid(predict(bits))  # (n, L, D)
        return [detokenize(x, store.layout, store.statistics, store.constants(0)) for x in tokens]

    def score(predict: baselines.Predict) -> float:
        bits = tasks["validation"]
        return float(problem.accuracy(networks(predict, bits), bits, "validation").mean()) if bits else 0.0

    fitted = baselines.fit_all(known, score, config.mlp, config.seed, on_step)
    asked, split = list(judged.by_task()), judged.split
    groups = [Group("majority", "baseline", split, majority(problem, asked), asked, 0.0)]
    settings: dict[str, Any] = {}
    for baseline in fitted:
        begun = time.perf_counter()
        states = networks(baseline.predict, asked)
        seconds = (time.perf_counter() - begun) / len(asked)
        accuracies = problem.accuracy(states, asked, "test").tolist()
        groups.append(Group(baseline.name, "baseline", split, accuracies, asked, seconds))
        settings[baseline.name] = {
            "chosen": baseline.settings, "validation": baseline.validation, "seconds": round(baseline.seconds, 3),
        }  # fmt: skip
    return groups, settings


def majority(problem: Problem, tasks: Sequence[str]) -> list[float]:
    """Accuracy of always giving the answer that is more frequent among the training images."""
    often = problem.labels("train", tasks).double().mean(1).round().long()  # (n,)
    return (problem.labels("test", tasks) == often[:, None]).double().mean(1).tolist()


# --- zoos of one question ---------------------------------------------------------------------------------------------


def of_one_question(
    problem: Problem, config: EvaluateConfig, zoo: Zoo, store: TokenStore, generated: Zoo,
    autoencoder: Autoencoder | None, on_step: OnStep,
) -> dict[str, Any]:  # fmt: skip
    """Networks that all answer the same question: accuracy, novelty, and the trivial ways of getting the same."""
    auditor = Auditor(problem, store)
    count = len(generated.networks)
    rows: list[tuple[Group, dict[str, Any]]] = []

    def add(name: str, kind: str, split: str, networks: Iterable[tuple[State, Tensor]], seconds: float | None) -> Group:
        begun = time.perf_counter()
        look = auditor.look(networks)
        each = (time.perf_counter() - begun) / len(look.test) if seconds is None else seconds
        group = Group(name, kind, split, look.test, [None] * len(look.test), each)
        rows.append((group, auditor.row(look)))
        return group

    seconds = zoo.artifact.manifest.volatile.get("seconds", 0.0) / sum(n.last for n in zoo.networks)
    trained = Group("trained", "trained", "seen", auditor.trained.test, [None] * len(store), seconds)
    rows.append((trained, auditor.row(auditor.trained, is_trained=True)))
    each = generated.artifact.manifest.volatile.get("seconds_per_network", [])
    name = generated.artifact.facts["method"]
    judged = add(
        name,
        "generated",
        "all",
        (auditor.read(generated.state(network)) for network in generated.networks),
        sum(each) / max(1, len(each)),
    )
    originals = resampling.from_store(store)
    draws = dict(resampling.GENERATORS)
    if autoencoder is not None:
        draws |= resampling.latent_generators(originals, autoencoder.encode, autoencoder.decode)
    made: dict[str, Iterable[tuple[State, Tensor]]] = {}
    for baseline, draw in draws.items():
        sample = partial(resampling.network, baseline, draw, originals, config.seed)
        made[baseline] = map(auditor.drawn, map(sample, range(1 if baseline == "average" else count)))
    tail = auditor.measure if isinstance(auditor.measure, Tail) else None
    if tail is not None or problem.config.target.batched:  # Others would be trained one after another.
        tuned = finetuned(problem, zoo, config.finetune, tail=tail, seed=config.seed, count=count)
        made["finetuned"] = map(auditor.read, tuned)
    trivial = []
    for i, (baseline, networks) in enumerate(made.items()):
        trivial.append(add(baseline, "baseline", "all", networks, None))
        on_step(Step(i + 1, len(made), phase="trivial generators", unit="generator"))
    sentence, beats, comparisons = verdict(judged, trained, trivial)
    nothing = Group(name, "generated", "seen", [], [], None)
    return {
        "verdict": sentence, "beats_baselines": beats,
        "groups": [group.to_json() | figures for group, figures in [*rows, (nothing, {})]],
        "comparisons": [comparison.to_json() for comparison in comparisons], "baseline_settings": {},
        "scale": auditor.scale(), "levels": levels(generated, judged),
    }  # fmt: skip


def levels(generated: Zoo, judged: Group) -> list[dict[str, Any]]:
    """Of networks that were asked for an accuracy level: how many fall into it on test images."""
    stored = generated.artifact.facts.get("condition")
    if stored is None or stored["kind"] != "accuracy-level":
        return []
    condition = Condition.from_json(stored)
    asked: dict[float | None, list[float]] = {}
    for network, accuracy in zip(generated.networks, judged.accuracies):
        asked.setdefault(network.asked_accuracy, []).append(accuracy)
    rows = []
    for (low, high), i in zip(condition.levels, range(len(condition.levels))):
        inside = {
            wanted is not None: [condition.level(a) == i for a in reached]
            for wanted, reached in asked.items()
            if wanted is None or condition.level(wanted) == i
        }
        row: dict[str, Any] = {"low": low, "high": high}
        for key, name in ((True, "asked"), (False, "unasked")):
            hits = inside.get(key, [])
            row[name] = {"count": len(hits), "share": sum(hits) / len(hits)} if hits else None
        rows.append(row)
    return rows


# --- the gate ---------------------------------------------------------------------------------------------------------


def check_gate(report: Mapping[str, Any], min_accuracy: float, path: Path) -> None:
    """Raise a GateError if generated networks of unseen tasks (of all, without tasks) stay below `min_accuracy`."""
    judged = [g for g in report["groups"] if g["kind"] == "generated" and g["split"] in {"unseen", "all"}]
    reached = [g["accuracy"]["mean"] for g in judged if g["accuracy"]]
    if not reached:
        raise GateError("no network was generated for an unseen task, so --min-accuracy is not met.")
    if not min(reached) >= min_accuracy:
        raise GateError(
            f"generated networks reach {min(reached):.4f}, below --min-accuracy {min_accuracy}.",
            f"The report is in {path}.",
        )
