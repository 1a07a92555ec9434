"""What a stage would do, without doing it: `--dry-run`.

What the stages before have made is read; the rest is foreseen from the recipe, without a data set where its numbers
are known. Networks are built on the `meta` device, so that a plan of any size takes no memory; there a step is taken,
and the bytes that it has alive and its floating-point operations are counted. Memory is that of float32 and plain
torch; autocast and CUDA kernels take less. Times are rough: operations over the rate of a matrix product measured now,
and a fixed cost of every step.

The names of a plan's entries carry their units: `..._bytes`, `..._seconds`, `..._fraction`; the others are counts.
"""

import math
import shutil
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rpgcli import artifact
from rpgcli.autoencoder import PCA_COLUMNS, NoisyAutoencoder
from rpgcli.collection import blocks, make_plan, subset
from rpgcli.diagnosis import memory, nearest_folder
from rpgcli.errors import UsageError
from rpgcli.generation import Sampling, rows_at_once
from rpgcli.imports import networks_in
from rpgcli.layout import Layout, make_layout
from rpgcli.methods import baselines, resampling
from rpgcli.methods.pdiff import AT_ONCE, LatentDiffusion, LatentDiffusionConfig, build_autoencoder
from rpgcli.methods.rpg import RPG, RpgConfig
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.recipe import Recipe
from rpgcli.training import TrainingConfig
from rpgcli.zoo import Network, Zoo

META = torch.device("meta")
EFFICIENCY = 0.5
"""What networks reach of the rate of one large matrix product."""
BATCHED_EFFICIENCY = 0.1
"""The same for many small networks at once, whose convolutions are small."""
STEP_SECONDS = 5e-3
"""What an optimizer step costs however small the network."""
ROOM = 0.8
"""Share of the memory that a plan may fill; small trainings took 0.9 to 1.35 times what was planned."""
BASELINES = ("majority", *baselines.GENERATORS)


@dataclass(frozen=True)
class Known:
    """The zoo that a stage builds on: as it is, or as the recipe foresees it."""

    problem: ProblemConfig
    target: nn.Module
    """The target network without memory."""
    num_classes: int
    num_test: int
    networks: Sequence[Network]
    subset: Sequence[str]
    """Names of the parameters that alone differ; empty for whole networks."""

    @property
    def seen(self) -> list[Network]:
        """The networks that are learned from."""
        return [network for network in self.networks if network.split == "seen"]

    @property
    def has_bits(self) -> bool:
        """Whether networks are told apart by task bits."""
        return self.problem.task.kind == "binary-subset"

    def num_trainings(self, split: str) -> int:
        """Trainings of a split, each with one last network."""
        return sum(network.last for network in self.networks if network.split == split)


def plan(
    stage: str, recipe: Recipe, *, run: Path | None, zoo: Path | None, data_root: Path | None, device: torch.device,
    place: Path,
) -> dict[str, Any]:  # fmt: skip
    """Counts, parameters, bytes and rough seconds of a stage.

    Args:
        stage: collect, tokenize, train-ae, train-diffusion, train-rpg or evaluate.
        recipe: Resolved.
        run: Folder whose artifacts the stage would build on; None for a recipe by itself.
        zoo: Where the zoo lies; while it is not there it is foreseen from the recipe.
        data_root: Folder of the data set's files, needed without a zoo.
        device: What the stage would run on.
        place: Where artifacts would be written.

    Raises:
        DataError: If neither the zoo nor the data set is there.
    """
    entries: dict[str, Any] = {"recipe": recipe.name, "stage": stage}
    if stage == "collect":
        return entries | plan_collect(recipe, data_root, device)
    known = known_of(recipe, zoo, data_root)
    if stage == "evaluate":
        return entries | plan_evaluate(recipe, known)
    if stage == "tokenize":
        return entries | plan_tokenize(layout_of(recipe, known, None), known)
    layout = layout_of(recipe, known, run)
    if stage == "train-ae":
        return entries | plan_train_ae(recipe, layout, known, device)
    if stage == "train-diffusion":
        return entries | plan_train_diffusion(recipe, latent_dim_of(recipe, run), known, device)
    missing = num_bytes_missing(recipe, layout, known, run=run, zoo=zoo)
    return entries | plan_train_rpg(recipe, layout, known, device, missing, place)


