"""One `fit` for every trainable part: AdamW, learning-rate schedule, EMA, checkpoints, resume.

The loss of step s draws its random numbers from streams named by s, so the state of training is the model, its
average, the optimizer and s alone; a run stopped anywhere goes on bit for bit (same machine and threads). The last
checkpoint outlives training, so that a stage that is stopped later on does not train again.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rpgcli.artifact import Draft, read_tensors, write_bytes, write_tensors
from rpgcli.config import Config
from rpgcli.errors import ArtifactError, Interrupted, RpgError
from rpgcli.progress import OnStep, Step

Model = TypeVar("Model", bound=nn.Module)

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


class Trainer:
    """Model, average and optimizer, with the step they have reached."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.model, self.config, self.step = model, config, 0
        self.window = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        """Sum of the losses since the last line of metrics."""
        self.num_finite = torch.zeros((), dtype=torch.int64, device=self.window.device)
        """Steps up to the first loss that was not finite; on the device, so that no step waits for it."""
        decay = [p for p in model.parameters() if not getattr(p, "_no_weight_decay", False)]
        fixed = [p for p in model.parameters() if getattr(p, "_no_weight_decay", False)]
        groups: list[dict[str, Any]] = [{"params": decay}, {"params": fixed, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        average = get_ema_multi_avg_fn(config.ema_decay)
        self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if config.ema_decay else None

    @property
    def result(self) -> nn.Module:
        """The weights to keep: the average, or the last ones without EMA."""
        return self.model if self.average is None else self.average.module

    def advance(self, loss: Tensor | Iterator[Tensor]) -> None:
        """One optimizer step on `loss`, or on the sum of its parts, where the graph of one is gone before the next."""
        total = torch.zeros_like(self.window)
        self.optimizer.zero_grad(set_to_none=True)
        for part in [loss] if isinstance(loss, Tensor) else loss:
            part.backward()
            total += part.detach()
        self.window += total
        self.num_finite += total.isfinite() & (self.num_finite == self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1

    def check_finite(self) -> None:
        """Raise an RpgError if a loss or a weight was no longer finite."""
        broken = int(self.num_finite) < self.step
        if broken or not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise RpgError(
                f"the loss is no longer finite at step {int(self.num_finite) + broken}.",
                "Lower training.learning_rate, or set training.gradient_clip; the last checkpoint is intact.",
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


def fit(
    model: Model,
    loss: Callable[[int], Tensor | Iterator[Tensor]],
    config: TrainingConfig,
    draft: Draft,
    *,
    dtype: torch.dtype,
    on_step: OnStep,
) -> Model:
    """Train `model` in place of `draft`, from its checkpoint if there is one.

    Args:
        model: On its device, initialised.
        loss: Step number -> scalar loss of `model`; draws only from streams named by that number. Or an iterator over
            the losses of micro-batches that sum to it: the memory of one at a time.
        config: Length, rates, average.
        draft: Where checkpoints and `metrics.jsonl` go; committing it drops the last checkpoint.
        dtype: Of the forward pass; float32, or bfloat16 / float16 under autocast.
        on_step: Called after every step; may raise `Interrupted`, which leaves a checkpoint.

    Returns:
        The model to keep (averaged weights if asked for), in evaluation mode.

    Raises:
        RpgError: If the loss is no longer finite.
    """
    trainer = Trainer(model, config)
    checkpoint, metrics = draft.path / CHECKPOINT, draft.path / METRICS
    if checkpoint.exists():
        try:
            trainer.load(checkpoint)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{checkpoint} does not fit the model: {error}.", "Pass --force to start afresh."
            ) from None
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    lines = [line for line in lines if json.loads(line)["step"] <= trainer.step]
    device = next(model.parameters()).device
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def parts(step: int) -> Iterator[Tensor]:
        with autocast:
            value = loss(step)
        if isinstance(value, Tensor):
            yield value
            return
        while True:
            with autocast:  # Not around the whole loop: the backward pass between two parts runs without it.
                part = next(value, None)
            if part is None:
                return
            yield part

    def save() -> None:
        trainer.check_finite()
        write_bytes(metrics, "".join(line + "\n" for line in lines).encode())
        trainer.save(
            checkpoint
        )  # After the metrics: lines of later steps are dropped on reading, none is ever missing.
        draft.resumable = True

    model.train()
    facts: dict[str, float] = {}
    try:
        while trainer.step < config.num_steps:
            trainer.advance(parts(trainer.step))
            if trainer.step % config.log_every == 0 or trainer.step == config.num_steps:
                trainer.check_finite()
                facts = {"loss": float(trainer.window) / ((trainer.step - 1) % config.log_every + 1)}
                rate = learning_rate(config, trainer.step - 1)
                lines.append(json.dumps({"step": trainer.step, **facts, "learning_rate": rate}))
                trainer.window.zero_()
            if trainer.step % config.checkpoint_every == 0 or trainer.step == config.num_steps:
                save()
            on_step(Step(trainer.step, config.num_steps, facts))
    except Interrupted:
        save()
        raise
    draft.add(METRICS)
    return cast("Model", trainer.result.eval())
