"""The stages as typed functions: artifacts in, artifacts out. Nothing here prints.

    collect -> zoo/      tokenize -> tokens/      train_rpg -> rpg/
                                                  train_ae -> autoencoder/      train_diffusion -> diffusion/
    generate -> generated/<request>/              evaluate -> report/

Each stage reads the ones before it in the run folder, and is told apart by its key: finished with the same key, it
does nothing.
"""

import hashlib
import logging
import platform
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpgcli import __version__, artifact, kernels
from rpgcli.alignment import aligned, free
from rpgcli.artifact import Artifact, Draft
from rpgcli.autoencoder import NoisyAutoencoder, Pca
from rpgcli.collection import bring_in, collect, collect_shard, subset
from rpgcli.conditions import Asked, make_condition
from rpgcli.errors import ArtifactError, GateError, LayoutError
from rpgcli.evaluation.initialisation import compare_starts
from rpgcli.evaluation.page import about_of, pages
from rpgcli.evaluation.pictures import PICTURES_SCHEMA, Sources, make_pictures
from rpgcli.evaluation.reconstruction import judge_autoencoder, warn_of_poor
from rpgcli.evaluation.report import Measure, make_report, trivial_measures
from rpgcli.generation import (
    DENOISING,
    Generator,
    Maker,
    Model,
    Request,
    Sample,
    Sampling,
    Source,
    default_request,
    request_folder,
)
from rpgcli.imports import networks_in
from rpgcli.layout import Layout, make_layout
from rpgcli.methods.pdiff import (
    Vectors,
    autoencoder_loss,
    build_autoencoder,
    build_diffusion,
    compare_latents,
    diffusion_loss,
    encode,
    features_of,
    split_checkpoints,
    training_of,
    what_is_odd,
)
from rpgcli.methods.rpg import build, make_loss
from rpgcli.models import (
    CHOSEN_BY,
    STAGE_OF,
    STAGES,
    assemble,
    find_source,
    open_source,
    read_autoencoder,
    read_model,
    save_target,
    skeleton,
)
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.progress import OnStep, Step, silent
from rpgcli.ranks import ALONE, Ranks
from rpgcli.recipe import Recipe, as_today, section
from rpgcli.samplers import SelectionConfig
from rpgcli.sharding import Block, Blocks, Shard, Share, merge
from rpgcli.tokens import TokenStore, write_store
from rpgcli.training import fit
from rpgcli.zoo import Network, Zoo

logger = logging.getLogger(__name__)

VARYING = {"groups", "baseline_settings", "training_seconds", "initialisation"}
"""What of a report holds seconds."""
BLOCK_NETWORKS = 64
"""Generated networks of a block at most."""
BLOCK_PARAMETERS = 2**24
"""Their parameters at most; of larger networks each is a block."""
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
    ranks: Ranks = ALONE
    """The processes that train together."""

    def at(self, name: str) -> Path:
        """Folder of a stage that is read."""
        return self.zoo if name == "zoo" and self.zoo is not None else self.folder / name

    @contextmanager
    def draft(
        self, name: str, stage: str, made_from: Mapping[str, Any], inputs: Mapping[str, Artifact]
    ) -> Iterator[Draft]:
        """The draft of a stage's artifact; rank 0 holds and writes it, the others know where it lies."""
        ids = {name: found.id for name, found in inputs.items()}
        target = self.out or self.folder / name
        known = {"the recipe": artifact.digest(dict(made_from))[:12], "torch": torch.__version__}
        self.ranks.agree(known | {name: identity[:12] for name, identity in ids.items()})
        if not self.ranks.first:
            path = Path(self.ranks.gather("")[0])
            finished = artifact.read(target, stage) if path == target else None
            yield Draft(target, path, stage, dict(made_from), ids, resumed=False, finished=finished)
            return
        with artifact.draft(
            target, stage, section=dict(made_from), inputs=ids, force=self.force, resume=self.resume, as_today=as_today
        ) as draft:
            blocks = Blocks.of(draft)
            if draft.finished is None:
                blocks.prepare(resume=self.resume, force=self.force)
            self.ranks.gather(str(draft.path))
            yield draft
            if draft.finished is None or not blocks.others():
                blocks.clear()

    def blocks(self, name: str, stage: str, made_from: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> Blocks:
        """What shards compute of a stage; the arguments are those of its draft."""
        ids = {name: found.id for name, found in inputs.items()}
        return Blocks(self.out or self.folder / name, stage, dict(made_from), ids, force=self.force)

    def remember(self, recipe: Recipe, *, anew: bool = False) -> None:
        """Store the resolved recipe in the run, so that later stages need none."""
        path = self.folder / RECIPE
        if self.ranks.first and (anew or not path.exists()):
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
            "processes": self.ranks.size,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "versions": {"rpg": __version__, "torch": torch.__version__, "python": platform.python_version()}, **more,
        }  # fmt: skip


