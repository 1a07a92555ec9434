"""Artifacts of the real kinds and sizes whose values are random: zoos nobody trained, models nobody trained."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rpgcli import artifact, rng
from rpgcli.artifact import Artifact
from rpgcli.collection import TrajectoryConfig
from rpgcli.cores.mamba2 import Mamba2Config
from rpgcli.denoisers.mlp import MlpDenoiserConfig
from rpgcli.methods.rpg import RPG, RpgConfig
from rpgcli.models import save_target
from rpgcli.pipeline import Run, carried, run_tokenize, settings_of_zoo
from rpgcli.problem import Problem
from rpgcli.recipe import Recipe, section
from rpgcli.targets import CnnConfig
from rpgcli.tasks import MultiClassConfig
from rpgcli.tokens import TokensConfig, TokenStore
from rpgcli.zoo import Network

CPU, META = torch.device("cpu"), torch.device("meta")
VALUES_AT_ONCE = 2**24
"""Values drawn and written together."""


WIDTHS = {100_000: 43, 1_000_000: 136, 3_500_000: 254, 10_000_000: 430, 200_000_000: 1925}
"""Parameters -> the width of a CNN that has about as many."""


def of_size(num_parameters: int) -> Recipe:
    """A model of a CNN with about so many parameters: token_dim 8192, d_model 256, denoiser of width 256."""
    return Recipe(
        task=MultiClassConfig(), target=CnnConfig(width=WIDTHS[num_parameters]), collect=TrajectoryConfig(),
        tokens=TokensConfig(token_dim=8192),
        rpg=RpgConfig(core=Mamba2Config(d_model=256), denoiser=MlpDenoiserConfig(width=256), state="none"),
    )  # fmt: skip


def random_zoo(folder: Path, recipe: Recipe, num: int, like: Artifact | None = None) -> Artifact:
    """A zoo of `num` networks of a recipe's target, without batch norm; from the files of `like` where given."""
    run = Run(folder)
    problem = Problem(recipe.problem(), None, False, CPU, outline=True)
    data = problem.dataset
    with META:
        target = recipe.target.build(data.channels, data.size, problem.num_outputs).state_dict()
    with run.draft("zoo", "collect", settings_of_zoo(recipe), {}) as draft:
        networks = [Network(f"{i:05d}.safetensors", "seen", run=0, step=i) for i in range(num)]
        for i, network in enumerate(networks):
            if like is None:
                write_random(draft.path / network.file, target, i)
            else:
                draft.take(like.path / network.file)
            draft.add(network.file)
        facts = {
            "networks": [network.to_json() for network in networks], "classes": list(data.classes),
            "channels": data.channels, "size": list(data.size), "num_outputs": problem.num_outputs,
            "num_parameters": sum(value.numel() for value in target.values()), "parameters": [],
            "num_images": {split: len(getattr(data, split).labels) for split in ("train", "validation", "test")},
        }  # fmt: skip
        run.remember(recipe)
        return draft.commit(facts, {})


def random_model(folder: Path, recipe: Recipe) -> Artifact:
    """An unconditional RPG that `rpg generate` takes, for the target of a recipe; its zoo and tokens are deleted."""
    run = Run(folder)
    random_zoo(folder, recipe, 2)
    tokens = run_tokenize(run, recipe)
    shutil.rmtree(folder / "zoo")
    store = TokenStore(tokens)
    assert recipe.rpg.state == "none", "a state needs a zoo that has some"
    with META:
        model = RPG(recipe.rpg, *store.layout.indices(), token_dim=store.layout.token_dim, num_features=0, num_states=1)
    with run.draft("rpg", "train-rpg", section(recipe, "rpg"), {"tokens": tokens}) as draft:
        write_random(draft.path / "model.safetensors", model.state_dict(), 0)
        draft.add("model.safetensors")
        save_target(draft, store)
        facts = {
            **carried(tokens), "condition": None, "num_states": 1, "selection": None,
            "num_weights": sum(parameter.numel() for parameter in model.parameters()),
        }  # fmt: skip
        found = draft.commit(facts, {})
    shutil.rmtree(folder / "tokens")
    return found


def write_random(path: Path, tensors: Mapping[str, Tensor], number: int) -> None:
    """Write float32 tensors of these shapes, a piece at a time.

    Matrices are uniform with deviation 1 / sqrt(inputs), all else uniform with a mean of 1, so that a model of these
    weights has outputs of order 1.
    """
    generator = rng.stream(0, "bench", path.name, number)
    with artifact.writing_tensors(path, tensors, sync=False) as append:
        for name, like in tensors.items():
            fan_in = like[0].numel() if like.dim() > 1 else 1
            mean, width = 0.0 if like.dim() > 1 else 1.0, (3 / fan_in) ** 0.5
            for first in range(0, like.numel(), VALUES_AT_ONCE):
                values = torch.empty(min(VALUES_AT_ONCE, like.numel() - first))
                append(name, values.uniform_(mean - width, mean + width, generator=generator))
