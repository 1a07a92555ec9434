"""Trained models on disk: what lies beside their weights, and how they are read to be sampled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpgcli import artifact, rng
from rpgcli.artifact import Artifact, Draft
from rpgcli.autoencoder import Autoencoder
from rpgcli.conditions import Condition
from rpgcli.errors import ArtifactError, UsageError
from rpgcli.generation import MethodName, Model, condition_of
from rpgcli.layout import Layout
from rpgcli.methods.pdiff import AutoencoderStageConfig, LatentDiffusion, LatentDiffusionConfig, build_autoencoder
from rpgcli.methods.rpg import RPG, RpgConfig
from rpgcli.problem import ProblemConfig
from rpgcli.tokens import Statistics, TokenStore

STAGE_OF: dict[MethodName, tuple[str, str]] = {"rpg": ("rpg", "train-rpg"), "pdiff": ("diffusion", "train-diffusion")}
"""Folder and stage of each method's model."""


def trained_model(run_folder: Path, method: MethodName | None) -> tuple[MethodName, Artifact]:
    """The run's model: that of `method`, or the only one there is.

    Raises:
        UsageError: If the run holds several and `method` does not say which.
    """
    there = [name for name, (folder, _) in STAGE_OF.items() if (run_folder / folder / artifact.MANIFEST).is_file()]
    if method is None and len(there) > 1:
        raise UsageError(f"{run_folder} holds several models.", f"Say which: --method {' or '.join(there)}.")
    if method is None and not there:
        raise ArtifactError(
            f"{run_folder} holds no trained model.",
            "Run `rpg train-rpg` first, or `rpg train-ae` and then `rpg train-diffusion`.",
        )
    chosen = method or there[0]
    folder, stage = STAGE_OF[chosen]
    return chosen, artifact.read(run_folder / folder, stage)


def save_target(draft: Draft, store: TokenStore) -> None:
    """Keep beside a model what turns its tokens into networks, so that its folder is enough to generate."""
    draft.save_tensors("statistics.safetensors", store.statistics.tensors())
    draft.save_tensors("constants.safetensors", store.constants(0))
    draft.save_json("layout.json", store.layout.to_json())


def assemble(
    method: RPG | LatentDiffusion, autoencoder: Autoencoder | None, condition: Condition | None, num_states: int,
    layout: Layout, statistics: Statistics, constants: Mapping[str, Tensor],
) -> Model:  # fmt: skip
    """A trained model with what turns its samples into networks: RPG's are the tokens, p-diff's are decoded."""
    method.eval()
    parts = (condition, num_states, layout, statistics, constants)
    if isinstance(method, RPG):
        return Model("rpg", method, statistics.varies.to(method.position.device), lambda x_0: x_0, *parts)
    assert autoencoder is not None, "p-diff decodes with one"
    decode, scale = autoencoder.eval().decode, method.scale
    return Model("pdiff", method, method.mask, lambda x_0: layout.grid(decode(scale.restore(x_0[:, 0]))), *parts)


def read_model(method: MethodName, trained: Artifact, device: torch.device) -> Model:
    """Load a trained model; everything it needs lies in its own folder."""
    facts = trained.facts
    layout = Layout.from_json(trained.json("layout.json"))
    condition = condition_of(trained)
    num_features = condition.num_features if condition is not None else 0
    model: RPG | LatentDiffusion
    autoencoder = None
    if method == "rpg":
        rpg = RpgConfig.model_validate_json(json.dumps(trained.section["rpg"]))
        with rng.initialising(rpg.seed):
            model = RPG(
                rpg, *layout.indices(), token_dim=layout.token_dim,
                num_features=num_features, num_states=facts["num_states"],
            )  # fmt: skip
    else:
        config = LatentDiffusionConfig.model_validate_json(json.dumps(trained.section["diffusion"]))
        with rng.initialising(config.seed):
            model = LatentDiffusion(config, latent_dim=facts["autoencoder"]["latent_dim"], num_features=num_features)
        autoencoder = load_autoencoder(facts["autoencoder"], trained.tensors("autoencoder.safetensors"), device)
    model.load_state_dict(trained.tensors("model.safetensors"), strict=True, assign=True)
    statistics = Statistics(**trained.tensors("statistics.safetensors"))
    constants = trained.tensors("constants.safetensors")
    return assemble(model.to(device), autoencoder, condition, facts["num_states"], layout, statistics, constants)


def read_autoencoder(found: Artifact, device: torch.device) -> Autoencoder:
    """Load a trained autoencoder from its own folder."""
    return load_autoencoder(found.section | found.facts, found.tensors("model.safetensors"), device)


def load_autoencoder(described: Mapping[str, Any], weights: Mapping[str, Tensor], device: torch.device) -> Autoencoder:
    """An autoencoder from its section and facts, and its weights."""
    config = AutoencoderStageConfig.model_validate_json(json.dumps(described["autoencoder"]))
    model = build_autoencoder(config, described["num_parameters"])
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(device).eval()


def strict_check(trained: Artifact) -> "StrictCheck":
    """A check that the target takes a state dict as it is."""
    facts = trained.facts["network"]
    config = ProblemConfig.of(trained.facts["problem"])
    with torch.device("meta"):
        return StrictCheck(config.target.build(facts["channels"], tuple(facts["size"]), facts["num_outputs"]))


@dataclass(frozen=True)
class StrictCheck:
    """Loads state dicts into the target with `strict=True`."""

    target: nn.Module

    def __call__(self, state: Mapping[str, Tensor]) -> None:
        """Raise a RuntimeError unless names, shapes and order of `state` are the target's."""
        self.target.load_state_dict(dict(state), strict=True, assign=True)
