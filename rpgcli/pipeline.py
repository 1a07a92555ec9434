"""The stages as typed functions: artifacts in, artifacts out. Nothing here prints.

    collect -> zoo/      tokenize -> tokens/      train_rpg -> rpg/      generate -> generated/<request>/
    evaluate -> report/

Each stage reads the ones before it in the run folder, and is told apart by its key: finished with the same key, it
does nothing.
"""

import hashlib
import json
import logging
import platform
import resource
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpgcli import __version__, artifact, kernels, rng
from rpgcli.artifact import Artifact, Draft
from rpgcli.collection import bring_in, collect
from rpgcli.errors import ArtifactError, GateError, LayoutError, UsageError
from rpgcli.evaluation.groups import Group, verdict
from rpgcli.generation import GenerateConfig, Generator, Sampling, expand
from rpgcli.imports import networks_in
from rpgcli.layout import Layout, make_layout
from rpgcli.methods import baselines
from rpgcli.methods.rpg import RPG, RpgConfig, SelectionConfig, build, make_loss
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.progress import OnStep, Step, silent
from rpgcli.recipe import Recipe, section
from rpgcli.tokens import Statistics, TokenStore, detokenize, write_store
from rpgcli.training import fit
from rpgcli.zoo import Network, Zoo

logger = logging.getLogger(__name__)

REPORT_SCHEMA = 1
MEASURED_AT_ONCE = 64
"""Small networks measured together."""
RECIPE = "recipe.json"
"""The resolved recipe of a run."""


@dataclass(frozen=True)
class Run:
    """Where a pipeline lives and what it runs on."""

    folder: Path
    zoo: Path | None = None
    """A zoo elsewhere."""
    out: Path | None = None
    """Where this stage writes, if not into the run folder."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    data_root: Path | None = None
    download: bool = False
    force: bool = False
    resume: bool = False
    on_step: OnStep = silent

    def at(self, name: str) -> Path:
        """Folder of a stage that is read."""
        return self.zoo if name == "zoo" and self.zoo is not None else self.folder / name

    @contextmanager
    def draft(
        self, name: str, stage: str, made_from: Mapping[str, Any], inputs: Mapping[str, Artifact]
    ) -> Iterator[Draft]:
        """The draft of a stage's artifact."""
        ids = {name: found.id for name, found in inputs.items()}
        target = self.out or self.folder / name
        with artifact.draft(
            target, stage, section=dict(made_from), inputs=ids, force=self.force, resume=self.resume
        ) as draft:
            yield draft

    def remember(self, recipe: Recipe, *, anew: bool = False) -> None:
        """Store the resolved recipe in the run, so that later stages need none."""
        path = self.folder / RECIPE
        if anew or not path.exists():
            artifact.make_folder(self.folder)
            artifact.write_bytes(path, artifact.canonical(recipe.to_json()) + b"\n")

    def open(self, config: ProblemConfig) -> Problem:
        """Load the data set of a problem."""
        return config.open(data_root=self.data_root, download=self.download, device=self.device)

    def volatile(self, begun: float, **more: Any) -> dict[str, Any]:
        """What may vary from run to run and is outside every hash."""
        return {
            "seconds": round(time.perf_counter() - begun, 3), "host": platform.node(), "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "versions": {"rpg": __version__, "torch": torch.__version__, "python": platform.python_version()}, **more,
        }  # fmt: skip


# --- collect ----------------------------------------------------------------------------------------------------------


