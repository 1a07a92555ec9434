"""Training: resuming changes nothing, not even a bit; rates, average, weight decay and failures."""

import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from rpgcli import artifact, rng, training
from rpgcli.artifact import Artifact, Draft
from rpgcli.errors import ArtifactError, Interrupted, RpgError, UsageError
from rpgcli.progress import OnStep, Step, silent
from rpgcli.ranks import Ranks
from rpgcli.training import (
    CHECKPOINT,
    METRICS,
    Ahead,
    Trainer,
    TrainingConfig,
    fit,
    learning_rate,
    loader,
    moved,
    parts_of,
)
from tests.helpers import make, same_bits, stop_after

CONFIG = TrainingConfig(
    num_steps=8, learning_rate=0.05, weight_decay=0.1, ema_decay=0.6, checkpoint_every=3, log_every=2
)


class Model(nn.Module):
    """A little of everything: shared kinds of parameters, a buffer that moves, one that does not, no weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.free = nn.Parameter(torch.ones(2))
        self.free._no_weight_decay = True  # type: ignore[attr-defined]
        self.unused = nn.Parameter(torch.ones(1))
        self.register_buffer("position", torch.arange(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.free + self.position  # type: ignore[no-any-return]


def model() -> Model:
    with rng.initialising(0, "model"):
        return Model()


def loss_of(model: nn.Module) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        x = torch.randn(5, 3, generator=rng.stream(0, "batch", step))
        return (model(x) - x[:, :2]).square().mean()  # type: ignore[no-any-return]

    return loss


def train(target: Path, config: TrainingConfig = CONFIG, *, on_step: OnStep = silent, resume: bool = True) -> Artifact:
    def body(draft: Draft) -> Mapping[str, Any]:
        net = model()
        fitted = fit(net, loss_of(net), config, draft, dtype=torch.float32, on_step=on_step)
        assert not fitted.training
        draft.save_tensors("model.safetensors", fitted.state_dict())
        return {}

    return make(target, body, stage="train-rpg", resume=resume)


SCHEDULES = ["one-cycle", "cosine", "constant"]


@pytest.mark.parametrize("ema_decay", [0.6, 0.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_stopped_after_any_step_goes_on_bit_for_bit(tmp_path, schedule, ema_decay):
    config = CONFIG.model_copy(update={"schedule": schedule, "ema_decay": ema_decay})
    whole = train(tmp_path / "whole", config)
    for stop in range(1, 9):
        target = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            train(target, config, on_step=stop_after(stop))
        assert (target.with_name(f"{stop}.partial") / CHECKPOINT).exists()
        assert train(target, config).id == whole.id  # the id holds the hashes of model and metrics


def test_a_run_stopped_again_and_again_goes_on_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole")
    for _ in range(8):
        with pytest.raises(Interrupted):
            train(tmp_path / "again", on_step=stop_after(1))
    assert train(tmp_path / "again").id == whole.id


def test_how_often_checkpoints_are_written_changes_nothing(tmp_path):
    ids = {train(tmp_path / str(n), CONFIG.model_copy(update={"checkpoint_every": n})).id for n in (1, 3, 100)}
    assert len(ids) == 1


class Killed(BaseException):
    """kill -9: no handler runs."""


@pytest.mark.parametrize("write", range(1, 8))  # three checkpoints, each after its metrics
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_bit_for_bit(tmp_path, monkeypatch, write):
    whole = train(tmp_path / "whole")
    written: list[Path] = []

    def or_die(do: Callable[..., None]) -> Callable[..., None]:
        def call(path: Path, *args: Any) -> None:
            written.append(path)
            if len(written) == write:
                raise Killed
            do(path, *args)

        return call

    with monkeypatch.context() as patch:
        for name in ("write_bytes", "write_tensors"):
            patch.setattr(training, name, or_die(getattr(artifact, name)))
        patch.setattr(artifact, "_remove", lambda path: None)  # nothing is tidied up either
        with suppress(Killed):
            train(tmp_path / "killed")
    assert {path.name for path in written} <= {CHECKPOINT, METRICS}
    assert train(tmp_path / "killed").id == whole.id


def test_training_is_not_repeated_when_a_later_part_of_the_stage_is_stopped(tmp_path):
    steps: list[int] = []

    def body(fail: bool) -> Callable[[Draft], Mapping[str, Any]]:
        def run(draft: Draft) -> Mapping[str, Any]:
            net = model()
            on_step: OnStep = lambda step: steps.append(step.done)  # noqa: E731
            fitted = fit(net, loss_of(net), CONFIG, draft, dtype=torch.float32, on_step=on_step)
            if fail:
                raise Interrupted(2)
            draft.save_tensors("model.safetensors", fitted.state_dict())
            return {}

        return run

    with pytest.raises(Interrupted):
        make(tmp_path / "rpg", body(True), stage="train-rpg")
    found = make(tmp_path / "rpg", body(False), stage="train-rpg", resume=True)
    assert steps == list(range(1, 9))
    assert found.id == train(tmp_path / "whole").id
    assert not (found.path / CHECKPOINT).exists()


def test_metrics_hold_the_mean_loss_since_the_last_line(tmp_path):
    losses: list[float] = []

    def body(draft: Draft) -> Mapping[str, Any]:
        net = model()
        inner = loss_of(net)

        def loss(step: int) -> Tensor:
            value = inner(step)
            losses.append(float(value.detach()))
            return value

        fit(net, loss, CONFIG.model_copy(update={"log_every": 3}), draft, dtype=torch.float32, on_step=silent)
        return {}

    found = make(tmp_path / "rpg", body)
    lines = [json.loads(line) for line in found.file(METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    expected = [sum(losses[a:b]) / (b - a) for a, b in [(0, 3), (3, 6), (6, 8)]]
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-12)  # summed in float64
    assert [line["learning_rate"] for line in lines] == [learning_rate(CONFIG, s - 1) for s in (3, 6, 8)]


# --- a loss in parts --------------------------------------------------------------------------------------------------


def in_parts(net: nn.Module, given: list[float]) -> Callable[[int], Iterator[Tensor]]:
    """Half of a batch and then the other; their losses go into `given`."""

    def loss(step: int) -> Iterator[Tensor]:
        x = torch.randn(6, 3, generator=rng.stream(0, "batch", step)).to(next(net.parameters()))
        for part in x.split(3):
            value = (net(part) - part[:, :2]).square().mean() / 2
            given.append(float(value.detach()))
            yield value

    return loss


def test_the_parts_of_a_loss_make_one_step_on_their_sum():
    whole, parts = (Trainer(model().double().eval(), CONFIG) for _ in range(2))  # eval: batch norm mixes no vectors
    for step in range(4):
        whole.advance(torch.stack(list(in_parts(whole.model, [])(step))).sum())
        parts.advance(in_parts(parts.model, [])(step))
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.window, whole.window, rtol=1e-12, atol=0)


def test_a_run_in_parts_goes_on_bit_for_bit_and_logs_their_sum(tmp_path):
    losses: list[float] = []

    def train_in_parts(target: Path, on_step: OnStep = silent) -> Artifact:
        def body(draft: Draft) -> Mapping[str, Any]:
            net = model()
            fitted = fit(net, in_parts(net, losses), CONFIG, draft, dtype=torch.float32, on_step=on_step)
            draft.save_tensors("model.safetensors", fitted.state_dict())
            return {}

        return make(target, body, resume=True)

    whole = train_in_parts(tmp_path / "whole")
    lines = [json.loads(line) for line in whole.file(METRICS).read_text().splitlines()]
    assert len(losses) == 2 * CONFIG.num_steps
    assert [line["loss"] for line in lines] == pytest.approx(
        [sum(losses[4 * i : 4 * i + 4]) / 2 for i in range(4)], rel=1e-12
    )
    for stop in (1, 3, 5):
        with pytest.raises(Interrupted):
            train_in_parts(tmp_path / str(stop), stop_after(stop))
        assert train_in_parts(tmp_path / str(stop)).id == whole.id


def test_the_graph_of_a_part_is_gone_before_the_next_is_made(tmp_path):
    """And each part is made under autocast, its backward pass not."""

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(self)

    def unpack(saved: Saved) -> Tensor:
        under_autocast.append(("backward", torch.is_autocast_enabled("cpu")))
        return saved.tensor

    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    under_autocast: list[tuple[str, bool]] = []
    counts: list[int] = []

    def body(draft: Draft) -> Mapping[str, Any]:
        net = model()
        inner = loss_of(net)

        def loss(step: int) -> Iterator[Tensor]:
            for _ in range(3):
                counts.append(len(alive))
                under_autocast.append(("forward", torch.is_autocast_enabled("cpu")))
                with saved_tensors_hooks(Saved, unpack):
                    value = inner(step)
                counts.append(len(alive))
                yield value

        one = TrainingConfig(num_steps=1, ema_decay=0.0)
        fit(net, loss, one, draft, dtype=torch.bfloat16, on_step=silent)
        return {}

    make(tmp_path / "rpg", body)
    assert counts[1] > 0
    assert counts == [0, counts[1]] * 3
    assert set(under_autocast) == {("forward", True), ("backward", False)}


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_parts_of_all_ranks_are_the_batch_and_none_is_larger_than_asked(size, micro_batch):
    parts = [part for rank in range(size) for part in parts_of(11, micro_batch, Ranks(rank, size))]
    assert [i for part in parts for i in range(11)[part]] == list(range(11))
    assert all(0 < part.stop - part.start <= (micro_batch or 11) for part in parts)


def test_a_batch_smaller_than_the_number_of_ranks_is_refused():
    with pytest.raises(UsageError, match="a batch of 2 cannot be shared among 3 processes"):
        parts_of(2, None, Ranks(0, 3))


# --- drawing ahead ----------------------------------------------------------------------------------------------------


def test_steps_are_drawn_in_order_once_each_one_ahead_and_none_too_many():
    drawn: list[int] = []

    def draw(step: int) -> Tensor:
        drawn.append(step)
        return torch.randn(3, generator=rng.stream(0, step))

    ahead = Ahead(draw, 6)
    for step in range(2, 6):
        assert torch.equal(ahead(step), torch.randn(3, generator=rng.stream(0, step)))
        for future in ahead.begun.values():
            future.result()
        assert drawn == list(range(2, min(step + 2, 6)))
    assert torch.equal(ahead(0), torch.randn(3, generator=rng.stream(0, 0)))  # from the start again


def test_what_fails_in_the_thread_fails_in_its_step():
    def draw(step: int) -> int:
        return 1 // (step - 1)

    ahead = Ahead(draw, 3)
    assert ahead(0) == -1
    with pytest.raises(ZeroDivisionError):
        ahead(1)
    assert ahead(2) == 1


class Drawn(NamedTuple):
    x: Tensor
    missing: Tensor | None
    number: int


def test_a_loader_for_the_cpu_is_what_it_draws_from():
    def draw(step: int) -> Iterator[Drawn]:
        yield Drawn(torch.ones(2), None, step)

    assert loader(draw, torch.device("cpu"), 3) is draw
    twice = moved(next(draw(4)), lambda x: x * 2)
    assert (twice.x.tolist(), twice.missing, twice.number) == ([2, 2], None, 4)


@pytest.mark.gpu
def test_a_loader_for_a_gpu_brings_the_same_bytes():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def draw(step: int) -> Iterator[Drawn]:
        for part in range(2):
            yield Drawn(torch.randn(1000, generator=rng.stream(0, step, part)), None, step)

    load = loader(draw, torch.device("cuda"), 5)
    for step in range(5):
        for found, expected in zip(load(step), draw(step), strict=True):
            assert found.x.is_cuda
            assert torch.equal(found.x.cpu(), expected.x)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device_but_those_that_log_or_save(tmp_path):
    config = CONFIG.model_copy(update={"log_every": 4, "checkpoint_every": 6, "schedule": "constant"})
    counts: list[int] = []

    def body(draft: Draft) -> Mapping[str, Any]:
        net = model().eval()
        with Reads() as reads:  # type: ignore[no-untyped-call]
            fit(
                net, loss_of(net), config, draft, dtype=torch.float32,
                on_step=lambda step: counts.append(reads.count),
            )  # fmt: skip
        return {}

    make(tmp_path / "rpg", body)
    reads = [after - before for before, after in pairwise([0, *counts])]
    assert [step for step, count in enumerate(reads, 1) if count] == [4, 6, 8]


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(1, 2), (100, 2), (2, 100), (100, 100)])
def test_a_loss_that_is_not_finite_stops_with_its_step_and_leaves_the_checkpoint(
    tmp_path, bad, log_every, checkpoint_every
):
    config = CONFIG.model_copy(update={"log_every": log_every, "checkpoint_every": checkpoint_every})

    def body(draft: Draft) -> Mapping[str, Any]:
        net = model()
        inner = loss_of(net)
        fit(net, lambda s: inner(s) * (bad if s == 5 else 1), config, draft, dtype=torch.float32, on_step=silent)
        return {}

    with pytest.raises(RpgError, match=r"no longer finite at step 6\.") as error:
        make(tmp_path / "rpg", body)
    assert error.value.exit_code == 1
    partial = tmp_path / "rpg.partial"
    assert partial.exists() == (checkpoint_every == 2)
    if partial.exists():
        kept = artifact.read_tensors(partial / CHECKPOINT)
        assert int(kept["step"]) == 4
        assert all(bool(t.isfinite().all()) for t in kept.values() if t.is_floating_point())


def test_ctrl_c_does_not_save_a_broken_model(tmp_path):
    def body(draft: Draft) -> Mapping[str, Any]:
        net = model()
        inner = loss_of(net)
        fit(net, lambda s: inner(s) * math.nan, CONFIG, draft, dtype=torch.float32, on_step=stop_after(1))
        return {}

    with pytest.raises(RpgError, match="at step 1"):
        make(tmp_path / "rpg", body)
    assert not (tmp_path / "rpg.partial").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "rpg", on_step=stop_after(4))
    checkpoint = tmp_path / "rpg.partial" / CHECKPOINT
    tensors = artifact.read_tensors(checkpoint)
    artifact.write_tensors(checkpoint, {**tensors, "model.free": torch.ones(3)})
    with pytest.raises(ArtifactError, match="does not fit the model"):
        train(tmp_path / "rpg")
    checkpoint.write_bytes(b"x" * 100)
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        train(tmp_path / "rpg")


def test_float16_is_refused_before_the_first_step(tmp_path):
    def body(draft: Draft) -> Mapping[str, Any]:
        net = model()
        fit(net, loss_of(net), CONFIG, draft, dtype=torch.float16, on_step=silent)
        return {}

    with pytest.raises(UsageError, match="float16 cannot train"):
        make(tmp_path / "rpg", body)


def test_too_little_memory_says_what_to_lower_and_leaves_the_checkpoint(tmp_path):
    def body(draft: Draft) -> Mapping[str, Any]:
        net = model()
        inner = loss_of(net)

        def loss(step: int) -> Tensor:
            if step == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
            return inner(step)

        fit(net, loss, CONFIG, draft, dtype=torch.float32, on_step=silent)
        return {}

    with pytest.raises(RpgError, match=r"out of memory on cpu in step 5") as error:
        make(tmp_path / "rpg", body)
    assert "micro_batch" in str(error.value)
    assert int(artifact.read_tensors(tmp_path / "rpg.partial" / CHECKPOINT)["step"]) == 3


# --- the optimizer ----------------------------------------------------------------------------------------------------


def test_the_average_is_the_one_computed_by_hand():
    net, config = model(), CONFIG
    trainer = Trainer(net, config)
    loss = loss_of(net)
    average: dict[str, Tensor] = {}
    for step in range(8):
        trainer.advance(loss(step))
        now = {n: p.detach().double() for n, p in [*net.named_parameters(), *net.named_buffers()]}
        average = (
            {n: config.ema_decay * average[n] + (1 - config.ema_decay) * v for n, v in now.items()} if step else now
        )
    found = trainer.result.state_dict()
    for name, value in average.items():
        if found[name].is_floating_point():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-7)  # eight float32 steps
    assert torch.equal(found["position"], torch.arange(2.0))
    without = Trainer(model(), config.model_copy(update={"ema_decay": 0.0}))
    assert without.result is without.model


def test_weight_decay_spares_the_parameters_that_say_so():
    net = model()
    trainer = Trainer(net, CONFIG.model_copy(update={"schedule": "constant"}))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    trainer.advance(sum((p * 0).sum() for p in net.parameters()))  # type: ignore[arg-type]
    shrink = 1 - CONFIG.learning_rate * CONFIG.weight_decay
    for name, value in net.named_parameters():
        expected = before[name] * (1.0 if name == "free" else shrink)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_the_step_is_adamw_s_with_clipped_gradients():
    """The oracle: torch's plain AdamW on a copy, gradients scaled by hand."""
    ours, other = model().eval(), model().eval()  # batch norm in training hides biases: their gradients are noise
    config = CONFIG.model_copy(update={"gradient_clip": 0.01, "ema_decay": 0.0})
    trainer = Trainer(ours, config)
    groups = [{"params": [p for n, p in other.named_parameters() if n != "free"]}, {"params": [other.free]}]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    adamw = torch.optim.AdamW(groups, lr=1.0, weight_decay=config.weight_decay)
    for step in range(8):
        trainer.advance(loss_of(ours)(step))
        adamw.zero_grad()
        loss_of(other)(step).backward()
        gradients = [p.grad for p in other.parameters() if p.grad is not None]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        for gradient in gradients:
            gradient *= min(1.0, config.gradient_clip / (float(norm) + 1e-6))
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config, step)
        adamw.step()
    for a, b in zip(ours.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # fused and plain kernels round differently


@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates(schedule, num_steps):
    config = TrainingConfig(num_steps=num_steps, learning_rate=0.5, schedule=schedule, warmup=0.3)
    rates = [learning_rate(config, s) for s in range(num_steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    if schedule == "constant":
        assert set(rates) == {0.5}
        return
    top = rates.index(max(rates))
    assert top == 0 if schedule == "cosine" else top <= math.ceil(0.3 * num_steps)
    assert rates[: top + 1] == sorted(rates[: top + 1])  # up, then down
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if num_steps == 1000:
        assert max(rates) == pytest.approx(0.5)
        assert rates[-1] < 1e-5 * 0.5  # the last steps settle
        assert rates[0] == pytest.approx(0.5 if schedule == "cosine" else 0.5 * 0.04, rel=1e-3)


def test_progress_is_told_after_every_step(tmp_path):
    steps: list[Step] = []
    train(tmp_path / "rpg", on_step=steps.append)
    assert [(s.done, s.total) for s in steps] == [(i, 8) for i in range(1, 9)]
    shown = [s.facts for s in steps]
    assert all(math.isfinite(float(facts["loss"])) for facts in shown if facts)
    assert [bool(facts) for facts in shown] == [s.done >= CONFIG.log_every for s in steps]  # the mean since the last


def test_saving_and_loading_a_trainer_is_exact(tmp_path):
    net = model()
    trainer = Trainer(net, CONFIG)
    for step in range(3):
        trainer.advance(loss_of(net)(step))
    trainer.save(tmp_path / "a.safetensors")
    again = Trainer(model(), CONFIG)
    again.load(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert same_bits(again.result.state_dict(), trainer.result.state_dict())
