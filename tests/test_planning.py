"""What a plan says: of memory against what a real training takes, of disk, of data sets that are not there."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from rpgcli import planning
from rpgcli.errors import DataError
from rpgcli.planning import Meter
from rpgcli.recipe import load
from rpgcli.tasks import Cifar10Config, Cifar100Config, FolderConfig, Stl10Config, SvhnConfig

CPU = torch.device("cpu")
META = torch.device("meta")
Usage = namedtuple("Usage", ("total", "used", "free"))


@pytest.fixture(autouse=True)
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not measured each time."""
    monkeypatch.setattr(planning, "flops_per_second", lambda device: 1e9)


def plan(name: str, place: Path, *assignments: str, stage: str = "train-rpg") -> dict[str, Any]:
    """Of a recipe by itself."""
    recipe = load(name, assignments)
    return planning.plan(stage, recipe, run=None, zoo=None, data_root=None, device=CPU, place=place)


# --- what a computation has alive -------------------------------------------------------------------------------------


def test_meter_counts_what_is_alive_and_not_what_was_there_before():
    before = torch.empty(1000, device=META)
    with Meter() as meter:
        a = before * 2
        assert (meter.now, meter.peak) == (4000, 4000)
        a.add_(1).view(10, 100).sum()  # In place, and a view: only the sum is new.
        assert (meter.now, meter.peak) == (4000, 4004)
        b = torch.stack([a, a])
        del a
        assert (meter.now, meter.peak) == (8000, 12_000)
        del b
    assert meter.now == 0


def test_meter_follows_a_training_step_to_the_byte():
    """y = relu(x W1') W2': the mean of y, whose backward pass starts from an expanded scalar."""
    with META:
        model = nn.Sequential(nn.Linear(100, 300, bias=False), nn.ReLU(inplace=True), nn.Linear(300, 200, bias=False))
    x = torch.empty(50, 100, device=META)
    with Meter() as meter:
        loss = model(x).mean()
        hidden, y, scalar = 4 * 50 * 300, 4 * 50 * 200, 4
        assert meter.now == hidden + scalar and meter.peak == hidden + y + scalar
        loss.backward()
    gradients = 4 * (100 * 300 + 300 * 200)
    assert meter.now == gradients + scalar
    assert meter.flops == 2 * 50 * 300 * (2 * 100 + 3 * 200)  # Nobody asks for the gradient of x.
    again = planning.measure_step(lambda: model(x).mean(), again=True)
    assert again.peak_bytes > gradients  # A second part of a step; the gradients of the first were there before.


MEASURE = """
import json, sys, tempfile, torch
from pathlib import Path
from rpgcli import planning, rng
from rpgcli.conditions import make_condition
from rpgcli.methods.rpg import build, make_loss
from rpgcli.recipe import load
from rpgcli.training import Trainer
from tests.helpers import token_store

cpu, folder = torch.device("cpu"), Path(tempfile.mkdtemp())
recipe = load(None, sys.argv[1:])
plan = planning.plan("train-rpg", recipe, run=None, zoo=None, data_root=None, device=cpu, place=folder)
target = planning.known_of(recipe, None, None).target
states = [
    {name: torch.randn(value.shape, generator=rng.stream(0, "test", name, i))
     for name, value in target.state_dict().items()}
    for i in range(4)
]
facts = [{"task_bits": "0010100000", "run": 0, "step": i} for i in range(4)]
store = token_store(folder / "tokens", states, facts)
condition = make_condition("task-bits", (), store.checkpoints, section="rpg")


def peak():
    # Of this program alone: ru_maxrss begins with that of the process that started it.
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def train(config):
    # More than the model takes, in bytes.
    model = build(config, store, condition)
    before = peak()
    trainer, loss = Trainer(model, config.training), make_loss(model, config, store, condition, cpu)
    for step in range(2):
        trainer.advance(loss(step))
    return peak() - before + planning.num_bytes(model)


train(load(None, ["rpg.core={kind: mamba2, d_model: 32, headdim: 8}", "rpg.denoiser.kind=conv",
                  "rpg.training.batch_size=1"]).rpg)  # Libraries load what they need.
print(json.dumps({"measured": train(recipe.rpg), "planned": plan["peak_memory_bytes"]}))
"""
ROOT = Path(__file__).parent.parent


PARTS = ["rpg.core.d_model=512", "rpg.core.num_layers=4", "rpg.core.recompute=true", "rpg.micro_batch=8"]


