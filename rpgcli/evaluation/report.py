"""The report of `rpg evaluate`: trained, generated and trivially made networks on the same test images."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rpgcli.autoencoder import Autoencoder
from rpgcli.conditions import Condition
from rpgcli.errors import ArtifactError, GateError
from rpgcli.evaluation import EvaluateConfig
from rpgcli.evaluation.audit import Auditor, Candidate, Look, OneQuestion, Row
from rpgcli.evaluation.findings import find, summary
from rpgcli.evaluation.finetuning import finetuned
from rpgcli.evaluation.groups import NUM_NAMED, Group, verdict
from rpgcli.evaluation.novelty import Novelty, as_novel
from rpgcli.methods import baselines, resampling
from rpgcli.methods.pdiff import what_is_odd
from rpgcli.problem import Problem
from rpgcli.progress import OnStep, Step, silent
from rpgcli.subsets import Tail
from rpgcli.tokens import TokenStore
from rpgcli.zoo import Zoo

logger = logging.getLogger(__name__)

REPORT_SCHEMA = 1


Measure = Callable[[OnStep], dict[str, Any]]
"""Makes the networks of a trivial generator and measures them, by itself; returns what `Trivial` keeps, for JSON."""
Compute = Callable[[Mapping[str, Measure]], Sequence[dict[str, Any]]]
"""Calls all, by name, or knows some of the results already."""


@dataclass(frozen=True)
class Trivial:
    """A trivial generator as it was measured."""

    group: Group
    figures: dict[str, Any]
    novelty: Novelty | None = None
    """Of networks that answer the same question as all."""
    settings: dict[str, Any] | None = None
    """That were chosen on validation tasks."""

    def to_json(self) -> dict[str, Any]:
        """What `of_json` takes."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> "Trivial":
        """The inverse of `to_json`."""
        novelty = None if value["novelty"] is None else Novelty(**value["novelty"])
        return cls(Group(**value["group"]), value["figures"], novelty, value["settings"])