def known_of(recipe: Recipe, zoo: Path | None, data_root: Path | None) -> Known:
    """Read the zoo, or foresee it."""
    if zoo is not None and (zoo / artifact.MANIFEST).is_file():
        found = Zoo.read(zoo)
        facts, config = found.artifact.facts, ProblemConfig.of(found.artifact.section)
        model = target(config, facts["channels"], tuple(facts["size"]), facts["num_outputs"])
        num_test, names = facts["num_images"]["test"], facts.get("parameters", ())
        return Known(config, model, len(facts["classes"]), num_test, found.networks, names)
    config = recipe.problem()
    problem = Problem(config, data_root, False, torch.device("cpu"), outline=True)
    data = problem.dataset
    model = target(config, data.channels, data.size, problem.num_outputs)
    if zoo is not None and zoo.is_dir():  # Of others.
        networks, names = [Network("", "seen", run=i) for i in range(len(networks_in(zoo)))], []
    else:
        networks, names = foreseen(problem, recipe), subset(model, recipe.collect)
    return Known(config, model, data.num_classes, len(data.test.labels), networks, names)


def foreseen(problem: Problem, recipe: Recipe) -> list[Network]:
    """The networks that collecting would give; only the last one of a task that nobody learns from is kept."""
    config = recipe.collect
    each = config.num_checkpoints if config.kind == "trajectory" else config.snapshots
    return [
        Network("", training.split, training.task_bits, run=training.run, last=last)
        for training in make_plan(problem, config, recipe.seed)
        for last in [*[False] * (each - 1 if training.split == "seen" else 0), True]
    ]


def target(problem: ProblemConfig, channels: int, size: tuple[int, int], num_outputs: int) -> nn.Module:
    """The target network without memory."""
    with META:
        return problem.target.build(channels, size, num_outputs)


# --- collect ----------------------------------------------------------------------------------------------------------


def plan_collect(recipe: Recipe, data_root: Path | None, device: torch.device) -> dict[str, Any]:
    """Trainings, networks, steps, bytes, seconds."""
    problem = Problem(recipe.problem(), data_root, False, torch.device("cpu"), outline=True)
    config, data = recipe.collect, problem.dataset
    trainings = make_plan(problem, config, recipe.seed)
    groups, num_networks = blocks(problem, config, trainings), len(foreseen(problem, recipe))
    model = target(problem.config, data.channels, data.size, problem.num_outputs)
    names = subset(model, config)
    shared, own = None, [config.training]
    if config.kind == "tasks" and config.pretrained is None:
        shared = config.pretrain
    elif config.kind == "trajectory" and names:
        shared, own = config.training if config.pretrained in (None, "timm") else None, [config.save]
    elif config.kind == "trajectory":
        own.append(config.save)
    num_images = len(data.train.labels)
    num_steps, start_steps = sum(part.num_steps(num_images) for part in own), 0
    passes = len(trainings) * sum(part.epochs for part in own)
    if names:
        passes = 1  # The frozen rest is computed once, for the images of all splits.
    if shared is not None:
        start_steps = shared.num_steps(num_images)
        passes += shared.epochs

    image = torch.empty(2, data.channels, *problem.input_size, device=META)  # Two: batch norm refuses a single one.
    flops = measure_step(lambda: model(image).sum()).flops / 2
    efficiency = BATCHED_EFFICIENCY if recipe.target.batched else EFFICIENCY
    seconds = flops * num_images * passes / (efficiency * flops_per_second(device))
    seconds += STEP_SECONDS * (start_steps + len(groups) * num_steps)
    return {
        "trainings": len(trainings), "networks": num_networks, "blocks": len(groups),
        "parameters": count(model), "of the subset": sum(model.get_parameter(name).numel() for name in names),
        "training images": num_images, "steps of the shared start": start_steps, "steps of each block": num_steps,
        "zoo_bytes": zoo_bytes(model, names, num_networks),
        "images_in_memory_bytes": sum(part.pixels.numel() for part in (data.train, data.validation, data.test)),
        "estimated_seconds": seconds,
    }  # fmt: skip


def zoo_bytes(model: nn.Module, names: Sequence[str], num_networks: int) -> int:
    """Of whole networks; of those that differ in some parameters only, what they share counts once."""
    varying = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name in names)
    return num_networks * varying + num_bytes(model) if names else num_networks * num_bytes(model)