def run_collect(run: Run, recipe: Recipe, *, source: Path | None = None) -> Artifact:
    """Train the zoo, or bring in the networks of `source`."""
    begun = time.perf_counter()
    made_from = section(recipe, "seed", "dataset", "task", "target", "collect")
    if source is not None:
        made_from["from"] = digest_of(source)
    elif recipe.collect.pretrained not in (None, "timm"):
        made_from["collect"]["pretrained"] = hash_of(Path(str(recipe.collect.pretrained)))
    with run.draft("zoo", "collect", made_from, {}) as draft:
        if draft.finished is not None:
            run.remember(recipe, anew=run.out is None)
            return draft.finished
        problem = run.open(recipe.problem())
        run.remember(recipe, anew=run.out is None and not draft.target.exists())
        if source is None:
            networks = collect(problem, recipe.collect, recipe.seed, draft, download=run.download, on_step=run.on_step)
        else:
            networks = bring_in(problem, source, draft, on_step=run.on_step)
        dataset = problem.dataset
        facts = {
            "networks": [network.to_json() for network in networks], "classes": list(dataset.classes),
            "channels": dataset.channels, "size": list(dataset.size), "num_outputs": problem.num_outputs,
            "num_parameters": sum(v.numel() for v in problem.reference.values()),
            "num_images": {s: len(getattr(dataset, s).labels) for s in ("train", "validation", "test")},
        }  # fmt: skip
        found = draft.commit(facts, run.volatile(begun, **({} if source is None else {"from": str(source)})))
        run.remember(recipe, anew=run.out is None)
        return found


def digest_of(folder: Path) -> str:
    """One hash of all network files of a folder, so that a change of any is noticed."""
    return artifact.digest({path.name: hash_of(path) for path in networks_in(folder)})


