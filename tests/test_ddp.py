"""Several processes train as one does: the same losses, checkpoints that any number of processes goes on from, one end.

As a program (`python -m tests.test_ddp FOLDER`) this file is one of the ranks.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rpgcli import artifact, command
from rpgcli.artifact import read_tensors
from rpgcli.autoencoder import ConvAutoencoderConfig, MlpAutoencoderConfig, NoisyAutoencoder
from rpgcli.conditions import Condition
from rpgcli.cores.mamba2 import Mamba2Config
from rpgcli.denoisers.mlp import MlpDenoiserConfig
from rpgcli.errors import Interrupted, RpgError, UsageError
from rpgcli.methods.pdiff import (
    AutoencoderStageConfig,
    LatentDiffusionConfig,
    Vectors,
    autoencoder_loss,
    build_autoencoder,
    build_diffusion,
    diffusion_loss,
)
from rpgcli.methods.rpg import RpgConfig, build, make_loss
from rpgcli.pipeline import Run
from rpgcli.progress import OnStep, silent
from rpgcli.ranks import Ranks, Released, here
from rpgcli.tokens import TokenStore
from rpgcli.training import CHECKPOINT, METRICS, TrainingConfig, fit
from tests.helpers import draw, stop_after, token_store

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
BITS = Condition("task-bits", 4)
TRAINING = TrainingConfig(num_steps=8, batch_size=5, learning_rate=2e-3, ema_decay=0.8, log_every=1, checkpoint_every=3)
"""Five networks: the shares of two ranks differ."""
RPG = RpgConfig(
    core=Mamba2Config(d_model=32, headdim=8, d_state=8), denoiser=MlpDenoiserConfig(width=32, depth=1),
    training=TRAINING,
)  # fmt: skip


def rpg_loss(config: RpgConfig, store: TokenStore, ranks: Ranks) -> tuple[nn.Module, Any]:
    model = build(config, store, BITS)
    return model, make_loss(model, config, store, BITS, CPU, ranks)


def ae_loss(config: AutoencoderStageConfig, store: TokenStore, ranks: Ranks) -> tuple[nn.Module, Any]:
    vectors = Vectors(store)
    model = build_autoencoder(config, vectors.num_parameters)
    assert isinstance(model, NoisyAutoencoder)
    return model, autoencoder_loss(model, config, vectors, range(6), CPU, ranks)


def diffusion(config: LatentDiffusionConfig, store: TokenStore, ranks: Ranks) -> tuple[nn.Module, Any]:
    model = build_diffusion(config, draw(20, 6), BITS)
    return model, diffusion_loss(model, config, draw(20, 6), draw(20, 4), CPU, ranks)


PARTS: dict[str, tuple[Callable[..., tuple[nn.Module, Any]], Any]] = {
    "rpg": (rpg_loss, RPG),
    "some-tokens": (rpg_loss, RPG.model_copy(update={"tokens_per_step": 7, "micro_batch": 2})),
    "autoencoder": (
        ae_loss,
        AutoencoderStageConfig(network=MlpAutoencoderConfig(latent_dim=4, widths=(8,)), training=TRAINING),
    ),
    "diffusion": (diffusion, LatentDiffusionConfig(training=TRAINING, condition_dropout=0.3, micro_batch=2)),
}


def train(folder: Path, name: str, part: str, ranks: Ranks, *, on_step: OnStep = silent) -> None:
    """Train `part` into `folder/name`; a follower is released."""
    store = TokenStore(artifact.read(folder / "tokens", "tokenize"))
    make, config = PARTS[part]
    run = Run(folder, resume=True, ranks=ranks)
    with run.draft(name, "train-rpg", {"part": part}, {}) as draft:
        model, loss = make(config, store, ranks)
        fitted = fit(model, loss, config.training, draft, dtype=torch.float32, on_step=on_step, ranks=ranks)
        if ranks.first:
            draft.save_tensors("model.safetensors", fitted.state_dict())
            draft.commit({}, {})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / METRICS).read_text().splitlines()]


# --- a rank -----------------------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """What each of two ranks does; what it finds goes into `folder/rank-R.json`."""
    ranks = here().join(CPU)
    found: dict[str, Any] = {"device threads": torch.get_num_threads()}
    for part in PARTS:
        train(folder, f"together-{part}", part, ranks)

    try:  # A signal that only one of them gets stops both after the same step.
        train(folder, "stopped", "rpg", ranks, on_step=silent if ranks.first else stop_after(4))
    except Interrupted as error:
        found["interrupted"] = error.exit_code
    train(folder, "begun-alone", "rpg", ranks)

    try:
        ranks.agree({"the recipe": str(ranks.rank)})
    except UsageError as error:
        found["disagree"] = str(error)

    def fail_alone() -> None:
        if not ranks.first:
            error = RpgError("the disk of rank 1 is gone")
            error.exit_code = 77
            raise error
        ranks.most(0)

    try:
        fail_alone()
    except RpgError as error:
        found["failed"] = error.what
        found["shows it"] = ranks.fail_with(error)
        found["exit code"] = error.exit_code
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))


def start(arguments: list[str], rank: int, port: int, **options: Any) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def pair(*arguments: object) -> list[subprocess.Popen[str]]:
    """Two ranks of one command, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start([str(a) for a in arguments], rank, port) for rank in range(2)]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        texts = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts)]