# --- tokenize ---------------------------------------------------------------------------------------------------------


def plan_tokenize(layout: Layout, known: Known) -> dict[str, Any]:
    """Checkpoints, tokens, padding, bytes."""
    slots = layout.num_tokens * layout.token_dim
    return {
        "checkpoints": len(known.seen), "tokens": layout.num_tokens, "token_dim": layout.token_dim,
        "parameters": layout.num_parameters, "carried as they are": sum(spec.numel for spec in layout.constants),
        "stored once": sum(spec.numel for spec in layout.shared),
        "padding_fraction": 1 - layout.num_parameters / slots, "tokens_bytes": 4 * slots * len(known.seen),
    }  # fmt: skip


def layout_of(recipe: Recipe, known: Known, run: Path | None) -> Layout:
    """The layout of the run's tokens; where there are none, that which the zoo's checkpoints would get."""
    if run is not None and (run / "tokens" / artifact.MANIFEST).is_file():
        return Layout.from_json(artifact.read(run / "tokens", "tokenize").json("layout.json"))
    state = known.target.state_dict()
    return make_layout(
        state,
        token_dim=recipe.tokens.token_dim,
        granularity=recipe.tokens.granularity,
        log_variance=recipe.tokens.standardise != "none",
        shared=state.keys() - set(known.subset) if known.subset else (),
    )


# --- train-rpg --------------------------------------------------------------------------------------------------------


def plan_train_rpg(
    recipe: Recipe, layout: Layout, known: Known, device: torch.device, missing: dict[str, int], place: Path
) -> dict[str, Any]:
    """Parameters by part, tokens a step, bytes, seconds; also what a network then costs.

    Args:
        recipe: Resolved.
        layout: Of the tokens.
        known: The zoo.
        device: What it would run on.
        missing: Bytes of the artifacts that come first and are not there yet.
        place: Where artifacts would be written.
    """
    model, num_seen = rpg_of(recipe, layout, known), len(known.seen)
    config, training = recipe.rpg, recipe.rpg.training
    all_rows = training.batch_size * layout.num_tokens
    num_rows = min(config.tokens_per_step or all_rows, all_rows)
    num_parts = math.ceil(training.batch_size / (config.micro_batch or training.batch_size))
    step = measure_denoising(model, training.batch_size, num_rows, layout.token_dim, num_parts)
    position = model.position.numel() if isinstance(model.position, nn.Parameter) else 0
    return {
        "parameters": layout.num_parameters, "tokens": layout.num_tokens, "token_dim": layout.token_dim,
        "checkpoints": num_seen,
        "model parameters": count(model), "of the core": count(model.core), "of the denoiser": count(model.denoiser),
        "of the condition": count(model.condition), "of the states": count(model.state), "of positions": position,
        "networks a step": training.batch_size, "networks at once": math.ceil(training.batch_size / num_parts),
        "tokens denoised a step": num_rows,
        **cost(model, training, step, device),
        **plan_generating(recipe, model, layout, device),
        **disk(missing | {"training_bytes": bytes_written(model, layout, training)}, place),
    }  # fmt: skip


def rpg_of(recipe: Recipe, layout: Layout, known: Known) -> RPG:
    """The model without memory, its blocks in plain torch."""
    config, num_seen = recipe.rpg, len(known.seen)
    num_runs = len({network.run for network in known.seen})
    num_states = {"run": num_runs, "checkpoint": num_seen, "none": 1}[config.state]
    with META:
        core = config.core
        plain = core.model_copy(update={"backend": "torch"}) if core.kind == "mamba2" else core
        return RPG(
            config.model_copy(update={"core": plain}), *layout.indices(),
            token_dim=layout.token_dim, num_features=num_features(config, known, "rpg"), num_states=num_states,
        )  # fmt: skip