def hash_of(path: Path) -> str:
    """sha256 of a file of weights.

    Raises:
        ArtifactError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}.", "Name a file that holds one network."
        ) from None


def problem_of(zoo: Zoo) -> ProblemConfig:
    """Data set, task and target that a zoo was collected for."""
    made_from = zoo.artifact.section
    return ProblemConfig.model_validate_json(json.dumps({k: made_from[k] for k in ("dataset", "task", "target")}))


# --- tokenize ---------------------------------------------------------------------------------------------------------


def run_tokenize(run: Run, recipe: Recipe) -> Artifact:
    """Turn the seen checkpoints of the zoo into tokens and statistics."""
    begun = time.perf_counter()
    zoo = Zoo.read(run.at("zoo"))
    with run.draft("tokens", "tokenize", section(recipe, "tokens"), {"zoo": zoo.artifact}) as draft:
        run.remember(recipe)
        if draft.finished is not None:
            return draft.finished
        seen = zoo.select("seen")
        if not seen:
            raise ArtifactError(f"{zoo.artifact.path} holds no seen network to learn from.", "Collect some.")
        config = recipe.tokens
        first = zoo.state(seen[0])
        order = target_of(zoo).state_dict()
        if order.keys() == first.keys():
            first = {name: first[name] for name in order}  # safetensors keeps no order, the target does.
        layout = make_layout(
            first, token_dim=config.token_dim, granularity=config.granularity, log_variance=config.standardise != "none"
        )
        statistics = write_store(draft, states_of(zoo, seen, layout), len(seen), layout, config, run.on_step)
        facts = {
            "num_checkpoints": len(seen), "num_tokens": layout.num_tokens, "token_dim": layout.token_dim,
            "num_parameters": layout.num_parameters, "num_fixed": int((layout.mask() & ~statistics.varies).sum()),
            "checkpoints": [{"task_bits": n.task_bits, "run": n.run, "step": n.step, "file": n.file} for n in seen],
            "tasks": {split: tasks_of(zoo, split) for split in ("seen", "validation", "unseen")},
            "problem": {k: zoo.artifact.section[k] for k in ("dataset", "task", "target")},
            "network": {k: zoo.artifact.facts[k] for k in ("classes", "channels", "size", "num_outputs")},
        }  # fmt: skip
        return draft.commit(facts, run.volatile(begun))


def states_of(zoo: Zoo, networks: Sequence[Network], layout: Layout) -> Iterator[dict[str, Tensor]]:
    """State dicts of a zoo, each checked.

    Raises:
        LayoutError: If one does not fit the layout or is not finite; names its file.
    """
    for network in networks:
        state = zoo.state(network)
        try:
            layout.check(state)
        except LayoutError as error:
            raise LayoutError(f"{zoo.artifact.path / network.file}: {error.what}", *error.advice) from None
        yield state


def tasks_of(zoo: Zoo, split: str) -> list[str]:
    """The different tasks of a split, in the order of its files."""
    return list(dict.fromkeys(n.task_bits for n in zoo.select(split) if n.task_bits is not None))


def target_of(zoo: Zoo) -> nn.Module:
    """The target network of a zoo, without memory."""
    facts = zoo.artifact.facts
    with torch.device("meta"):
        return problem_of(zoo).target.build(facts["channels"], tuple(facts["size"]), facts["num_outputs"])


# --- train-rpg --------------------------------------------------------------------------------------------------------


def run_train_rpg(run: Run, recipe: Recipe) -> Artifact:
    """Train the recurrent diffusion model, then choose on validation tasks how it is sampled."""
    begun = time.perf_counter()
    tokens = artifact.read(run.at("tokens"), "tokenize")
    config = recipe.rpg
    with run.draft("rpg", "train-rpg", section(recipe, "rpg"), {"tokens": tokens}) as draft:
        run.remember(recipe)
        if draft.finished is not None:
            return draft.finished
        store = TokenStore(tokens)
        model = build(config, store, num_bits(config, store)).to(run.device)
        backend = kernels.resolve_backend(getattr(config.core, "backend", "torch"), run.device)
        logger.info("the core %s runs on %s with the %s backend", config.core.kind, run.device, backend)
        loss = make_loss(model, config, store, run.device)
        model = fit(model, loss, config.training, draft, dtype=run.dtype, on_step=run.on_step)
        trained = time.perf_counter()
        draft.save_tensors("model.safetensors", model.state_dict())
        draft.save_tensors("statistics.safetensors", store.statistics.tensors())
        draft.save_tensors("constants.safetensors", store.constants(0))
        draft.save_json("layout.json", store.layout.to_json())
        num_states = model.state.num_embeddings if model.state is not None else 1
        generator = Generator(model, store.layout, store.statistics, store.constants(0), num_states)
        facts = {
            **{k: v for k, v in tokens.facts.items() if k not in {"checkpoints", "num_checkpoints", "num_fixed"}},
            "num_states": num_states, "num_bits": model.condition.num_bits if model.condition is not None else 0,
            "num_weights": sum(p.numel() for p in model.parameters()),
            "selection": select(run, generator, tokens, config.selection) if model.condition is not None else None,
        }  # fmt: skip
        return draft.commit(facts, run.volatile(begun, training_seconds=round(trained - begun, 3), backend=backend))


def num_bits(config: RpgConfig, store: TokenStore) -> int:
    """Length of the task bits that enter the model, 0 for none.

    Raises:
        UsageError: If task bits are asked for and the zoo has none.
    """
    bits = store.checkpoints[0]["task_bits"]
    if config.condition == "task-bits" and bits is None:
        raise UsageError(
            "rpg.condition is task-bits, but the networks of this zoo have no task.", "Set it to none or auto."
        )
    return len(str(bits)) if bits is not None and config.condition != "none" else 0


def select(run: Run, generator: Generator, tokens: Artifact, config: SelectionConfig) -> dict[str, Any] | None:
    """Try samplers, steps and temperatures on validation tasks and images; keep the most accurate.

    Returns:
        The choice and all that was tried; None without validation tasks.
    """
    tasks = tokens.facts["tasks"]["validation"][: config.num_tasks]
    if not tasks:
        return None
    problem = run.open(ProblemConfig.model_validate_json(json.dumps(tokens.facts["problem"])))
    tried: list[dict[str, Any]] = []
    grid = [(s, n, t) for s in config.samplers for n in config.num_steps for t in config.temperatures]
    for i, (sampler, num_steps, temperature) in enumerate(grid):
        sampling = Sampling(sampler=sampler, num_steps=num_steps, temperature=temperature)
        states = [generator.network(x) for x in generator.batch(tasks, sampling, seed=0)]
        accuracy = float(problem.accuracy(states, tasks, "validation").mean())
        tried.append({"sampling": sampling.model_dump(mode="json"), "accuracy": accuracy})
        run.on_step(Step(i + 1, len(grid), {"validation": accuracy}, "choose sampling", "setting"))
    return {"chosen": max(tried, key=lambda entry: entry["accuracy"]), "tried": tried, "num_tasks": len(tasks)}


# --- generate ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What networks are asked for."""

    name: str
    tasks: Sequence[tuple[str, str | None]]
    """(split, task bits) of each task; the split is `all` where the zoo has no tasks."""
    count: int
    """Networks for each task."""


