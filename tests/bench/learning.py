"""Collecting many small networks at once against one by one, and a training step against the paper's composition."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch

from rpgcli import artifact, rng
from rpgcli.collection import OptimiserConfig, TasksConfig, collect
from rpgcli.conditions import Condition
from rpgcli.methods.rpg import RpgConfig, build, make_loss
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.progress import silent
from rpgcli.recipe import load
from rpgcli.targets import CnnConfig
from rpgcli.tokens import TokenStore
from rpgcli.training import Trainer
from tests.bench.measuring import Figure, Row, Setting, Side, at_least, in_turn, peak_of, timed
from tests.bench.untrained import CPU
from tests.helpers import token_store

COMPOSITIONS = {"default": "digits-demo", "paper": "digits-tasks-paper"}
"""Ours and the paper's, at the same d_model: recipes."""
BITS = Condition("task-bits", 10)


# --- collect ----------------------------------------------------------------------------------------------------------


class OneByOne(CnnConfig):
    """The small CNN, trained as large networks are."""

    batched: ClassVar[bool] = False


def collecting(setting: Setting) -> list[Row]:
    """The small CNN of the digits' tasks: 128 networks at once against one by one."""
    together, alone, epochs = (8, 2, 1) if setting.quick else (128, 8, 2)

    def side(target: CnnConfig, num: int) -> Side:
        problem = Problem(ProblemConfig().model_copy(update={"target": target}), None, False, CPU)
        return lambda: timed(lambda: collect_tasks(setting.scratch / "zoo", problem, num, epochs))() / num

    sides = {"batched": side(CnnConfig(), together), "one": side(OneByOne(), alone)}
    found = in_turn(sides, setting.repeats(3), warm_up=False)
    note = (
        f"Seconds a network, epochs of the digits: {epochs}, measured and written to disk: {together} networks of one "
        f"command against {alone} that are trained one after the other, on the same cores."
    )
    return [
        Row(f"collect: one by one / {together} at once", found["one"].over(found["batched"]), "x",
            {"one by one": found["one"], "at once": found["batched"]}, goal=at_least(4), note=note)
    ]  # fmt: skip


def collect_tasks(folder: Path, problem: Problem, num: int, epochs: int) -> None:
    """A zoo of tasks from a start that costs nothing, as the recipe `digits-tasks` trains them; deleted at once."""
    usual = load("digits-tasks").collect
    assert isinstance(usual, TasksConfig), "the recipe's zoo is one of tasks"
    config = TasksConfig(
        num_seen=num, num_validation=0, num_unseen=0, snapshots=1, pretrain=OptimiserConfig(epochs=0),
        training=usual.training.model_copy(update={"epochs": epochs}),
    )  # fmt: skip
    with artifact.draft(folder, "collect", section={}, inputs={}, force=False, resume=False) as draft:
        networks = collect(problem, config, 0, draft, download=False, on_step=silent)
        draft.commit({"networks": [network.to_json() for network in networks]}, {})
    shutil.rmtree(folder)


# --- a training step --------------------------------------------------------------------------------------------------


def training_step(setting: Setting) -> list[Row]:
    """Our default against the paper's composition at the same d_model, on the same tokens."""
    shapes = [(128, 8, 4)] if setting.quick else [(128, 8, 32), (1024, 32, 2)]
    rows = []
    for token_dim, width, batch in shapes:
        store = small_store(setting.scratch / f"{token_dim}", width, token_dim)
        sides = {
            name: timed(training(store, composition(name, batch_size=batch))) for name in COMPOSITIONS
        }  # fmt: skip
        found = in_turn(sides, setting.repeats(7 if token_dim == 128 else 3))
        peaks = {
            name: Figure((peak_of(train_a_little, setting.scratch / f"{token_dim}", name, batch),)) for name in sides
        }
        what = f"{batch} networks of {store.layout.num_tokens} tokens of {token_dim}"
        rows += [
            Row(f"train-rpg: a step, paper / default, D {token_dim}", found["paper"].over(found["default"]), "x",
                {"paper": found["paper"], "default": found["default"]}, goal=at_least(6),
                note=f"D {token_dim}: {what}; loss, gradients and optimizer."),
            Row("  peak anonymous memory, paper / default", peaks["paper"].over(peaks["default"]), "x",
                {"paper": peaks["paper"], "default": peaks["default"]}, "MiB",
                note="Memory: of a whole process, torch included (some 200 MiB)."),
        ]  # fmt: skip
    return rows


def composition(name: str, *, batch_size: int) -> RpgConfig:
    """One of `COMPOSITIONS` with batches of so many networks."""
    rpg = load(COMPOSITIONS[name]).rpg
    return rpg.model_copy(update={"training": rpg.training.model_copy(update={"batch_size": batch_size})})


def small_store(folder: Path, width: int, token_dim: int) -> TokenStore:
    """Tokens of 32 random small CNNs of the digits' tasks."""
    shapes = {name: value.shape for name, value in CnnConfig(width=width).build(1, (8, 8), 2).state_dict().items()}
    states = [
        {name: torch.randn(shape, generator=rng.stream(0, "bench", i, name)) for name, shape in shapes.items()}
        for i in range(32)
    ]
    facts = [{"task_bits": f"{i + 1:010b}", "run": 0, "step": 0} for i in range(32)]
    return token_store(folder, states, facts, token_dim=token_dim)


def training(store: TokenStore, config: RpgConfig, device: torch.device = CPU) -> Callable[[], None]:
    """Takes the next step of a training."""
    model = build(config, store, BITS).to(device)
    trainer = Trainer(model.train(), config.training)
    loss = make_loss(model, config, store, BITS, device)
    return lambda: trainer.advance(loss(trainer.step))


def train_a_little(folder: Path, name: str, batch_size: int) -> None:
    """Two steps, in a process whose memory is watched."""
    step = training(TokenStore(artifact.read(folder, "tokenize")), composition(name, batch_size=batch_size))
    for _ in range(2):
        step()