def make_report(
    problem: Problem, config: EvaluateConfig, zoo: Zoo, store: TokenStore, generated: Zoo, on_step: OnStep,
    *, autoencoder: Autoencoder | None = None, compute: Compute | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Groups, comparisons and verdict; `report.json`. With p-diff's autoencoder also what is trivial on its latents."""
    compute = compute or (lambda measures: [measure(on_step) for measure in measures.values()])
    check_asked(problem, generated)
    facts, volatile = generated.artifact.facts, generated.artifact.manifest.volatile
    if problem.has_bits:
        report = of_tasks(problem, config, zoo, store, generated, compute, on_step)
    else:
        report = of_one_question(problem, config, zoo, store, generated, autoencoder, compute, on_step)
    report["findings"] = [*report["findings"], *warnings(problem, report["groups"], facts.get("latents"))]
    return {"schema": REPORT_SCHEMA} | report | {
        "sampling": facts["sampling"], "seed": facts["seed"], "request": generated.artifact.section["request"],
        "num_test_images": len(problem.dataset.test.labels), "training_seconds": volatile.get("training_seconds"),
    }  # fmt: skip


def trivial_measures(
    problem: Problem, config: EvaluateConfig, zoo: Zoo, store: TokenStore, generated: Zoo, on_step: OnStep,
    *, autoencoder: Autoencoder | None = None,
) -> dict[str, Measure]:  # fmt: skip
    """What `make_report` lets `compute` call."""
    check_asked(problem, generated)
    if not problem.has_bits:
        return question_measures(OneQuestion(problem, store, zoo), config, autoencoder, len(generated.networks))
    auditor, split = Auditor(problem, store, zoo), judged_split(generated)
    judged = generated_group(generated, split, generated_row(auditor, generated, split, on_step))
    return task_measures(auditor, config, zoo, judged)


def check_asked(problem: Problem, generated: Zoo) -> None:
    """Raise an ArtifactError if a network of a zoo of tasks was asked for none."""
    if problem.has_bits and any(network.task_bits is None for network in generated.networks):
        raise ArtifactError(
            f"{generated.artifact.path} was generated without a task: nothing says what its networks should answer.",
            "Train with the condition `auto`, so that networks can be asked for a task.",
        )


def warnings(
    problem: Problem, groups: Sequence[Mapping[str, Any]], latents: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """What keeps figures from saying more: networks that failed, classes without test images, an odd diffusion."""
    found: list[dict[str, Any]] = []
    failed = [file for group in groups if group["kind"] == "generated" for file in group["failed"]]
    if failed:
        named = f"{', '.join(failed[:NUM_NAMED])}{', ...' if len(failed) > NUM_NAMED else ''}"
        sentence = f"{len(failed)} generated networks failed and count nowhere else (NaN or infinity): {named}."
        found.append({"kind": "failed", "count": len(failed), "files": failed, "sentence": sentence})
    present = set(problem.dataset.test.labels.tolist())
    missing = [name for i, name in enumerate(problem.dataset.classes) if i not in present]
    if missing:
        sentence = f"no test image shows {', '.join(missing)}: nothing says how networks do on it."
        found.append({"kind": "missing-classes", "classes": missing, "sentence": sentence})
    if latents is not None and (sentence := what_is_odd(latents)):
        found.append({"kind": "latents", "sentence": sentence})
    for one in found:
        logger.warning(one["sentence"])
    return found


# --- zoos of tasks ----------------------------------------------------------------------------------------------------


def of_tasks(
    problem: Problem, config: EvaluateConfig, zoo: Zoo, store: TokenStore, generated: Zoo, compute: Compute,
    on_step: OnStep,
) -> dict[str, Any]:  # fmt: skip
    """Networks that each answer a question of their own, compared task by task."""
    auditor = Auditor(problem, store, zoo)
    trained = [trained_group(problem, zoo, split) for split in ("seen", "unseen")]
    rows = {split: generated_row(auditor, generated, split, on_step) for split in ("seen", "validation", "unseen")}
    made = {split: generated_group(generated, split, row) for split, row in rows.items()}
    split = judged_split(generated)
    judged, found = made[split], find(auditor, rows[split])
    trivial = [Trivial.of_json(value) for value in compute(task_measures(auditor, config, zoo, judged))]
    peers = trained_group(problem, zoo, split, only=judged.by_task())
    what, instead = summary(found)
    rivals = [one.group for one in trivial]
    sentence, beats, comparisons = verdict(judged, peers, rivals, what=what, instead=instead)
    groups: list[tuple[Group, dict[str, Any]]] = [(group, {}) for group in trained]
    groups += [(made[split], row.figures) for split, row in rows.items()]
    groups += [(one.group, one.figures) for one in trivial]
    groups = [(g, figures) for g, figures in groups if g.accuracies or g.failed or g.split in {"seen", "unseen"}]
    failed = {file for row in rows.values() for file in row.look.failed}
    return {
        "verdict": sentence, "beats_baselines": beats, "findings": [one.to_json() for one in found],
        "groups": [group.to_json() | figures for group, figures in groups],
        "comparisons": [comparison.to_json() for comparison in comparisons],
        "baseline_settings": {one.group.name: one.settings for one in trivial if one.settings is not None},
        "scale": auditor.scale(), "reconstruction": reconstruct_tasks(zoo, store, generated, failed),
        "per_task": {f"{g.name} {g.split}": g.by_task() for g, _ in groups if g.by_task()},
    }  # fmt: skip


def judged_split(generated: Zoo) -> str:
    """The tasks that say most: those that nobody learned from."""
    return next(split for split in ("unseen", "validation", "seen") if generated.select(split))


def reconstruct_tasks(zoo: Zoo, store: TokenStore, generated: Zoo, failed: Collection[str]) -> dict[str, float]:
    """Share of the variance of trained networks that the generated network of the same task explains, by split.

    Standardised parameters, around the mean of the seen checkpoints: 0 is no better than the average network. Trained
    networks also vary with the order of their images, which nothing explains. Failed networks are left out.
    """
    explained = {}
    for split in ("seen", "validation", "unseen"):
        last = {network.task_bits: network for network in zoo.select(split, last=True)}
        error = total = 0.0
        for network in generated.select(split):
            if network.task_bits in last and network.file not in failed:
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
    return Group("trained", "trained", split, accuracies, [n.task_bits for n in networks], seconds_of_training(zoo))


def seconds_of_training(zoo: Zoo) -> float | None:
    """Of one training; None of networks from elsewhere."""
    if "from" in zoo.artifact.section:
        return None
    return float(zoo.artifact.manifest.volatile.get("seconds", 0.0)) / sum(n.last for n in zoo.networks)


def generated_row(auditor: Auditor, generated: Zoo, split: str | None, on_step: OnStep) -> Row:
    """Generated networks of a split (of all: None), measured now."""
    networks = generated.select(split)

    def read() -> Iterator[Candidate]:
        for i, (network, state) in enumerate(zip(networks, generated.states(networks))):
            yield auditor.candidate(generated, network, state)
            on_step(Step(i + 1, len(networks), phase=f"measure {split or 'generated'}", unit="network"))

    return auditor.row(auditor.look(read()))


def generated_group(generated: Zoo, split: str, row: Row) -> Group:
    """Their accuracies."""
    seconds = generated.artifact.manifest.volatile.get("seconds_per_network", [])
    each, name = sum(seconds) / len(seconds) if seconds else None, generated.artifact.facts["method"]
    return Group(name, "generated", split, row.look.test, row.look.tasks, each, row.look.failed)


def task_measures(auditor: Auditor, config: EvaluateConfig, zoo: Zoo, judged: Group) -> dict[str, Measure]:
    """Trivial generators, settings chosen on validation tasks and images, measured on the judged tasks' test images."""
    problem, store = auditor.problem, auditor.store
    asked, split = list(judged.by_task()), judged.split
    if not asked:  # All that was generated failed.
        return {}
    score, known = baselines.validation_score(problem, store, zoo.tasks("validation")), baselines.known_of(store)

    def constant(on_step: OnStep) -> dict[str, Any]:
        return Trivial(Group("majority", "baseline", split, majority(problem, asked), asked, 0.0), {}).to_json()

    def measure(name: str, on_step: OnStep) -> dict[str, Any]:
        candidates = baselines.GENERATORS[name](known, config.mlp, config.seed, on_step)
        baseline = baselines.best(name, candidates, score)
        begun = time.perf_counter()
        networks = [Candidate(store.rebuilt(x), task, task) for x, task in zip(baseline.predict(asked), asked)]
        seconds = (time.perf_counter() - begun) / len(asked)
        row = auditor.row(auditor.look(networks))
        group = Group(name, "baseline", split, row.look.test, row.look.tasks, seconds, row.look.failed)
        settings = {
            "chosen": baseline.settings, "validation": baseline.validation, "seconds": round(baseline.seconds, 3),
        }  # fmt: skip
        on_step(Step(1, 1))
        return Trivial(group, row.figures, settings=settings).to_json()

    names = [name for name, given in baselines.GENERATORS.items() if given(known, config.mlp, config.seed, silent)]
    return {"majority": constant, **{name: partial(measure, name) for name in names}}


def majority(problem: Problem, tasks: Sequence[str]) -> list[float]:
    """Accuracy of always giving the answer that is more frequent among the training images."""
    often = problem.labels("train", tasks).double().mean(1).round().long()  # (n,)
    return (problem.labels("test", tasks) == often[:, None]).double().mean(1).tolist()


# --- zoos of one question ---------------------------------------------------------------------------------------------


def of_one_question(
    problem: Problem, config: EvaluateConfig, zoo: Zoo, store: TokenStore, generated: Zoo,
    autoencoder: Autoencoder | None, compute: Compute, on_step: OnStep,
) -> dict[str, Any]:  # fmt: skip
    """Networks that all answer the same question: accuracy, novelty, and the trivial ways of getting the same."""
    auditor = OneQuestion(problem, store, zoo)
    known = auditor.trained
    trained = Group("trained", "trained", "seen", known.look.test, known.look.tasks, seconds_of_training(zoo))
    row = generated_row(auditor, generated, None, on_step)
    judged, found = generated_group(generated, "all", row), find(auditor, row)
    measures = question_measures(auditor, config, autoencoder, len(generated.networks)) if row.look.seen else {}
    trivial = [Trivial.of_json(value) for value in compute(measures)]
    comparable = {
        other.group.name: as_novel(other.novelty, row.novelty)
        if judged.mean >= auditor.alpha
        else (True, f"the generated networks are not good: mean accuracy below {auditor.alpha:.4f}")
        for other in trivial
        if other.novelty is not None and row.novelty is not None
    }
    what, instead = summary(found)
    rivals = [one.group for one in trivial]
    sentence, beats, comparisons = verdict(judged, trained, rivals, comparable=comparable, what=what, instead=instead)
    nothing = Group(judged.name, "generated", "seen", [], [], None)
    groups = [(trained, known.figures), (judged, row.figures), *((t.group, t.figures) for t in trivial), (nothing, {})]
    return {
        "verdict": sentence, "beats_baselines": beats, "findings": [one.to_json() for one in found],
        "groups": [group.to_json() | figures for group, figures in groups],
        "comparisons": [comparison.to_json() for comparison in comparisons], "baseline_settings": {},
        "scale": auditor.scale(), "levels": levels(generated, row.look),
    }  # fmt: skip


def question_measures(
    auditor: OneQuestion, config: EvaluateConfig, autoencoder: Autoencoder | None, count: int
) -> dict[str, Measure]:
    """Every trivial generator, asked for as many networks."""
    made = drawn(auditor, config, autoencoder, count)

    def measure(name: str, on_step: OnStep) -> dict[str, Any]:
        begun = time.perf_counter()
        look = auditor.look(made[name])
        each = (time.perf_counter() - begun) / (len(look.seen) + len(look.failed))
        group, row = Group(name, "baseline", "all", look.test, look.tasks, each, look.failed), auditor.row(look)
        on_step(Step(1, 1))
        return Trivial(group, row.figures, row.novelty).to_json()

    return {name: partial(measure, name) for name in made}


def drawn(
    auditor: OneQuestion, config: EvaluateConfig, autoencoder: Autoencoder | None, count: int
) -> dict[str, Iterable[Candidate]]:
    """Networks of every trivial generator, made as they are looked at."""
    problem, store = auditor.problem, auditor.store
    originals = resampling.from_store(store)
    draws = dict(resampling.GENERATORS)
    if autoencoder is not None:
        draws |= resampling.latent_generators(originals, autoencoder.encode, autoencoder.decode)

    def networks(name: str, draw: resampling.Draw) -> Iterator[Candidate]:
        for i in range(1 if name == "average" else count):
            yield auditor.drawn(resampling.network(name, draw, originals, config.seed, i), f"{name} {i}")

    made: dict[str, Iterable[Candidate]] = {name: networks(name, draw) for name, draw in draws.items()}
    tail = auditor.measure if isinstance(auditor.measure, Tail) else None
    if tail is not None or problem.config.target.batched:  # Others would be trained one after another.
        tuned = finetuned(problem, store, config.finetune, tail=tail, seed=config.seed, count=count)
        made["finetuned"] = (Candidate(state, file=f"finetuned {i}") for i, state in enumerate(tuned))
    return made


def levels(generated: Zoo, look: Look) -> list[dict[str, Any]]:
    """Of networks that were asked for an accuracy level: how many fall into it on test images."""
    stored = generated.artifact.facts.get("condition")
    if stored is None or stored["kind"] != "accuracy-level":
        return []
    condition = Condition.from_json(stored)
    wanted_of = {network.file: network.asked_accuracy for network in generated.networks}
    asked: dict[float | None, list[float]] = {}
    for one in look.seen:
        asked.setdefault(wanted_of[one.candidate.file], []).append(one.test)
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
        raise GateError("no network that works was generated for an unseen task, so --min-accuracy is not met.")
    if not min(reached) >= min_accuracy:
        raise GateError(
            f"generated networks reach {min(reached):.4f}, below --min-accuracy {min_accuracy}.",
            f"The report is in {path}.",
        )
