"""What a stage would do, without doing it: `--dry-run`.

Networks are built on the `meta` device, so that a plan of any size takes no memory. Times are rough: floating-point
operations, counted on that device, over the rate of a matrix product measured now, and a fixed cost of every step.

The names of a plan's entries carry their units: `..._bytes`, `..._seconds`, `..._fraction`; the others are counts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from rpgcli import artifact
from rpgcli.collection import blocks, make_plan
from rpgcli.diagnosis import memory
from rpgcli.errors import UsageError
from rpgcli.layout import Layout, make_layout
from rpgcli.methods.rpg import RPG
from rpgcli.problem import Problem
from rpgcli.recipe import Recipe, section

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
class Shapes:
    """What must be known of a data set to plan on it."""

    num_classes: int
    channels: int
    size: tuple[int, int]
    num_outputs: int
    num_test: int


def plan(stage: str, recipe: Recipe, *, zoo: Path, data_root: Path | None, device: torch.device) -> dict[str, Any]:
    """Counts, parameters, bytes and rough seconds of a stage.

    Args:
        stage: collect, tokenize, train-rpg or evaluate.
        recipe: Resolved.
        zoo: The zoo, if it is there already: then the data set need not be.
        data_root: Folder of the data set's files.
        device: What the stage would run on.

    Raises:
        DataError: If neither the zoo nor the data set is there.
    """
    entries: dict[str, Any] = {"recipe": recipe.name, "stage": stage}
    if stage == "collect":
        return entries | plan_collect(recipe, data_root, device)
    shapes = shapes_of(recipe, zoo, data_root)
    make = {"tokenize": plan_tokenize, "train-rpg": plan_train, "evaluate": plan_evaluate}[stage]
    return entries | make(recipe, shapes, device)


def shapes_of(recipe: Recipe, zoo: Path, data_root: Path | None) -> Shapes:
    """From the zoo, if there is one for this problem, else from the data set."""
    if (zoo / artifact.MANIFEST).is_file():
        found = artifact.read(zoo, "collect")
        asked = section(recipe, "dataset", "task", "target")
        if {name: found.section.get(name) for name in asked} == asked:
            f = found.facts
            return Shapes(len(f["classes"]), f["channels"], tuple(f["size"]), f["num_outputs"], f["num_images"]["test"])
    data = recipe.dataset.load(data_root, False)
    outputs = recipe.task.num_outputs(data.num_classes)
    return Shapes(data.num_classes, data.channels, data.size, outputs, len(data.test.labels))


def target(recipe: Recipe, channels: int, size: tuple[int, int], num_outputs: int) -> nn.Module:
    """The target network without memory."""
    with META:
        return recipe.target.build(channels, size, num_outputs)


# --- collect ----------------------------------------------------------------------------------------------------------


def plan_collect(recipe: Recipe, data_root: Path | None, device: torch.device) -> dict[str, Any]:
    """Trainings, networks, steps, bytes, seconds."""
    problem = Problem(recipe.problem(), data_root, False, torch.device("cpu"))
    config, data = recipe.collect, problem.dataset
    trainings = make_plan(problem, config, recipe.seed)
    groups = blocks(problem, config, trainings)
    each = config.num_checkpoints if config.kind == "trajectory" else config.snapshots
    num_networks = sum(each if training.split == "seen" else 1 for training in trainings)
    model = target(recipe, data.channels, data.size, problem.num_outputs)
    num_images = len(data.train.labels)
    parts = [config.training, config.save] if config.kind == "trajectory" else [config.training]
    num_steps = sum(part.num_steps(num_images) for part in parts)
    start = config.kind == "tasks" and config.pretrained is None
    start_steps = config.pretrain.num_steps(num_images) if config.kind == "tasks" and start else 0

    image = torch.empty(2, data.channels, *problem.input_size, device=META)  # Two: batch norm refuses a single one.
    flops = count_flops(lambda: model(image).sum().backward()) / 2
    passes = len(trainings) * sum(part.epochs for part in parts)
    passes += config.pretrain.epochs if config.kind == "tasks" and start else 0
    efficiency = BATCHED_EFFICIENCY if recipe.target.batched else EFFICIENCY
    seconds = flops * num_images * passes / (efficiency * flops_per_second(device))
    seconds += STEP_SECONDS * (start_steps + len(groups) * num_steps)
    return {
        "trainings": len(trainings), "networks": num_networks, "blocks": len(groups),
        "parameters": count(model), "training images": num_images,
        "steps of the shared start": start_steps, "steps of each block": num_steps,
        "zoo_bytes": num_networks * num_bytes(model), "estimated_seconds": seconds,
    }  # fmt: skip


# --- tokenize ---------------------------------------------------------------------------------------------------------


def plan_tokenize(recipe: Recipe, shapes: Shapes, device: torch.device) -> dict[str, Any]:
    """Checkpoints, tokens, padding, bytes."""
    layout = layout_of(recipe, shapes)
    num_seen, slots = num_checkpoints(recipe), layout.num_tokens * layout.token_dim
    return {
        "checkpoints": num_seen, "tokens": layout.num_tokens, "token_dim": layout.token_dim,
        "parameters": layout.num_parameters, "carried as they are": sum(spec.numel for spec in layout.constants),
        "padding_fraction": 1 - layout.num_parameters / slots, "tokens_bytes": 4 * slots * num_seen,
    }  # fmt: skip


def layout_of(recipe: Recipe, shapes: Shapes) -> Layout:
    """The layout that the target's checkpoints would get."""
    state = target(recipe, shapes.channels, shapes.size, shapes.num_outputs).state_dict()
    config = recipe.tokens
    return make_layout(
        state,
        token_dim=config.token_dim,
        granularity=config.granularity,
        log_variance=config.standardise != "none",
    )