# --- collect ----------------------------------------------------------------------------------------------------------


def run_collect(run: Run, recipe: Recipe, *, source: Path | None = None) -> Artifact:
    """Train the zoo, or bring in the networks of `source`."""
    begun = time.perf_counter()
    with run.draft("zoo", "collect", settings_of_zoo(recipe, source), {}) as draft:
        if draft.finished is not None:
            run.remember(recipe, anew=run.out is None)
            return draft.finished
        problem = run.open(recipe.problem())
        run.remember(recipe, anew=run.out is None and not draft.target.exists())
        if source is None:
            networks = collect(problem, recipe.collect, recipe.seed, draft, download=run.download, on_step=run.on_step)
            names = subset(problem.skeleton, recipe.collect)
        else:
            networks = bring_in(problem, source, draft, on_step=run.on_step)
            own = artifact.tensors_of(draft.path / networks[0].file).keys()
            names = [name for name in problem.reference if name in own] if len(own) < len(problem.reference) else []
        dataset = problem.dataset
        facts = {
            "networks": [network.to_json() for network in networks], "classes": list(dataset.classes),
            "channels": dataset.channels, "size": list(dataset.size), "num_outputs": problem.num_outputs,
            "num_parameters": sum(v.numel() for v in problem.reference.values()),
            "parameters": names,
            "num_images": {s: len(getattr(dataset, s).labels) for s in ("train", "validation", "test")},
        }  # fmt: skip
        more = {} if source is None else {"from": str(source)}
        found = draft.commit(facts, run.volatile(begun - draft.spent, **more))
        run.remember(recipe, anew=run.out is None)
        return found


def share_collect(run: Run, shard: Shard, recipe: Recipe) -> Share:
    """Train a shard of the zoo."""
    blocks = run.blocks("zoo", "collect", settings_of_zoo(recipe), {})
    with blocks.working() as finished:
        if finished is not None:
            return Share(blocks.folder, finished=finished)
        return collect_shard(
            run.open(recipe.problem()), recipe.collect, recipe.seed, blocks, shard,
            download=run.download, on_step=run.on_step,
        )  # fmt: skip


def settings_of_zoo(recipe: Recipe, source: Path | None = None) -> dict[str, Any]:
    """What determines a zoo; given networks and weights by their content."""
    made_from = section(recipe, "seed", "dataset", "task", "target", "collect")
    if source is not None:
        made_from["from"] = digest_of(source)
    elif recipe.collect.pretrained not in (None, "timm"):
        made_from["collect"]["pretrained"] = hash_of(Path(str(recipe.collect.pretrained)))
    return made_from