def default_request(trained: Artifact, config: GenerateConfig) -> Request:
    """All validation and unseen tasks and a sample of the seen; one entry without tasks for an unconditional model."""
    if not trained.facts["num_bits"]:
        return Request("all", [("all", None)], config.num_networks(conditional=False))
    tasks = trained.facts["tasks"]
    chosen = [("seen", bits) for bits in tasks["seen"][: config.num_seen]]
    chosen += [(split, bits) for split in ("validation", "unseen") for bits in tasks[split]]
    return Request("tasks", chosen, config.num_networks(conditional=True))


def request_of(trained: Artifact, config: GenerateConfig, task_bits: Sequence[str], name: str) -> Request:
    """A request for given tasks; one that is not in the zoo is unseen."""
    sides = {bits: split for split, side in trained.facts["tasks"].items() for bits in side}
    tasks = [(sides.get(bits, "unseen"), bits) for bits in task_bits]
    return Request(name, tasks, config.num_networks(conditional=True))


def sampling_of(trained: Artifact, config: GenerateConfig) -> Sampling:
    """What was asked for, else what was chosen on validation tasks, else the default."""
    given = {k: getattr(config, k) for k in ("sampler", "num_steps", "temperature") if getattr(config, k) is not None}
    selection = trained.facts["selection"]
    chosen = selection["chosen"]["sampling"] if selection is not None else {}
    return Sampling.model_validate_json(json.dumps(chosen)).model_copy(update=given)


def read_generator(run: Run, trained: Artifact) -> Generator:
    """Load a trained model; everything it needs lies in its own folder."""
    facts = trained.facts
    config = RpgConfig.model_validate_json(json.dumps(trained.section["rpg"]))
    layout = Layout.from_json(trained.json("layout.json"))
    with rng.initialising(config.seed):
        model = RPG(
            config, *layout.indices(), token_dim=layout.token_dim,
            num_bits=facts["num_bits"], num_states=facts["num_states"],
        )  # fmt: skip
    model.load_state_dict(trained.tensors("model.safetensors"), strict=True, assign=True)
    statistics = Statistics(**trained.tensors("statistics.safetensors"))
    constants = trained.tensors("constants.safetensors")
    return Generator(model.to(run.device).eval(), layout, statistics, constants, facts["num_states"])


def request_folder(request: Request, config: GenerateConfig) -> str:
    """`<bits, or tasks>-s<seed>-n<count>[-<hash of the other settings that were given>]`."""
    rest = config.model_dump(mode="json", exclude={"seed", "count"}, exclude_defaults=True)
    suffix = f"-{artifact.digest(rest)[:8]}" if rest else ""
    return f"{request.name}-s{config.seed}-n{request.count}{suffix}"


def generated_folder(folder: Path, name: str | None, recipe: Recipe) -> Path:
    """The folder of a request by its name (or path); by default what `rpg generate` writes without a task."""
    if name is not None:
        return Path(name) if "/" in name else folder / "generated" / name
    trained = artifact.read(folder / "rpg", "train-rpg")
    return folder / "generated" / request_folder(default_request(trained, recipe.generate), recipe.generate)


def run_generate(run: Run, request: Request, config: GenerateConfig, trained: Artifact) -> Artifact:
    """Write whole, checked networks for a request."""
    begun = time.perf_counter()
    sampling = sampling_of(trained, config)
    made_from = {
        "generate": config.model_dump(mode="json") | {"count": request.count},
        "request": request.name, "tasks": [list(t) for t in request.tasks],
    }  # fmt: skip
    folder = "generated/" + request_folder(request, config)
    with run.draft(folder, "generate", made_from, {"rpg": trained}) as draft:
        if draft.finished is not None:
            return draft.finished
        generator = read_generator(run, trained)
        check = strict_check(trained)
        samples = list(expand(request.tasks, request.count))
        networks, seconds = [], []
        for i, sample in enumerate(samples):
            started = time.perf_counter()
            tokens, chosen = generator.tokens(sample, sampling, seed=config.seed, state=config.state)
            state = generator.network(tokens)
            check(state)
            name = f"{sample.task_bits or 'network'}-{sample.index:04d}.safetensors"
            draft.save_tensors(name, state)
            networks.append(Network(name, sample.split, sample.task_bits, run=chosen, sample=sample.index).to_json())
            seconds.append(round(time.perf_counter() - started, 4))
            run.on_step(Step(i + 1, len(samples), unit="network"))
        facts = {
            "networks": networks, "method": "rpg", "seed": config.seed, "classes": trained.facts["network"]["classes"],
            "sampling": sampling.model_dump(mode="json"),
        }  # fmt: skip
        training = trained.manifest.volatile.get("training_seconds")
        return draft.commit(facts, run.volatile(begun, seconds_per_network=seconds, training_seconds=training))


