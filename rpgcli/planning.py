"""What a stage would do, without doing it: `--dry-run`.

What the stages before have made is read; the rest is foreseen from the recipe. Networks are built on the `meta` device,
so that a plan of any size takes no memory. Times are rough: floating-point operations, counted on that device, over the
rate of a matrix product measured now, and a fixed cost of every step.

The names of a plan's entries carry their units: `..._bytes`, `..._seconds`, `..._fraction`; the others are counts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from rpgcli import artifact
from rpgcli.autoencoder import PCA_COLUMNS, NoisyAutoencoder
from rpgcli.collection import blocks, make_plan, subset
from rpgcli.diagnosis import memory
from rpgcli.errors import UsageError
from rpgcli.layout import Layout, make_layout
from rpgcli.methods import resampling
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
ROOM = 0.9
"""Share of the memory that a stage may fill."""
BASELINES = ("majority", "average", "nearest", "ridge", "ridge-pairs", "mlp")


@dataclass(frozen=True)
class Known:
    """The zoo that a stage builds on: as it is, or as the recipe foresees it."""

    problem: ProblemConfig
    num_classes: int
    channels: int
    size: tuple[int, int]
    num_outputs: int
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
    stage: str, recipe: Recipe, *, run: Path | None, zoo: Path | None, data_root: Path | None, device: torch.device
) -> dict[str, Any]:
    """Counts, parameters, bytes and rough seconds of a stage.

    Args:
        stage: collect, tokenize, train-ae, train-diffusion, train-rpg or evaluate.
        recipe: Resolved.
        run: Folder whose artifacts the stage would build on; None for a recipe by itself.
        zoo: Where the zoo lies; while it is not there it is foreseen from the recipe.
        data_root: Folder of the data set's files, needed without a zoo.
        device: What the stage would run on.

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
    return entries | plan_train_rpg(recipe, layout, known, device)


def known_of(recipe: Recipe, zoo: Path | None, data_root: Path | None) -> Known:
    """Read the zoo, or foresee it."""
    if zoo is not None and (zoo / artifact.MANIFEST).is_file():
        found = Zoo.read(zoo)
        facts, config = found.artifact.facts, ProblemConfig.of(found.artifact.section)
        return Known(
            config, len(facts["classes"]), facts["channels"], tuple(facts["size"]), facts["num_outputs"],
            facts["num_images"]["test"], found.networks, facts.get("parameters", ()),
        )  # fmt: skip
    config = recipe.problem()
    problem = Problem(config, data_root, False, torch.device("cpu"))
    data = problem.dataset
    model = target(config, data.channels, data.size, problem.num_outputs)
    return Known(
        config, data.num_classes, data.channels, data.size, problem.num_outputs, len(data.test.labels),
        foreseen(problem, recipe), subset(model, recipe.collect),
    )  # fmt: skip


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
    problem = Problem(recipe.problem(), data_root, False, torch.device("cpu"))
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
    flops = count_flops(lambda: model(image).sum().backward()) / 2
    efficiency = BATCHED_EFFICIENCY if recipe.target.batched else EFFICIENCY
    seconds = flops * num_images * passes / (efficiency * flops_per_second(device))
    seconds += STEP_SECONDS * (start_steps + len(groups) * num_steps)
    varying = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name in names)
    size = num_networks * varying + num_bytes(model) if names else num_networks * num_bytes(model)
    return {
        "trainings": len(trainings), "networks": num_networks, "blocks": len(groups),
        "parameters": count(model), "of the subset": sum(model.get_parameter(name).numel() for name in names),
        "training images": num_images, "steps of the shared start": start_steps, "steps of each block": num_steps,
        "zoo_bytes": size, "estimated_seconds": seconds,
    }  # fmt: skip


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
    state = target(known.problem, known.channels, known.size, known.num_outputs).state_dict()
    return make_layout(
        state,
        token_dim=recipe.tokens.token_dim,
        granularity=recipe.tokens.granularity,
        log_variance=recipe.tokens.standardise != "none",
        shared=state.keys() - set(known.subset) if known.subset else (),
    )


# --- train-rpg --------------------------------------------------------------------------------------------------------


def plan_train_rpg(recipe: Recipe, layout: Layout, known: Known, device: torch.device) -> dict[str, Any]:
    """Parameters by part, tokens a step, bytes, seconds."""
    config, num_seen = recipe.rpg, len(known.seen)
    num_runs = len({network.run for network in known.seen})
    num_states = {"run": num_runs, "checkpoint": num_seen, "none": 1}[config.state]
    with META:
        core = config.core
        plain = core.model_copy(update={"backend": "torch"}) if core.kind == "mamba2" else core
        model = RPG(
            config.model_copy(update={"core": plain}), *layout.indices(),
            token_dim=layout.token_dim, num_features=num_features(config, known, "rpg"), num_states=num_states,
        )  # fmt: skip
    training = config.training
    num_rows = min(
        config.tokens_per_step or training.batch_size * layout.num_tokens, training.batch_size * layout.num_tokens
    )
    flops, kept = measure_denoising(model, training.batch_size, num_rows, layout.token_dim)
    position = model.position.numel() if isinstance(model.position, nn.Parameter) else 0
    return {
        "model parameters": count(model), "of the core": count(model.core), "of the denoiser": count(model.denoiser),
        "of the condition": count(model.condition), "of the states": count(model.state), "of positions": position,
        "checkpoints": num_seen, "tokens": layout.num_tokens, "token_dim": layout.token_dim,
        "networks a step": training.batch_size, "tokens denoised a step": num_rows,
        **cost(model, training, flops, kept + 4 * 4 * num_rows * layout.token_dim, device),  # x_0, eps, x_t, output.
    }  # fmt: skip


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
    x = torch.empty(at_once, num_values, device=META)  # (b, P)
    flops, kept = measure_step(model, lambda: (model.decode(model.encode(x)) - x).square().mean())
    in_memory = num_seen * num_values if num_seen * num_values <= AT_ONCE else 0
    return {
        **facts, "model parameters": count(model), "of the encoder": count(model.encoder),
        "of the decoder": count(model.decoder), "networks a step": batch_size, "networks at once": at_once,
        **cost(model, config.training, flops * batch_size / at_once, kept + 4 * (in_memory + 4 * x.numel()), device),
    }  # fmt: skip