def digest_of(folder: Path) -> str:
    """One hash of all network files of a folder, so that a change of any is noticed."""
    return artifact.digest({str(path.relative_to(folder)): hash_of(path) for path in networks_in(folder)})


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
        if len(seen) < 2:
            what = f"{zoo.artifact.path} holds {len(seen)} seen network{'s' * (not seen)}: there is nothing to learn."
            raise ArtifactError(what, "Collect several snapshots, runs or tasks.")
        config = recipe.tokens
        first, target = zoo.state(seen[0]), target_of(zoo)
        order = target.state_dict()
        if order.keys() == first.keys():
            first = {name: first[name] for name in order}  # safetensors keeps no order, the target does.
        layout = make_layout(
            first, token_dim=config.token_dim, granularity=config.granularity,
            log_variance=config.standardise != "none", shared=zoo.shared,
        )  # fmt: skip
        made = zoo.artifact.section
        independent = made["collect"]["kind"] == "seeds" and "from" not in made  # Of others nobody knows.
        symmetries = ProblemConfig.of(made).target.symmetries(target)
        groups = config.exchanged(free(symmetries, zoo.shared), independent=independent)
        states = aligned(states_of(zoo, seen, layout), first, groups)
        statistics = write_store(draft, states, len(seen), layout, config, run.on_step)
        facts = {
            "num_checkpoints": len(seen), "num_tokens": layout.num_tokens, "token_dim": layout.token_dim,
            "align": "weight-matching" if groups else "none", "num_exchangeable": sum(g.num_units for g in groups),
            "num_parameters": layout.num_parameters, "num_fixed": int((layout.mask() & ~statistics.varies).sum()),
            "checkpoints": [
                {name: getattr(n, name) for name in ("file", "task_bits", "label", "run", "step", "accuracy")}
                for n in seen
            ],
            "tasks": {split: zoo.tasks(split) for split in ("seen", "validation", "unseen")},
            "problem": {k: zoo.artifact.section[k] for k in ("dataset", "task", "target")},
            "network": {k: zoo.artifact.facts[k] for k in ("classes", "channels", "size", "num_outputs")},
        }  # fmt: skip
        return draft.commit(facts, run.volatile(begun, **({} if run.zoo is None else {"zoo": str(run.zoo)})))


def zoo_of(folder: Path) -> Path | None:
    """The zoo that a run builds on, if it is known: its own, or the one elsewhere that its tokens were made from."""
    if (folder / "zoo" / artifact.MANIFEST).is_file():
        return folder / "zoo"
    manifest = folder / "tokens" / artifact.MANIFEST
    path = artifact.read_manifest(manifest).volatile.get("zoo") if manifest.is_file() else None
    return None if path is None else Path(path)


def states_of(zoo: Zoo, networks: Sequence[Network], layout: Layout) -> Iterator[dict[str, Tensor]]:
    """State dicts of a zoo, each checked.

    Raises:
        LayoutError: If one does not fit the layout or is not finite; names its file.
    """
    for network, state in zip(networks, zoo.states(networks)):
        try:
            layout.check(state)
        except LayoutError as error:
            raise LayoutError(f"{zoo.artifact.path / network.file}: {error.what}", *error.advice) from None
        yield state


def target_of(zoo: Zoo) -> nn.Module:
    """The target network of a zoo, without memory."""
    facts = zoo.artifact.facts
    with torch.device("meta"):
        return ProblemConfig.of(zoo.artifact.section).target.build(
            facts["channels"], tuple(facts["size"]), facts["num_outputs"]
        )


# --- train-ae ---------------------------------------------------------------------------------------------------------


def run_train_ae(run: Run, recipe: Recipe) -> Artifact:
    """Train p-diff's parameter autoencoder, and judge it on checkpoints that it never saw."""
    begun = time.perf_counter()
    tokens = artifact.read(run.at("tokens"), "tokenize")
    config = recipe.autoencoder
    with run.draft("autoencoder", "train-ae", section(recipe, "autoencoder"), {"tokens": tokens}) as draft:
        run.remember(recipe)
        if draft.finished is not None:
            return draft.finished
        store = TokenStore(tokens)
        vectors = Vectors(store)
        known, held = split_checkpoints(store, config)
        model = build_autoencoder(config, vectors.num_parameters).to(run.device)
        if isinstance(model, NoisyAutoencoder):
            loss = autoencoder_loss(model, config, vectors, known, run.device, run.ranks)
            model = fit(model, loss, config.training, draft, dtype=run.dtype, on_step=run.on_step, ranks=run.ranks)
        else:
            assert isinstance(model, Pca), "whatever is not trained is computed"
            model.fit(vectors.rows(known).to(run.device))
        run.ranks.leave_to_first()
        trained = time.perf_counter()
        draft.save_tensors("model.safetensors", model.state_dict())
        problem = run.open(ProblemConfig.of(tokens.facts["problem"]))
        facts = {
            "kind": config.network.kind, "latent_dim": config.network.latent_dim,
            "num_parameters": vectors.num_parameters, "num_known": len(known), "num_held_out": len(held),
            "num_weights": sum(v.numel() for v in model.state_dict().values()),
            "reconstruction": judge_autoencoder(problem, model, vectors, known, held),
        }  # fmt: skip
        warn_of_poor(facts["reconstruction"])
        return draft.commit(facts, run.volatile(begun, training_seconds=round(trained - begun, 3)))