def strict_check(trained: Artifact) -> "StrictCheck":
    """A check that the target takes a state dict as it is."""
    facts = trained.facts["network"]
    config = ProblemConfig.model_validate_json(json.dumps(trained.facts["problem"]))
    with torch.device("meta"):
        return StrictCheck(config.target.build(facts["channels"], tuple(facts["size"]), facts["num_outputs"]))


@dataclass(frozen=True)
class StrictCheck:
    """Loads state dicts into the target with `strict=True`."""

    target: nn.Module

    def __call__(self, state: Mapping[str, Tensor]) -> None:
        """Raise a RuntimeError unless names, shapes and order of `state` are the target's."""
        self.target.load_state_dict(dict(state), strict=True, assign=True)


# --- evaluate ---------------------------------------------------------------------------------------------------------


def run_evaluate(run: Run, recipe: Recipe, generated_at: Path) -> Artifact:
    """Measure generated, trained and trivially made networks on the same test images."""
    begun = time.perf_counter()
    zoo = Zoo.read(run.at("zoo"))
    tokens = artifact.read(run.at("tokens"), "tokenize")
    generated = Zoo.read(generated_at, "generate")
    check_lineage(tokens, "zoo", zoo.artifact)
    if generated_at.parent == run.folder / "generated":
        check_lineage(generated.artifact, "rpg", artifact.read(run.at("rpg"), "train-rpg"))
    inputs = {"zoo": zoo.artifact, "tokens": tokens, "generated": generated.artifact}
    with run.draft("report", "evaluate", section(recipe, "evaluate"), inputs) as draft:
        if draft.finished is not None:
            return draft.finished
        report = make_report(run, recipe, zoo, TokenStore(tokens), generated)
        draft.save_json("report.json", report, varies=True)
        facts = {k: v for k, v in report.items() if k not in {"groups", "baseline_settings", "training_seconds"}}
        return draft.commit(facts, run.volatile(begun))


def check_lineage(found: Artifact, name: str, source: Artifact) -> None:
    """Raise an ArtifactError unless `found` was made from `source`."""
    if found.manifest.inputs.get(name) != source.id:
        raise ArtifactError(
            f"{found.path} was not made from {source.path} as it is now.",
            f"Make it anew with `rpg {found.manifest.stage} --force`, then what follows from it.",
        )


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


def make_report(run: Run, recipe: Recipe, zoo: Zoo, store: TokenStore, generated: Zoo) -> dict[str, Any]:
    """Groups, comparisons and verdict; `report.json`."""
    problem = run.open(problem_of(zoo))
    facts, volatile = generated.artifact.facts, generated.artifact.manifest.volatile
    if problem.has_bits and any(network.task_bits is None for network in generated.networks):
        raise ArtifactError(
            f"{generated.artifact.path} was generated without a task: nothing says what its networks should answer.",
            "Train with rpg.condition: auto, so that networks can be asked for a task.",
        )
    trained = [trained_group(problem, zoo, split) for split in ("seen", "unseen")]
    made = [
        generated_group(run, problem, generated, split, volatile.get("seconds_per_network", []))
        for split in ("seen", "validation", "unseen", "all")
    ]
    judged = next(g for split in ("unseen", "all", "validation", "seen") for g in made if g.split == split and g.tasks)
    baselines, settings = (
        task_baselines(run, recipe, problem, zoo, store, judged)
        if problem.has_bits
        else (average_network(problem, store), {})
    )
    peers = trained_group(problem, zoo, "seen" if judged.split == "all" else judged.split, only=judged.by_task())
    sentence, beats, comparisons = verdict(judged, peers, baselines)
    always = {"seen", "unseen"} if problem.has_bits else {"seen", "all"}
    groups = [g for g in [*trained, *made, *baselines] if g.accuracies or g.split in always]
    return {
        "schema": REPORT_SCHEMA, "verdict": sentence, "beats_baselines": beats,
        "groups": [group.to_json() for group in groups],
        "comparisons": [comparison.to_json() for comparison in comparisons],
        "baseline_settings": settings,
        "sampling": facts["sampling"], "seed": facts["seed"],
        "request": generated.artifact.section["request"], "num_test_images": len(problem.dataset.test.labels),
        "per_task": {f"{g.name} {g.split}": g.by_task() for g in groups if g.by_task()},
        "training_seconds": volatile.get("training_seconds"),
    }  # fmt: skip