def plan_generating(recipe: Recipe, model: RPG, layout: Layout, device: torch.device) -> dict[str, Any]:
    """Bytes and seconds of one network from a trained model: its prototypes, then one block of tokens after another."""
    num_steps = recipe.generate.num_steps or Sampling().num_steps
    features, state = inputs(model, 1)
    num_rows = min(layout.num_tokens, rows_at_once(layout.token_dim))  # r
    x_t = torch.empty(num_rows, layout.token_dim, device=META)  # (r, D)
    t = torch.zeros(num_rows, dtype=torch.int64, device=META)  # (r,)
    with torch.no_grad(), Meter() as meter:
        c = model.prototypes(features, state)[0]  # (L, M)
        core = meter.flops
        e = model.denoiser.embed(c[:num_rows])  # (r, M) -> what the denoiser makes of it
        embedding = meter.flops - core
        x_0, eps = model.diffusion.predict(model.denoiser(x_t, t, e), x_t, t)  # (r, D)
        step = meter.flops - core - embedding
        del x_0, eps
    peak = num_bytes(model) + 4 * x_t.numel() + meter.peak + 4 * max(spec.numel for spec in layout.specs)
    num_blocks = math.ceil(layout.num_tokens / num_rows)
    flops = core + num_blocks * (embedding + num_steps * step)
    return {
        "sampling steps": num_steps, "tokens at once": num_rows, "peak_memory_of_generating_bytes": peak,
        "generating fits": fits(peak, device),
        "estimated_generating_seconds": flops / (EFFICIENCY * flops_per_second(device)),
    }  # fmt: skip


def num_bytes_missing(
    recipe: Recipe, layout: Layout, known: Known, *, run: Path | None, zoo: Path | None
) -> dict[str, int]:
    """Bytes of the zoo and the tokens, where they are not there yet."""
    missing = {}
    if zoo is None or not zoo.is_dir():
        missing["zoo_bytes"] = zoo_bytes(known.target, known.subset, len(known.networks))
    if run is None or not (run / "tokens" / artifact.MANIFEST).is_file():
        missing["tokens_bytes"] = 4 * layout.num_tokens * layout.token_dim * len(known.seen)
    return missing


def bytes_written(model: nn.Module, layout: Layout, config: TrainingConfig) -> int:
    """Of train-rpg: the last two checkpoints, one of which replaces the other, or the model; statistics of 9 bytes."""
    checkpoint = num_bytes(model) + num_bytes_beside(model, config)
    return 2 * checkpoint + 9 * layout.num_tokens * layout.token_dim


def disk(parts: dict[str, int], place: Path) -> dict[str, Any]:
    """What would be written, and whether there is room for it."""
    total, free = sum(parts.values()), shutil.disk_usage(nearest_folder(place)).free
    return parts | {"disk_bytes": total, "free_disk_bytes": free, "fits on disk": total < free}


def num_features(config: RpgConfig | LatentDiffusionConfig, known: Known, name: str) -> int:
    """Width of the condition's features, 0 for an unconditional model.

    Raises:
        UsageError: If the zoo does not say what the condition needs.
    """
    bits = known.num_classes if known.has_bits else 0
    labels = len({network.label for network in known.seen} - {None})
    widths = {
        "none": 0, "auto": bits, "task-bits": bits, "label": labels, "accuracy": 1, "accuracy-level": len(config.levels)
    }  # fmt: skip
    if widths[config.condition] == 0 and config.condition not in {"auto", "none"}:
        lacking = {"task-bits": "task bits", "label": "labels"}.get(config.condition, f"{name}.levels")
        raise UsageError(
            f"{name}.condition is {config.condition}, but there are no {lacking}.", "Set it to none or auto."
        )
    return widths[config.condition]


# --- train-ae and train-diffusion -------------------------------------------------------------------------------------