@pytest.mark.parametrize(
    "settings",
    [["rpg.denoiser.kind=conv", "rpg.tokens_per_step=300"], pytest.param(PARTS, marks=pytest.mark.slow)],
    ids=["of the denoiser", "of the core in parts, computed again"],
)
def test_planned_memory_is_that_of_a_real_training(settings):
    """Within a quarter: 0.90 and 0.86 of what is planned, where the allocator may keep nothing back, else to 1.35."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["planned"] > 200 * 2**20
    assert 0.75 < found["measured"] / found["planned"] < 1.25, found


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_setting_of_the_paper_is_planned_without_its_data_set_and_refused_with_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "memory", lambda device: 2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(2**50, 0, 2**50))
    found = plan("paper/imagenet-vit-tiny", tmp_path)
    assert (found["parameters"], found["tokens"], found["checkpoints"]) == (5_717_416, 808, 50)
    assert found["of the core"] + found["of the denoiser"] + found["of the states"] == found["model parameters"]
    assert found["zoo_bytes"] == 4 * 50 * 5_717_416 and found["tokens_bytes"] == 4 * 50 * 808 * 8192
    assert found["disk_bytes"] == sum(found[f"{part}_bytes"] for part in ("zoo", "tokens", "training"))
    assert found["training_bytes"] > 2 * (found["model_bytes"] + found["optimizer_bytes"])
    assert 4 * found["model_bytes"] < found["peak_memory_bytes"] < 2**37
    assert found["model_bytes"] < found["peak_memory_of_generating_bytes"] < found["peak_memory_bytes"]
    assert found["sampling steps"] == 1000 and found["estimated_seconds"] > found["estimated_generating_seconds"] > 0
    assert found["fits"] and found["generating fits"] and found["fits on disk"]

    monkeypatch.setattr(planning, "memory", lambda device: found["peak_memory_bytes"])
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(2**50, 0, found["disk_bytes"]))
    small = plan("paper/imagenet-vit-tiny", tmp_path)
    assert (small["fits"], small["generating fits"], small["fits on disk"]) == (False, True, False)
    assert small["device_memory_bytes"] == small["peak_memory_bytes"]


def test_a_larger_model_costs_more_of_what_it_is_made_of(tmp_path):
    def costs(*assignments: str) -> list[int]:
        found = plan("paper/cifar10-cnn-medium", tmp_path, *assignments)
        return [found[name] for name in ("peak_memory_bytes", "peak_memory_of_generating_bytes", "training_bytes")]

    first = costs()
    assert all(more > less for more, less in zip(costs("rpg.core.d_model=512"), first))
    more, same, stored = costs("rpg.training.batch_size=16")
    assert (more > first[0], same, stored) == (True, *first[1:])
    average = costs("rpg.training.ema_decay=0.9")
    assert average[0] > first[0] and average[2] > first[2]
    fewer = costs("rpg.training.batch_size=16", "rpg.tokens_per_step=64")
    assert fewer[0] < more


def test_generating_takes_longer_by_the_steps_that_it_takes(tmp_path):
    one, two, three = (
        plan("paper/cifar10-cnn-small", tmp_path, f"generate.num_steps={n}")["estimated_generating_seconds"]
        for n in (1, 2, 3)
    )
    assert 0 < two - one == pytest.approx(three - two) and one > two - one  # The core runs once.


def test_collecting_is_planned_with_the_images_that_lie_in_memory(tmp_path):
    found = plan("paper/cifar10-tasks-vit-tiny", tmp_path, stage="collect")
    assert found["images_in_memory_bytes"] == 60_000 * 3 * 32 * 32
    assert found["networks"] == 5 * 922 + 80 + 20 and found["trainings"] == 1022
    assert found["zoo_bytes"] == found["networks"] * 4 * found["parameters"]


# --- data sets that are not there -------------------------------------------------------------------------------------


PUBLISHED = [
    (Cifar10Config(), (50_000, 10_000), (3, 32, 32), 10),
    (Cifar100Config(), (50_000, 10_000), (3, 32, 32), 100),
    (SvhnConfig(), (73_257, 26_032), (3, 32, 32), 10),
    (Stl10Config(), (5000, 8000), (3, 96, 96), 10),
]


@pytest.mark.parametrize(
    ("config", "num_images", "shape", "num_classes"), PUBLISHED, ids=lambda x: getattr(x, "kind", "")
)
def test_numbers_of_published_data_sets_need_no_files(config, num_images, shape, num_classes):
    found = config.outline(None)
    assert found.train.pixels.is_meta and (found.channels, *found.size) == shape
    assert found.num_classes == num_classes and len(found.validation) == config.num_validation
    assert (len(found.train) + len(found.validation), len(found.test)) == num_images


def test_a_folder_is_counted_and_not_read(tmp_path):
    for name, count in (("a", 12), ("b", 8)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    config = FolderConfig(size=6)
    read, counted = config.load(tmp_path), config.outline(tmp_path)
    for split in ("train", "validation", "test"):
        assert getattr(counted, split).pixels.shape == getattr(read, split).pixels.shape
    assert counted.classes == read.classes and counted.train.pixels.is_meta

    (tmp_path / "a" / "0.png").write_text("not an image")
    assert config.outline(tmp_path).num_classes == 2


def test_a_folder_that_is_not_there_has_the_numbers_of_the_recipe(tmp_path):
    told = FolderConfig(size=6, num_classes=7, num_images=100)
    found = told.outline(None)
    assert (found.num_classes, found.channels, found.size) == (7, 3, (6, 6))
    assert sum(len(part) for part in (found.train, found.validation, found.test)) == 100
    for config in (FolderConfig(num_classes=7), FolderConfig(num_images=100)):
        with pytest.raises(DataError, match="needs to know which folder"):
            config.outline(None)
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    for use in (told.outline, told.load):
        with pytest.raises(DataError, match=r"3 classes of images, but dataset\.num_classes is 7"):
            use(tmp_path)