# --- train-diffusion --------------------------------------------------------------------------------------------------


def run_train_diffusion(run: Run, recipe: Recipe, *, allow_bad: bool = False) -> Artifact:
    """Train the diffusion on the autoencoder's latents, and look whether its samples are like them.

    Raises:
        GateError: If they are not, and `allow_bad` does not ask for it anyway; nothing is committed then.
    """
    begun = time.perf_counter()
    tokens = artifact.read(run.at("tokens"), "tokenize")
    encoder = artifact.read(run.at("autoencoder"), "train-ae")
    check_lineage(encoder, "tokens", tokens)
    config = recipe.diffusion
    inputs = {"tokens": tokens, "autoencoder": encoder}
    with run.draft("diffusion", "train-diffusion", section(recipe, "diffusion"), inputs) as draft:
        run.remember(recipe)
        if draft.finished is not None:
            return draft.finished
        store = TokenStore(tokens)
        condition = make_condition(config.condition, config.levels, store.checkpoints, section="diffusion")
        features = features_of(store, condition)
        autoencoder = read_autoencoder(encoder, run.device)
        latents = encode(autoencoder, Vectors(store), run.device)  # (K, Z)
        model = build_diffusion(config, latents, condition).to(run.device)
        loss = diffusion_loss(model, config, latents, features, run.device, run.ranks)
        model = fit(model, loss, config.training, draft, dtype=run.dtype, on_step=run.on_step, ranks=run.ranks).eval()
        run.ranks.leave_to_first()
        trained = time.perf_counter()
        trainings = [training_of(checkpoint) for checkpoint in store.checkpoints]
        comparison = compare_latents(model, latents, features, trainings, config.seed)
        if not comparison["learned"] and not allow_bad:
            raise GateError(
                what_is_odd(comparison),
                "Nothing was committed. Train longer: --set diffusion.training.num_steps=N --force.",
                "To keep it as it is: the same command with --allow-bad --resume.",
            )
        draft.save_tensors("model.safetensors", model.state_dict())
        draft.save_tensors("autoencoder.safetensors", autoencoder.state_dict())
        save_target(draft, store)
        parts = assemble(model, autoencoder, condition, 1, store.layout, store.statistics, store.constants(0))
        facts = {
            **carried(tokens), "condition": condition and condition.to_json(), "num_states": 1,
            "num_weights": sum(p.numel() for p in model.parameters()), "latents": comparison,
            "autoencoder": encoder.section | encoder.facts,
            "selection": select(run, Generator(parts), tokens, config.selection),
        }  # fmt: skip
        before = encoder.manifest.volatile.get("training_seconds", 0.0)
        seconds = round(trained - begun + before, 3)
        return draft.commit(facts, run.volatile(begun, training_seconds=seconds))


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
        condition = make_condition(config.condition, config.levels, store.checkpoints, section="rpg")
        model = build(config, store, condition).to(run.device)
        backend = kernels.resolve_backend(getattr(config.core, "backend", "torch"), run.device)
        logger.info("the core %s runs on %s with the %s backend", config.core.kind, run.device, backend)
        loss = make_loss(model, config, store, condition, run.device, run.ranks)
        model = fit(model, loss, config.training, draft, dtype=run.dtype, on_step=run.on_step, ranks=run.ranks)
        run.ranks.leave_to_first()
        trained = time.perf_counter()
        draft.save_tensors("model.safetensors", model.state_dict())
        save_target(draft, store)
        num_states = model.state.num_embeddings if model.state is not None else 1
        parts = assemble(model, None, condition, num_states, store.layout, store.statistics, store.constants(0))
        facts = {
            **carried(tokens), "condition": condition and condition.to_json(), "num_states": num_states,
            "num_weights": sum(p.numel() for p in model.parameters()),
            "selection": select(run, Generator(parts), tokens, config.selection),
        }  # fmt: skip
        return draft.commit(facts, run.volatile(begun, training_seconds=round(trained - begun, 3), backend=backend))