def plan_train_ae(recipe: Recipe, layout: Layout, known: Known, device: torch.device) -> dict[str, Any]:
    """Parameters of both halves, networks a step, bytes, seconds; principal components are computed, not trained."""
    config, num_seen, num_values = recipe.autoencoder, len(known.seen), layout.num_parameters
    with META:
        model = build_autoencoder(config, num_values)
    facts = {
        "kind": config.network.kind, "parameters": num_values, "latent_dim": config.network.latent_dim,
        "checkpoints": num_seen,
    }  # fmt: skip
    if not isinstance(model, NoisyAutoencoder):
        flops = 2 * num_seen * num_values * (num_seen + config.network.latent_dim)  # Gram matrix, then components.
        peak = 4 * num_values * num_seen + num_bytes(model) + 2 * 8 * num_seen * min(num_values, PCA_COLUMNS)
        seconds = flops / (EFFICIENCY * flops_per_second(device))
        return (
            facts | {"model_bytes": num_bytes(model), "steps": 0} | room(peak, device) | {"estimated_seconds": seconds}
        )
    batch_size = min(config.training.batch_size, num_seen)
    at_once = min(config.micro_batch or batch_size, batch_size)

    def loss() -> Tensor:
        x = torch.empty(at_once, num_values, device=META)  # (b, P)
        noisy = x + torch.empty_like(x)
        error: Tensor = (model.decode(model.encode(noisy)) - x).square().mean()
        return error

    part = measure_step(loss, again=at_once < batch_size)
    in_memory = num_seen * num_values if num_seen * num_values <= AT_ONCE else 0
    step = Measured(part.flops * batch_size // at_once, part.peak_bytes + 4 * in_memory)
    return {
        **facts, "model parameters": count(model), "of the encoder": count(model.encoder),
        "of the decoder": count(model.decoder), "networks a step": batch_size, "networks at once": at_once,
        **cost(model, config.training, step, device),
    }  # fmt: skip


def plan_train_diffusion(recipe: Recipe, latent_dim: int, known: Known, device: torch.device) -> dict[str, Any]:
    """Parameters by part, latents a step, bytes, seconds."""
    config = recipe.diffusion
    with META:
        model = LatentDiffusion(config, latent_dim=latent_dim, num_features=num_features(config, known, "diffusion"))
    batch_size = config.training.batch_size
    num_parts = math.ceil(batch_size / (config.micro_batch or batch_size))
    step = measure_denoising(model, batch_size, batch_size, latent_dim, num_parts)
    return {
        "model parameters": count(model), "of the denoiser": count(model.denoiser),
        "of the condition": count(model.condition), "checkpoints": len(known.seen), "latent_dim": latent_dim,
        "latents a step": batch_size,
        **cost(model, config.training, step, device),
    }  # fmt: skip


def latent_dim_of(recipe: Recipe, run: Path | None) -> int:
    """Width of the latents of the run's autoencoder; where there is none, of the recipe's."""
    if run is not None and (run / "autoencoder" / artifact.MANIFEST).is_file():
        return int(artifact.read(run / "autoencoder", "train-ae").facts["latent_dim"])
    return recipe.autoencoder.network.latent_dim


# --- what training costs ----------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What a training step takes."""

    flops: int
    """Floating-point operations."""
    peak_bytes: int
    """The most that it has alive, the gradients included and the weights not."""


def cost(model: nn.Module, config: TrainingConfig, step: Measured, device: torch.device) -> dict[str, Any]:
    """Steps, bytes and seconds of training a model on the meta device."""
    weights, beside = num_bytes(model), num_bytes_beside(model, config)
    seconds = config.num_steps * (step.flops / (EFFICIENCY * flops_per_second(device)) + STEP_SECONDS)
    sizes = {"model_bytes": weights, "optimizer_bytes": beside}
    peak = weights + beside + step.peak_bytes
    return {"steps": config.num_steps} | sizes | room(peak, device) | {"estimated_seconds": seconds}


def room(peak: int, device: torch.device) -> dict[str, Any]:
    """Whether `peak` bytes fit."""
    return {"peak_memory_bytes": peak, "device_memory_bytes": memory(device), "fits": fits(peak, device)}


def fits(peak: int, device: torch.device) -> bool:
    """Whether so many bytes leave some of the device's memory free."""
    return peak < ROOM * memory(device)


def inputs(model: RPG | LatentDiffusion, batch_size: int) -> tuple[Tensor | None, Tensor]:
    """Features (B, C) and states (B,) without memory."""
    features = None
    if model.condition is not None:
        features = torch.empty(batch_size, model.condition.num_features, device=META)
    return features, torch.zeros(batch_size, dtype=torch.int64, device=META)


def measure_denoising(
    model: RPG | LatentDiffusion, batch_size: int, num_rows: int, token_dim: int, num_parts: int = 1
) -> Measured:
    """`measure_step` of a diffusion.

    Args:
        model: On the meta device.
        batch_size: Networks B.
        num_rows: Tokens or latents K that are denoised.
        token_dim: Their width D.
        num_parts: Parts that they are cut into, one of which takes memory at a time.
    """
    features, state = inputs(model, math.ceil(batch_size / num_parts))
    here = math.ceil(num_rows / num_parts)  # k
    t = torch.zeros(here, dtype=torch.int64, device=META)  # (k,); as good for numbers of tokens

    def loss() -> Tensor:
        eps = torch.empty(num_rows, token_dim, device=META)[:here]  # (k, D); that of all parts is drawn together
        x_0 = torch.empty(here, token_dim, device=META)  # (k, D)
        mask = torch.empty(here, token_dim, dtype=torch.bool, device=META)  # (k, D)
        c = model.prototypes(features, state).flatten(0, 1)[t]  # (b, L, M) -> (k, M)
        return model.diffusion.loss_at(model.denoiser, x_0, c, mask, t, eps)

    part = measure_step(loss, again=num_parts > 1)
    return Measured(part.flops * num_parts, part.peak_bytes)


def measure_step(loss: Callable[[], Tensor], *, again: bool = False) -> Measured:
    """Take a training step without memory.

    Args:
        loss: Of a model on the meta device; makes its own data, which is counted.
        again: Whether the step goes on with other data while it keeps the gradients; then that is what is measured.
    """
    for _ in range(1 + again):
        with Meter() as meter:
            loss().backward()
    return Measured(meter.flops, meter.peak)


# --- evaluate ---------------------------------------------------------------------------------------------------------


def plan_evaluate(recipe: Recipe, known: Known) -> dict[str, Any]:
    """Groups and how many networks each has."""
    config, images = recipe.generate, {"test images": known.num_test}
    if (starts := recipe.evaluate.initialisation) is not None:
        images["trainings from each start"] = starts.num_seeds * (starts.num_tasks if known.has_bits else 1)
    count = config.num_networks(has_tasks=known.has_bits)
    if not known.has_bits:
        trivial = dict.fromkeys(resampling.GENERATORS, count) | {"average": 1}
        if known.subset or known.problem.target.batched:
            trivial["finetuned"] = count
        return {"trained, seen": len(known.seen), "generated, all": count, **trivial, **images}
    splits = ("seen", "validation", "unseen")
    num_tasks = {s: len({n.task_bits for n in known.networks if n.split == s}) for s in splits}
    num_tasks["unseen"] += config.num_others
    generated = num_tasks | {"seen": min(config.num_seen, num_tasks["seen"])}
    return {
        **{f"trained, {split}": known.num_trainings(split) for split in ("seen", "unseen")},
        **{f"generated, {split}": count * num for split, num in generated.items()},
        **dict.fromkeys(BASELINES, num_tasks["unseen"]), "settings of the MLP": len(recipe.evaluate.mlp), **images,
    }  # fmt: skip


# --- counting ---------------------------------------------------------------------------------------------------------


def count(module: nn.Module | None) -> int:
    """Trainable values."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def num_bytes(module: nn.Module) -> int:
    """Bytes of a state dict."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def num_bytes_beside(model: nn.Module, config: TrainingConfig) -> int:
    """What training keeps beside the weights: AdamW's two moments of each parameter, and the averaged model."""
    return 2 * 4 * count(model) + bool(config.ema_decay) * num_bytes(model)


class Meter(TorchDispatchMode):
    """Counts what a computation on the meta device does and has alive; what was there before does not count.

    Meta tensors are made and let go of as others would be, so that the peak is that of the computation itself, without
    the work space inside an operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.counter = FlopCounterMode(display=False)

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products and convolutions so far."""
        return int(self.counter.get_total_flops())

    def __enter__(self) -> "Meter":
        super().__enter__()  # type: ignore[no-untyped-call]
        self.counter.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.counter.__exit__(*raised)
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Do the operation; count the storages that it makes."""
        for storage in storages((arguments, keywords)):
            self.known.add(storage)
        made = operation(*arguments, **(keywords or {}))
        for storage in storages(made):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.let_go, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def let_go(self, num_bytes: int) -> None:
        """A storage is gone."""
        self.now -= num_bytes


def storages(values: object) -> list[torch.UntypedStorage]:
    """Of all tensors in `values`."""
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def flops_per_second(device: torch.device, size: int = 768, at_least: float = 0.1) -> float:
    """The rate of a matrix product of `size`, measured for about `at_least` seconds."""
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    (x @ x).sum().item()  # Warms up; `item` waits for the device.
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < at_least:
        (x @ x).sum().item()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - begun)