def num_checkpoints(recipe: Recipe) -> int:
    """Seen checkpoints of the zoo."""
    config = recipe.collect
    if config.kind == "tasks":
        return config.runs * config.num_seen * config.snapshots
    return config.num_networks * config.snapshots if config.kind == "seeds" else config.runs * config.num_checkpoints


# --- train-rpg --------------------------------------------------------------------------------------------------------


def plan_train(recipe: Recipe, shapes: Shapes, device: torch.device) -> dict[str, Any]:
    """Parameters by part, tokens a step, bytes, seconds."""
    layout, config = layout_of(recipe, shapes), recipe.rpg
    has_bits = recipe.task.kind == "binary-subset"
    if config.condition == "task-bits" and not has_bits:
        raise UsageError("rpg.condition is task-bits, but task.kind has no task bits.", "Set it to none or auto.")
    num_bits = shapes.num_classes if has_bits and config.condition != "none" else 0
    zoo = recipe.collect
    num_runs = zoo.num_networks if zoo.kind == "seeds" else zoo.runs
    num_states = {"run": num_runs, "checkpoint": num_checkpoints(recipe), "none": 1}[config.state]
    with META:
        core = config.core
        plain = core.model_copy(update={"backend": "torch"}) if core.kind == "mamba2" else core
        model = RPG(
            config.model_copy(update={"core": plain}), *layout.indices(),
            token_dim=layout.token_dim, num_bits=num_bits, num_states=num_states,
        )  # fmt: skip
    batch_size, num_steps = config.training.batch_size, config.training.num_steps
    num_rows = min(config.tokens_per_step or batch_size * layout.num_tokens, batch_size * layout.num_tokens)

    flops, kept = measure_step(model, batch_size, num_rows, layout.token_dim)
    weights = num_bytes(model)
    copies = 4 + bool(config.training.ema_decay)  # Weights, gradients, AdamW's two moments, the average.
    peak = copies * weights + kept + 4 * 4 * num_rows * layout.token_dim  # x_0, eps, x_t, output.
    seconds = num_steps * (flops / (EFFICIENCY * flops_per_second(device)) + STEP_SECONDS)
    position = model.position.numel() if isinstance(model.position, nn.Parameter) else 0
    return {
        "model parameters": count(model), "of the core": count(model.core), "of the denoiser": count(model.denoiser),
        "of the condition": count(model.condition), "of the states": count(model.state), "of positions": position,
        "checkpoints": num_checkpoints(recipe), "tokens": layout.num_tokens, "token_dim": layout.token_dim,
        "networks a step": batch_size, "tokens denoised a step": num_rows, "steps": num_steps,
        "model_bytes": weights, "optimizer_bytes": (copies - 2) * weights, "peak_memory_bytes": peak,
        "device_memory_bytes": memory(device), "fits": peak < ROOM * memory(device), "estimated_seconds": seconds,
    }  # fmt: skip


def measure_step(model: RPG, batch_size: int, num_rows: int, token_dim: int) -> tuple[int, int]:
    """Floating-point operations of a training step, and bytes that autograd keeps for its backward pass.

    Args:
        model: On the meta device.
        batch_size: Networks B.
        num_rows: Tokens K that are denoised.
        token_dim: Slots D of a token.
    """
    bits = torch.empty(batch_size, model.condition.num_bits, device=META) if model.condition is not None else None
    state = torch.zeros(batch_size, dtype=torch.int64, device=META)
    x_t, t = torch.empty(num_rows, token_dim, device=META), torch.zeros(num_rows, dtype=torch.int64, device=META)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor  # Held, so that no later tensor gets the same storage.
        return tensor

    def step() -> None:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            c = model.prototypes(bits, state)  # (B, L, M)
            c = c.flatten(0, 1)[:num_rows]  # (K, M)
            loss = model.denoiser(x_t, t, model.denoiser.embed(c)).square().mean()
        loss.backward()

    flops = count_flops(step)
    return flops, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# --- evaluate ---------------------------------------------------------------------------------------------------------


def plan_evaluate(recipe: Recipe, shapes: Shapes, device: torch.device) -> dict[str, Any]:
    """Groups and how many networks each has."""
    zoo, config, images = recipe.collect, recipe.generate, {"test images": shapes.num_test}
    if zoo.kind != "tasks":
        seen = num_checkpoints(recipe)
        count = config.num_networks(conditional=False)
        return {"trained, seen": seen, "generated, all": count, "average": 1, **images}
    count = config.num_networks(conditional=True)
    generated = {"seen": min(config.num_seen, zoo.num_seen), "validation": zoo.num_validation, "unseen": zoo.num_unseen}
    return {
        "trained, seen": zoo.runs * zoo.num_seen, "trained, unseen": zoo.num_unseen,
        **{f"generated, {split}": count * num for split, num in generated.items()},
        **dict.fromkeys(BASELINES, zoo.num_unseen), "settings of the MLP": len(recipe.evaluate.mlp), **images,
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