def carried(tokens: Artifact) -> dict[str, Any]:
    """Facts of the tokens that generating and judging need too."""
    return {k: v for k, v in tokens.facts.items() if k not in {"checkpoints", "num_checkpoints", "num_fixed"}}


def select(run: Run, generator: Generator, tokens: Artifact, config: SelectionConfig) -> dict[str, Any] | None:
    """Try samplers, steps and temperatures on validation tasks and images; keep the most accurate.

    Returns:
        The choice and all that was tried; None without validation tasks.
    """
    condition = generator.model.condition
    tasks = tokens.facts["tasks"]["validation"][: config.num_tasks]
    if condition is None or condition.kind != "task-bits" or not tasks:
        return None
    problem = run.open(ProblemConfig.of(tokens.facts["problem"]))
    tried: list[dict[str, Any]] = []
    grid = [(s, n, t) for s in config.samplers for n in config.num_steps for t in config.temperatures]
    asked = [Asked("validation", bits) for bits in tasks]
    for i, (sampler, num_steps, temperature) in enumerate(grid):
        sampling = Sampling(sampler=sampler, num_steps=num_steps, temperature=temperature)
        states = [generator.network(x) for x in generator.batch(asked, sampling, seed=0)]
        accuracy = float(problem.accuracy(states, tasks, "validation").mean())
        tried.append({"sampling": sampling.model_dump(mode="json"), "accuracy": accuracy})
        run.on_step(Step(i + 1, len(grid), {"validation": accuracy}, "choose sampling", "setting"))
    return {"chosen": max(tried, key=lambda entry: entry["accuracy"]), "tried": tried, "num_tasks": len(tasks)}


# --- generate ---------------------------------------------------------------------------------------------------------


def generated_folder(folder: Path, name: str | None, recipe: Recipe, method: str | None) -> Path:
    """The folder of a request by its name (or path); by default what `rpg generate` writes when nothing is asked."""
    if name is not None:
        return Path(name) if "/" in name else folder / "generated" / name
    source = find_source(folder, method or recipe.generate.method)
    request = default_request(source, recipe.generate)
    return folder / "generated" / request_folder(request, recipe.generate, source.method)


def run_generate(run: Run, recipe: Recipe, source: Source, request: Request) -> Artifact:
    """Write whole, checked networks for a request, from a trained model or a trivial generator."""
    begun = time.perf_counter()
    folder, made_from = settings_of_networks(recipe, source, request)
    with run.draft(folder, "generate", made_from, source.inputs) as draft:
        if draft.finished is not None:
            return draft.finished
        maker = open_maker(run, recipe, source)
        written = merge(draft, sampled(maker, source, request), run.on_step)
        facts = {
            "networks": [network for block in written for network in block["networks"]], "method": source.method,
            "seed": recipe.generate.seed, "classes": source.facts["network"]["classes"],
            "condition": source.condition and source.condition.to_json(), **maker.facts,
        }  # fmt: skip
        seconds = [spent for block in written for spent in block["seconds"]]
        more = {"seconds_per_network": seconds, "training_seconds": maker.training_seconds}
        return draft.commit(facts, run.volatile(begun - draft.spent, **more))


def share_generate(run: Run, shard: Shard, recipe: Recipe, source: Source, request: Request) -> Share:
    """Write the networks of a shard."""
    folder, made_from = settings_of_networks(recipe, source, request)
    blocks = run.blocks(folder, "generate", made_from, source.inputs)
    with blocks.working() as finished:
        if finished is not None:
            return Share(blocks.folder, finished=finished)
        return blocks.share(shard, sampled(open_maker(run, recipe, source), source, request), run.on_step)