# --- in the library ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks, and one process by itself, have trained."""
    folder = tmp_path_factory.mktemp("ddp")
    states = [{"w": draw(6, 4, seed=i), "b": draw(6, seed=i), "v": draw(3, 5, seed=i)} for i in range(7)]
    checkpoints = [{"task_bits": format(5 + i // 2, "04b"), "run": i % 2, "step": i} for i in range(7)]
    token_store(folder / "tokens", states, checkpoints, token_dim=16)
    alone = Ranks()
    for part in PARTS:
        train(folder, f"alone-{part}", part, alone)
    with suppress(Interrupted):
        train(folder, "begun-alone", "rpg", alone, on_step=stop_after(5))
    assert (folder / "begun-alone.partial" / CHECKPOINT).exists()
    for code, out, err in ends(pair("tests.test_ddp", folder)):
        assert (code, out) == (0, ""), err
    return folder


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def weights(folder: Path) -> Mapping[str, torch.Tensor]:
    return read_tensors(folder / "model.safetensors")


def close(found: Path, expected: Path) -> None:
    """Sums in another order: float32 keeps 7 digits, and AdamW's first steps divide small gradients by themselves."""
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-3 * TRAINING.learning_rate * 8)


@pytest.mark.parametrize("part", PARTS)
def test_two_processes_train_as_one_does(together, part):
    assert len(losses(together / f"alone-{part}")) == TRAINING.num_steps
    assert len(set(losses(together / f"alone-{part}"))) == TRAINING.num_steps
    close(together / f"together-{part}", together / f"alone-{part}")


def test_a_signal_to_one_stops_both_and_one_goes_on(together, tmp_path):
    assert [found["interrupted"] for found in told(together)] == [130, 130]
    partial = together / "stopped.partial"
    assert int(read_tensors(partial / CHECKPOINT)["step"]) == 4
    shutil.copytree(together / "tokens", tmp_path / "tokens")
    shutil.copytree(partial, tmp_path / "stopped.partial")
    train(tmp_path, "stopped", "rpg", Ranks())
    close(tmp_path / "stopped", together / "alone-rpg")


def test_two_go_on_from_what_one_has_begun(together):
    close(together / "begun-alone", together / "alone-rpg")


def test_ranks_that_disagree_are_told_before_the_first_step(together):
    first, second = (found["disagree"] for found in told(together))
    assert first == second
    assert first.startswith("rank 1 differs from rank 0 in: the recipe.")


def test_a_rank_that_fails_ends_the_other_with_its_exit_code_and_is_shown_once(together):
    first, second = told(together)
    assert (first["exit code"], second["exit code"]) == (77, 77)
    assert (first["shows it"], second["shows it"]) == (False, True)
    assert first["failed"] == "rank 1 has failed: the disk of rank 1 is gone"


@pytest.mark.parametrize("num", [2, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_disjoint_and_cover_all(num, size):
    shares = [Ranks(rank, size).share(num) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_by_itself_needs_no_others(monkeypatch):
    alone, value = Ranks(), torch.ones(2)
    alone.sum([value])
    alone.agree({"the recipe": "a"})
    assert (alone.most(3), alone.gather("x"), value.tolist()) == (3, ["x"], [1, 1])
    alone.leave_to_first()


@pytest.mark.parametrize("name", ["batch", "instance"])
def test_batch_norm_is_refused_where_a_batch_is_shared(tmp_path, name):
    class Two(Ranks):
        def agree(self, facts: Mapping[str, str]) -> None:
            raise Released  # Got past the check.

    network = ConvAutoencoderConfig(channels=(4, 4), latent_dim=4, norm=name)
    model = build_autoencoder(AutoencoderStageConfig(network=network), 30)
    with artifact.draft(tmp_path / "a", "x", section={}, inputs={}, force=False, resume=False) as draft:
        with pytest.raises(UsageError if name == "batch" else Released):
            fit(model, lambda step: iter(()), TRAINING, draft, dtype=torch.float32, on_step=silent, ranks=Two(0, 2))
        draft.commit({}, {})


# --- at the command line ----------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    """Wait, but not for processes that have ended."""
    while not condition() and all(process.poll() is None for process in processes):
        time.sleep(0.02)


def test_a_command_with_two_ranks_stops_on_a_signal_and_goes_on_alone(run, rpg):
    shutil.rmtree(run / "rpg")
    settings = ["--set", "rpg.training.num_steps=60", "--set", "rpg.training.checkpoint_every=1"]
    words = ["train-rpg", "--run", str(run), *settings]
    both = pair("rpgcli", *words)
    until((run / "rpg.partial" / CHECKPOINT).exists, both)
    both[1].send_signal(signal.SIGTERM)
    (code, out, err), (other_code, other_out, other_err) = ends(both)
    assert (code, other_code) == (143, 143), err + other_err
    assert out + other_out == ""
    assert (err + other_err).count("stopped by signal 15") == 1
    assert "step" in err  # progress
    assert not [line for line in other_err.splitlines() if "steps" in line]

    outcome = rpg(*words, "--resume")
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "rpg" / METRICS).read_text().splitlines()[-1])["step"] == 60


class Store:
    """Stands in for the store of two ranks of which the other one is fine."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return desired.encode()


@pytest.mark.parametrize("stage", ["tokenize", "collect"])
def test_other_stages_are_refused_under_torchrun(run, rpg, monkeypatch, stage):
    monkeypatch.setattr(command, "here", lambda: Ranks(0, 2, 0, Store()))
    outcome = rpg(stage, "--run", run, "--force")
    assert outcome.code == 2
    assert f"torchrun has started rpg {stage} 2 times" in outcome.err


@pytest.mark.parametrize(
    ("device", "local_rank", "expected"),
    [
        ("auto", 1, "cuda:1"),
        ("cuda", 0, "cuda:0"),
        ("cpu", 1, "cpu"),
        ("cuda:1", 1, "same GPU"),
        ("auto", 2, "found: 2"),
    ],
)
def test_each_process_takes_a_gpu_of_its_own(monkeypatch, device, local_rank, expected):
    monkeypatch.setattr(command, "here", lambda: Ranks(local_rank, 3, local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if expected.startswith(("cuda", "cpu")):
        assert str(command.pick_device(device)) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            command.pick_device(device)


@pytest.mark.slow
def test_torchrun_trains_in_a_run_named_by_the_environment(run):
    """torchrun takes `--run` for its own `--run-path` unless `--` stands before the module."""
    for more, environment in (([], {"RPG_RUN": str(run)}), (["--"], {})):
        shutil.rmtree(run / "rpg")
        words = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *more, "rpgcli", "train-rpg",
            *(["--run", str(run)] if more else []), "--json",
        ]  # fmt: skip
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["facts"]["num_weights"] > 0


if __name__ == "__main__":
    work(Path(sys.argv[1]))