def trained_group(problem: Problem, zoo: Zoo, split: str, *, only: Collection[str] = ()) -> Group:
    """Trained networks of a split (of some tasks): the last snapshot of each, as measured when they were collected."""
    networks = [n for n in zoo.select(split, last=problem.has_bits) if not only or n.task_bits in only]
    accuracies = [n.accuracy["test"] for n in networks if n.accuracy is not None]
    seconds = zoo.artifact.manifest.volatile.get("seconds", 0.0) / sum(n.last for n in zoo.networks)
    return Group("trained", "trained", split, accuracies, [n.task_bits for n in networks], seconds)


def generated_group(run: Run, problem: Problem, generated: Zoo, split: str, seconds: Sequence[float]) -> Group:
    """Generated networks of a split, measured now, some at a time."""
    networks = generated.select(split)
    bits = [n.task_bits for n in networks]
    size = MEASURED_AT_ONCE if problem.config.target.batched else 1
    accuracies: list[float] = []
    for i in range(0, len(networks), size):
        states = [generated.state(n) for n in networks[i : i + size]]
        accuracies += problem.accuracy(states, bits[i : i + size], "test").tolist()
        run.on_step(Step(len(accuracies), len(networks), phase=f"measure {split}", unit="network"))
    each = sum(seconds) / len(seconds) if seconds else None
    return Group(generated.artifact.facts["method"], "generated", split, accuracies, bits, each)


def task_baselines(
    run: Run, recipe: Recipe, problem: Problem, zoo: Zoo, store: TokenStore, judged: Group
) -> tuple[list[Group], dict[str, Any]]:
    """Trivial generators, settings chosen on validation tasks and images, measured on the judged tasks' test images."""
    tasks = {split: tasks_of(zoo, split) for split in ("seen", "validation", "unseen")}
    rows: dict[str, list[Tensor]] = {task: [] for task in tasks["seen"]}
    for i, checkpoint in enumerate(store.checkpoints):
        rows[str(checkpoint["task_bits"])].append(store.layout.ungrid(store.network(i)))
    known = baselines.Known(tasks["seen"], torch.stack([torch.stack(row) for row in rows.values()]))  # (N, S, P)

    def networks(predict: baselines.Predict, bits: Sequence[str]) -> list[dict[str, Tensor]]:
        tokens = store.layout.grid(predict(bits))  # (n, L, D)
        return [detokenize(x, store.layout, store.statistics, store.constants(0)) for x in tokens]

    def score(predict: baselines.Predict) -> float:
        bits = tasks["validation"]
        return float(problem.accuracy(networks(predict, bits), bits, "validation").mean()) if bits else 0.0

    fitted = baselines.fit_all(known, score, recipe.evaluate.mlp, recipe.evaluate.seed, run.on_step)
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


def average_network(problem: Problem, store: TokenStore) -> list[Group]:
    """The mean of all checkpoints, for zoos without tasks."""
    mean = torch.zeros(store.layout.num_tokens, store.layout.token_dim)
    for i in range(len(store)):
        mean += store.network(i) / len(store)
    state = detokenize(mean, store.layout, store.statistics, store.constants(0))
    return [Group("average", "baseline", "all", problem.accuracy([state], [None], "test").tolist(), [None], 0.0)]