def settings_of_networks(recipe: Recipe, source: Source, request: Request) -> tuple[str, dict[str, Any]]:
    """The folder of a request, and what determines its networks."""
    config, method = recipe.generate, source.method
    if "autoencoder" in source.inputs:
        check_lineage(source.inputs["autoencoder"], "tokens", source.inputs["tokens"])
    read = config.model_dump(mode="json", exclude=set() if source.is_learned else set(DENOISING))
    made_from = {
        "generate": read | {"count": request.count, "method": method},
        "request": request.name, "asked": [vars(one) for one in request.asked],
    }  # fmt: skip
    if method in CHOSEN_BY:
        made_from["evaluate"] = recipe.evaluate.model_dump(mode="json", include={CHOSEN_BY[method]})
    return "generated/" + request_folder(request, config, method), made_from


def open_maker(run: Run, recipe: Recipe, source: Source) -> Maker:
    """What makes one network after another."""
    return open_source(
        source, recipe.generate, recipe.evaluate, lambda: run.open(ProblemConfig.of(source.facts["problem"])),
        run.device, run.dtype, run.on_step,
    )  # fmt: skip


def sampled(maker: Maker, source: Source, request: Request) -> list[Block]:
    """The networks of a request, block by block."""
    expected, samples = skeleton(source), list(request.samples())

    def write(samples: Sequence[Sample], draft: Draft, on_step: OnStep) -> dict[str, Any]:
        networks, seconds = [], []
        for i, sample in enumerate(samples):
            started, asked = time.perf_counter(), sample.asked
            tensors, chosen = maker.make(sample)
            network = Network(
                f"{asked.words or 'network'}-{sample.index:04d}.safetensors", asked.split, asked.task_bits,
                run=chosen, sample=sample.index, label=asked.label, asked_accuracy=asked.accuracy,
            )  # fmt: skip
            with draft.saving_tensors(network.file, expected) as append:
                for name, value in tensors:
                    append(name, value)
            networks.append(network.to_json())
            seconds.append(round(time.perf_counter() - started, 4))
            on_step(Step(i + 1, len(samples), unit="network"))
        return {"networks": networks, "seconds": seconds}

    size = max(1, min(BLOCK_NETWORKS, BLOCK_PARAMETERS // source.facts["num_parameters"]))
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [Block(f"{b:05d}", len(part), partial(write, part)) for b, part in enumerate(parts)]


# --- evaluate ---------------------------------------------------------------------------------------------------------


def run_evaluate(run: Run, recipe: Recipe, generated_at: Path) -> Artifact:
    """Measure generated, trained and trivially made networks on the same test images."""
    begun = time.perf_counter()
    inputs, stages = inputs_of_report(run, generated_at)
    zoo, generated, tokens = Zoo(inputs["zoo"]), Zoo(inputs["generated"]), inputs["tokens"]
    with run.draft("report", "evaluate", section(recipe, "evaluate"), inputs) as draft:
        if draft.finished is not None:
            return draft.finished
        problem = run.open(ProblemConfig.of(zoo.artifact.section))
        autoencoder = read_autoencoder(inputs["autoencoder"], run.device) if "autoencoder" in inputs else None

        def compute(measures: Mapping[str, Measure]) -> list[dict[str, Any]]:
            return merge(draft, measuring(measures, generated), run.on_step)

        report = make_report(
            problem, recipe.evaluate, zoo, TokenStore(tokens), generated, run.on_step,
            autoencoder=autoencoder, compute=compute,
        )  # fmt: skip
        for starts in compute(starting(recipe, problem, zoo, tokens, generated)):
            report["initialisation"] = starts
        draft.save_json("report.json", report, varies=True)
        is_in_order = bool(stages) or tokens.facts.get("align", "none") == "none"
        sources = Sources(
            TokenStore(tokens), generated, recipe.evaluate.seed,
            model_of(generated, stages, run.device), autoencoder, stages,
            () if is_in_order else free(problem.config.target.symmetries(problem.skeleton), zoo.shared),
        )  # fmt: skip
        pictures = make_pictures(report, sources, run.on_step)
        about = about_of(zoo.artifact.section, report, generated_at.name)
        draft.save_json("pictures.json", {"schema": PICTURES_SCHEMA, "about": about, "pictures": pictures}, varies=True)
        for name, content in pages(report, pictures, about):
            draft.save_bytes(name, content, varies=True)
        facts = {k: v for k, v in report.items() if k not in VARYING}
        return draft.commit(facts, run.volatile(begun - draft.spent))


def share_evaluate(run: Run, shard: Shard, recipe: Recipe, generated_at: Path) -> Share:
    """Measure a shard of the trivial generators; what is compared with them is measured where all is put together."""
    inputs, _ = inputs_of_report(run, generated_at)
    zoo, generated, tokens = Zoo(inputs["zoo"]), Zoo(inputs["generated"]), inputs["tokens"]
    blocks = run.blocks("report", "evaluate", section(recipe, "evaluate"), inputs)
    with blocks.working() as finished:
        if finished is not None:
            return Share(blocks.folder, finished=finished)
        problem = run.open(ProblemConfig.of(zoo.artifact.section))
        autoencoder = read_autoencoder(inputs["autoencoder"], run.device) if "autoencoder" in inputs else None
        measures = trivial_measures(
            problem, recipe.evaluate, zoo, TokenStore(tokens), generated, run.on_step, autoencoder=autoencoder
        )
        measures |= starting(recipe, problem, zoo, tokens, generated)
        return blocks.share(shard, measuring(measures, generated), run.on_step)


def inputs_of_report(run: Run, generated_at: Path) -> tuple[dict[str, Artifact], dict[str, Artifact]]:
    """What a report is made from, and the stages of the run that made the networks it judges."""
    zoo = Zoo.read(run.at("zoo"))
    tokens = artifact.read(run.at("tokens"), "tokenize")
    generated = Zoo.read(generated_at, "generate")
    check_lineage(tokens, "zoo", zoo.artifact)
    inputs = {"zoo": zoo.artifact, "tokens": tokens, "generated": generated.artifact}
    stages: dict[str, Artifact] = {}
    if generated_at.parent == run.folder / "generated":
        made_from = generated.artifact.manifest.inputs
        for folder in made_from:
            stages[folder] = artifact.read(run.at(folder), STAGES[folder])
            check_lineage(generated.artifact, folder, stages[folder])
        if "diffusion" in made_from or "autoencoder" in made_from:
            inputs["autoencoder"] = stages["autoencoder"] = artifact.read(run.at("autoencoder"), "train-ae")
            check_lineage(inputs["autoencoder"], "tokens", tokens)
    return inputs, stages


def starting(recipe: Recipe, problem: Problem, zoo: Zoo, tokens: Artifact, generated: Zoo) -> dict[str, Measure]:
    """Training from generated and other starts, if the recipe asks for it."""
    config = recipe.evaluate.initialisation
    if config is None:
        return {}

    def measure(on_step: OnStep) -> dict[str, Any]:
        store, seed = TokenStore(tokens), recipe.evaluate.seed
        return compare_starts(problem, config, zoo, store, generated, seed=seed, on_step=on_step)

    return {"initialisation": measure}


def measuring(measures: Mapping[str, Measure], generated: Zoo) -> list[Block]:
    """Each measure as a block, of as many networks as are judged."""

    def write(measure: Measure, draft: Draft, on_step: OnStep) -> dict[str, Any]:
        return measure(on_step)

    return [Block(name, len(generated.networks), partial(write, measure)) for name, measure in measures.items()]


def model_of(generated: Zoo, stages: Mapping[str, Artifact], device: torch.device) -> Model | None:
    """The model that networks were sampled from, where the run still holds it."""
    method = generated.artifact.facts["method"]
    trained = stages.get(STAGE_OF[method][0]) if method in STAGE_OF else None
    return None if trained is None else read_model(method, trained, device)


def check_lineage(found: Artifact, name: str, source: Artifact) -> None:
    """Raise an ArtifactError unless `found` was made from `source`."""
    if found.manifest.inputs.get(name) != source.id:
        raise ArtifactError(
            f"{found.path} was not made from {source.path} as it is now.",
            f"Make it anew with `rpg {found.manifest.stage} --force`, then what follows from it.",
        )
