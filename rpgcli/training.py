"""One `fit` for every trainable part: AdamW, learning-rate schedule, EMA, checkpoints, resume, several processes.

The loss of step s draws its random numbers from streams named by s, so the state of training is the model, its
average, the optimizer and s alone; a run stopped anywhere goes on bit for bit (same machine and threads). The last
checkpoint outlives training, so that a stage that is stopped later on does not train again.

A batch is cut into parts whose losses sum to its own: first into the shares of the ranks (`rpgcli.ranks`), then into
micro-batches, of which one at a time takes memory. All ranks hold the same weights, since they sum their gradients. So
neither changes the result but for the order of sums, and a run goes on with another number of either.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rpgcli.artifact import Draft, read_tensors, write_bytes, write_tensors
from rpgcli.config import Config
from rpgcli.errors import ArtifactError, Interrupted, RpgError, UsageError
from rpgcli.progress import OnStep, Step
from rpgcli.ranks import ALONE, Ranks

Model = TypeVar("Model", bound=nn.Module)
Part = TypeVar("Part", bound=tuple[Any, ...])
"""What the loss of a part of a batch is computed from, as a NamedTuple of tensors, numbers and None."""

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"


class TrainingConfig(Config):
    """How a part is trained."""

    num_steps: PositiveInt = 2000
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Checkpoints a step."""
    learning_rate: PositiveFloat = 2e-3
    """Highest learning rate of AdamW."""
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    """`one-cycle` warms up and then follows a cosine to 0; `cosine` starts at the top."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Fraction of the steps that `one-cycle` warms up."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's; never applied to the scan's own parameters (dt_bias, A_log, D)."""
    gradient_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 = no clipping."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Decay of the averaged weights that are kept; 0 = keep the last weights."""
    checkpoint_every: PositiveInt = 200
    """Steps between two checkpoints; the result does not depend on it."""
    log_every: PositiveInt = 20
    """Steps between two lines of metrics.jsonl; each holds the mean loss since the last."""


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of step 0, 1, ... num_steps - 1."""
    start = config.warmup * config.num_steps if config.schedule == "one-cycle" else 0.0
    if config.schedule == "constant":
        return config.learning_rate
    if step < start:
        return config.learning_rate * (0.04 + 0.96 * (1 - math.cos(math.pi * (step + 1) / (start + 1))) / 2)
    fraction = (step - start) / max(1.0, config.num_steps - start)
    return config.learning_rate * (1 + math.cos(math.pi * fraction)) / 2


# --- parts of a batch -------------------------------------------------------------------------------------------------


def parts_of(num: int, micro_batch: int | None, ranks: Ranks) -> list[slice]:
    """This rank's share of a batch of `num` networks, in micro-batches.

    Raises:
        UsageError: If there are fewer networks than ranks.
    """
    if num < ranks.size:
        raise UsageError(
            f"a batch of {num} cannot be shared among {ranks.size} processes.",
            "Raise training.batch_size, or start fewer processes.",
        )
    share = ranks.share(num)
    size = micro_batch or len(share)
    return [slice(start, min(start + size, share.stop)) for start in range(share.start, share.stop, size)]


def check_norm(micro_batch: int | None, network: object) -> None:
    """Raise a ValueError if a network (its config) does not treat the members of a batch each by itself."""
    if micro_batch is not None and getattr(network, "norm", None) == "batch":
        raise ValueError("micro_batch and norm: batch do not go together: the norm would mix each part by itself")


def loader(
    draw: Callable[[int], Iterator[Part]], device: torch.device, num_steps: int
) -> Callable[[int], Iterator[Part]]:
    """Bring to `device` what `draw` draws on the CPU for the parts of a step.

    For a GPU a thread draws one step ahead, into pinned memory, whose copies keep nobody waiting.
    """
    if device.type != "cuda":
        return draw
    index = torch.cuda.current_device() if device.index is None else device.index
    ahead = Ahead(
        lambda step: [moved(part, Tensor.pin_memory) for part in draw(step)],
        num_steps,
        begin=lambda: torch.cuda.set_device(index),
    )
    return lambda step: (moved(part, lambda x: x.to(device, non_blocking=True)) for part in ahead(step))


def moved(part: Part, move: Callable[[Tensor], Tensor]) -> Part:
    """`part` with each tensor moved."""
    return type(part)(*(move(x) if isinstance(x, Tensor) else x for x in part))


Drawn = TypeVar("Drawn")


class Ahead(Generic[Drawn]):
    """`draw(step)`, which a thread has begun during the step before.

    Args:
        draw: Its result depends on the step alone.
        num_steps: Step numbers end before this one.
        begin: Called once in the thread.
    """

    def __init__(self, draw: Callable[[int], Drawn], num_steps: int, begin: Callable[[], None] = lambda: None) -> None:
        self.draw, self.num_steps = draw, num_steps
        self.thread = ThreadPoolExecutor(1, "draw", initializer=begin)
        self.begun: dict[int, Future[Drawn]] = {}

    def __call__(self, step: int) -> Drawn:
        """What `step` draws."""
        current = self.begun.get(step) or self.thread.submit(self.draw, step)
        following = range(step + 1, min(step + 2, self.num_steps))
        self.begun = {s: self.thread.submit(self.draw, s) for s in following}
        return current.result()


# --- the state of training --------------------------------------------------------------------------------------------


class Trainer:
    """Model, average and optimizer, with the step they have reached; the same on all ranks."""

    def __init__(self, model: nn.Module, config: TrainingConfig, ranks: Ranks = ALONE) -> None:
        self.model, self.config, self.ranks, self.step = model, config, ranks, 0
        self.window = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        """Sum of the losses since the last line of metrics."""
        self.num_finite = torch.zeros((), dtype=torch.int64, device=self.window.device)
        """Steps up to the first loss that was not finite; on the device, so that no step waits for it."""
        self.kept = 0
        """Step of the last checkpoint; 0: there is none."""
        decay = [p for p in model.parameters() if not getattr(p, "_no_weight_decay", False)]
        fixed = [p for p in model.parameters() if getattr(p, "_no_weight_decay", False)]
        groups: list[dict[str, Any]] = [{"params": decay}, {"params": fixed, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.average = copy.deepcopy(model) if config.ema_decay else None

    @property
    def result(self) -> nn.Module:
        """The weights to keep: the average, or the last ones without EMA."""
        return self.model if self.average is None else self.average

    def advance(self, loss: Tensor | Iterator[Tensor]) -> None:
        """One optimizer step on `loss`, or on the sum of its parts, where the graph of one is gone before the next.

        Nothing here waits for the device.
        """
        total = torch.zeros_like(self.window)
        self.optimizer.zero_grad(set_to_none=True)
        for part in [loss] if isinstance(loss, Tensor) else loss:
            part.backward()
            total += part.detach()
        self.ranks.sum([total, *(p.grad for p in self.model.parameters() if p.grad is not None)])
        self.window += total
        self.num_finite += total.isfinite() & (self.num_finite == self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        if self.average is not None:
            self._update(self.average)
        self.step += 1

    @torch.no_grad()
    def _update(self, average: nn.Module) -> None:
        """Move the average towards the model; after the first step it is the model.

        Not torch's AveragedModel, which waits for the device in every step.
        """
        old, new = ([*module.parameters(), *module.buffers()] for module in (average, self.model))
        pairs = list(zip(old, new, strict=True))
        for a, b in pairs:
            if self.step == 0 or not a.is_floating_point():
                a.copy_(b)
        if self.step:
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            get_ema_multi_avg_fn(self.config.ema_decay)(*map(list, zip(*floats)), None)

    def check_finite(self) -> None:
        """Raise an RpgError if a loss or a weight was no longer finite."""
        broken = int(self.num_finite) < self.step
        if broken or not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            kept = f"The checkpoint of step {self.kept} is intact." if self.kept else "There is no checkpoint yet."
            raise RpgError(
                f"the loss is no longer finite at step {int(self.num_finite) + broken}.",
                f"Lower training.learning_rate, or set training.gradient_clip. {kept}",
            )

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        tensors = {"step": torch.tensor(self.step), "window": self.window}
        tensors |= {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for i, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in entry.items()}
        write_tensors(path, tensors)

    def load(self, path: Path) -> None:
        """Inverse of `save`."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        tensors = read_tensors(path)
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = value.clone()
        self.step = int(tensors["step"])
        self.kept = self.step
        self.window.copy_(tensors["window"])
        self.num_finite.fill_(self.step)
        self.model.load_state_dict(parts["model"])
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            i, _, key = name.partition(".")
            state.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Compute in `dtype` where that is safe; nothing changes for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def fit(
    model: Model,
    loss: Callable[[int], Tensor | Iterator[Tensor]],
    config: TrainingConfig,
    draft: Draft,
    *,
    dtype: torch.dtype,
    on_step: OnStep,
    ranks: Ranks = ALONE,
) -> Model:
    """Train `model` in place of `draft`, from its checkpoint if there is one.

    Args:
        model: On its device, initialised.
        loss: Step number -> scalar loss of `model`; draws only from streams named by that number. Or an iterator over
            the losses of this rank's parts of the batch, which sum to it over all ranks: the memory of one at a time.
        config: Length, rates, average.
        draft: Where checkpoints and `metrics.jsonl` go; committing it drops the last checkpoint.
        dtype: Of the forward pass; float32, or bfloat16 under autocast.
        on_step: Called after every step with the last loss known; may raise `Interrupted`, which leaves a checkpoint
            and stops all ranks.
        ranks: The processes that train together; the first one writes.

    Returns:
        The model to keep (averaged weights if asked for), in evaluation mode.

    Raises:
        UsageError: If the dtype, or the model with several ranks, cannot be trained.
        RpgError: If the loss is no longer finite, or the memory does not suffice.
    """
    if dtype == torch.float16:
        raise UsageError(
            "float16 cannot train: small gradients become 0 in it.",
            "Pass --dtype bfloat16, which has the range of float32.",
        )
    if ranks.size > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UsageError(
            "batch norm mixes the networks of a batch, which several processes share.",
            "Set norm to group or instance, or train with one process.",
        )
    trainer = Trainer(model, config, ranks)
    checkpoint, metrics = draft.path / CHECKPOINT, draft.path / METRICS
    if checkpoint.exists():
        try:
            trainer.load(checkpoint)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{checkpoint} does not fit the model: {error}.", "Pass --force to start afresh."
            ) from None
    lines = metrics.read_text(errors="replace").splitlines() if metrics.exists() else []
    try:
        lines = [line for line in lines if json.loads(line)["step"] <= trainer.step]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ArtifactError(f"{metrics} is damaged.", "Pass --force to start afresh.") from None
    ranks.agree({"checkpoint at step": str(trainer.step)})
    ranks.copy_first(model.state_dict().values())  # Another kind of processor may have drawn other last bits.
    device = next(model.parameters()).device
    context = autocast(device, dtype)

    def parts(step: int) -> Iterator[Tensor]:
        with context:
            value = loss(step)
        if isinstance(value, Tensor):
            yield value
            return
        while True:
            with context:  # Not around the whole loop: the backward pass between two parts runs without it.
                part = next(value, None)
            if part is None:
                return
            yield part

    def save() -> None:
        trainer.check_finite()
        trainer.kept = trainer.step
        if not ranks.first:
            return
        write_bytes(metrics, "".join(line + "\n" for line in lines).encode())
        trainer.save(
            checkpoint
        )  # After the metrics: lines of later steps are dropped on reading, none is ever missing.
        draft.resumable = True

    model.train()
    facts: dict[str, float] = {}
    try:
        while trainer.step < config.num_steps:
            try:
                trainer.advance(parts(trainer.step))
            except torch.OutOfMemoryError as error:
                raise RpgError(
                    f"out of memory on {device} in step {trainer.step + 1}: {str(error).partition('.')[0]}.",
                    "Set micro_batch (networks that pass at once) or tokens_per_step, core.recompute: true,",
                    "or pass --dtype bfloat16. The last checkpoint is intact.",
                ) from None
            if trainer.step % config.log_every == 0 or trainer.step == config.num_steps:
                trainer.check_finite()
                facts = {"loss": float(trainer.window) / ((trainer.step - 1) % config.log_every + 1)}
                rate = learning_rate(config, trainer.step - 1)
                lines.append(json.dumps({"step": trainer.step, **facts, "learning_rate": rate}))
                trainer.window.zero_()
            if trainer.step % config.checkpoint_every == 0 or trainer.step == config.num_steps:
                save()
            report(on_step, Step(trainer.step, config.num_steps, facts), ranks)
    except Interrupted:
        save()
        raise
    if ranks.first:
        draft.add(METRICS)
    return cast("Model", trainer.result.eval())


def report(on_step: OnStep, step: Step, ranks: Ranks) -> None:
    """Tell `on_step` of a step; what interrupts one rank interrupts all of them after the same step."""
    interrupted = None
    try:
        on_step(step)
    except Interrupted as error:
        interrupted = error
    if code := ranks.most(interrupted.exit_code if interrupted is not None else 0):
        raise interrupted or Interrupted(code - 128, "Type the same command with --resume to go on.")