def plan_train_diffusion(recipe: Recipe, latent_dim: int, known: Known, device: torch.device) -> dict[str, Any]:
    """Parameters by part, latents a step, bytes, seconds."""
    config = recipe.diffusion
    with META:
        model = LatentDiffusion(config, latent_dim=latent_dim, num_features=num_features(config, known, "diffusion"))
    batch_size = config.training.batch_size
    flops, kept = measure_denoising(model, batch_size, batch_size, latent_dim)
    return {
        "model parameters": count(model), "of the denoiser": count(model.denoiser),
        "of the condition": count(model.condition), "checkpoints": len(known.seen), "latent_dim": latent_dim,
        "latents a step": batch_size,
        **cost(model, config.training, flops, kept + 4 * 4 * batch_size * latent_dim, device),
    }  # fmt: skip


def latent_dim_of(recipe: Recipe, run: Path | None) -> int:
    """Width of the latents of the run's autoencoder; where there is none, of the recipe's."""
    if run is not None and (run / "autoencoder" / artifact.MANIFEST).is_file():
        return int(artifact.read(run / "autoencoder", "train-ae").facts["latent_dim"])
    return recipe.autoencoder.network.latent_dim


# --- what training costs ----------------------------------------------------------------------------------------------


def cost(model: nn.Module, config: TrainingConfig, flops: float, kept: int, device: torch.device) -> dict[str, Any]:
    """Steps, bytes and seconds of training.

    Args:
        model: On the meta device.
        config: Steps, average.
        flops: Floating-point operations of a step.
        kept: Bytes of a step's data and of what autograd keeps of it.
        device: What it would run on.
    """
    weights = num_bytes(model)
    copies = 4 + bool(config.ema_decay)  # Weights, gradients, AdamW's two moments, the average.
    seconds = config.num_steps * (flops / (EFFICIENCY * flops_per_second(device)) + STEP_SECONDS)
    sizes = {"model_bytes": weights, "optimizer_bytes": (copies - 2) * weights}
    return {"steps": config.num_steps} | sizes | room(copies * weights + kept, device) | {"estimated_seconds": seconds}


def room(peak: int, device: torch.device) -> dict[str, Any]:
    """Whether `peak` bytes fit."""
    there = memory(device)
    return {"peak_memory_bytes": peak, "device_memory_bytes": there, "fits": peak < ROOM * there}


def measure_denoising(model: RPG | LatentDiffusion, batch_size: int, num_rows: int, token_dim: int) -> tuple[int, int]:
    """`measure_step` of a diffusion.

    Args:
        model: On the meta device.
        batch_size: Networks B.
        num_rows: Tokens or latents K that are denoised.
        token_dim: Their width D.
    """
    features = None
    if model.condition is not None:
        features = torch.empty(batch_size, model.condition.num_features, device=META)
    state = torch.zeros(batch_size, dtype=torch.int64, device=META)
    x_t, t = torch.empty(num_rows, token_dim, device=META), torch.zeros(num_rows, dtype=torch.int64, device=META)

    def loss() -> Tensor:
        c = model.prototypes(features, state).flatten(0, 1)[:num_rows]  # (B, L, M) -> (K, M)
        error: Tensor = model.denoiser(x_t, t, model.denoiser.embed(c)).square().mean()
        return error

    return measure_step(model, loss)


def measure_step(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Floating-point operations of a training step, and bytes that autograd keeps for its backward pass."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor  # Held, so that no later tensor gets the same storage.
        return tensor

    def step() -> None:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()

    flops = count_flops(step)
    return flops, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# --- evaluate ---------------------------------------------------------------------------------------------------------


def plan_evaluate(recipe: Recipe, known: Known) -> dict[str, Any]:
    """Groups and how many networks each has."""
    config, images = recipe.generate, {"test images": known.num_test}
    count = config.num_networks(has_tasks=known.has_bits)
    if not known.has_bits:
        trivial = dict.fromkeys(resampling.GENERATORS, count) | {"average": 1}
        if known.subset or known.problem.target.batched:
            trivial["finetuned"] = count
        return {"trained, seen": len(known.seen), "generated, all": count, **trivial, **images}
    splits = ("seen", "validation", "unseen")
    num_tasks = {s: len({n.task_bits for n in known.networks if n.split == s}) for s in splits}
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


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def flops_per_second(device: torch.device, size: int = 768, at_least: float = 0.1) -> float:
    """The rate of a matrix product of `size`, measured for about `at_least` seconds."""
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    (x @ x).sum().item()  # Warms up; `item` waits for the device.
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < at_least:
        (x @ x).sum().item()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - begun)
