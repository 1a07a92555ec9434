"""Trained models on disk: what lies beside their weights, and how they are read to be sampled."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

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


def just_trained(
    name: MethodName, method: RPG | LatentDiffusion, condition: Condition | None, num_states: int, store: TokenStore,
    *, mask: Tensor | None = None, decode: Callable[[Tensor], Tensor] = lambda x_0: x_0,
) -> Model:  # fmt: skip
    """A model that was just trained, ready to be sampled; RPG's samples are the tokens themselves."""
    varies = store.statistics.varies if mask is None else mask
    device = next(method.parameters()).device
    return Model(
        name, method.eval(), varies.to(device), decode, condition, num_states,
        store.layout, store.statistics, store.constants(0),
    )  # fmt: skip


def decoder(autoencoder: Autoencoder, model: LatentDiffusion, layout: Layout) -> Callable[[Tensor], Tensor]:
    """Standardised latents (B, 1, Z) to standardised tokens (B, L, D)."""
    return lambda x_0: layout.grid(autoencoder.decode(model.scale.restore(x_0[:, 0])))


def read_model(method: MethodName, trained: Artifact, device: torch.device) -> Model:
    """Load a trained model; everything it needs lies in its own folder."""
    facts = trained.facts
    layout = Layout.from_json(trained.json("layout.json"))
    statistics = Statistics(**trained.tensors("statistics.safetensors"))
    constants = trained.tensors("constants.safetensors")
    condition = condition_of(trained)
    num_features = condition.num_features if condition is not None else 0
    weights = trained.tensors("model.safetensors")
    if method == "rpg":
        rpg_config = RpgConfig.model_validate_json(json.dumps(trained.section["rpg"]))
        with rng.initialising(rpg_config.seed):
            rpg = RPG(
                rpg_config, *layout.indices(), token_dim=layout.token_dim,
                num_features=num_features, num_states=facts["num_states"],
            )  # fmt: skip
        rpg.load_state_dict(weights, strict=True, assign=True)
        rpg.to(device).eval()
        varies = statistics.varies.to(device)
        return Model("rpg", rpg, varies, lambda x: x, condition, facts["num_states"], layout, statistics, constants)
    config = LatentDiffusionConfig.model_validate_json(json.dumps(trained.section["diffusion"]))
    stage = AutoencoderStageConfig.model_validate_json(json.dumps(facts["autoencoder"]["autoencoder"]))
    with rng.initialising(config.seed):
        model = LatentDiffusion(config, latent_dim=facts["autoencoder"]["latent_dim"], num_features=num_features)
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(device).eval()
    autoencoder = build_autoencoder(stage, facts["autoencoder"]["num_parameters"])
    autoencoder.load_state_dict(trained.tensors("autoencoder.safetensors"), strict=True, assign=True)
    autoencoder.to(device).eval()
    decode = decoder(autoencoder, model, layout)
    return Model("pdiff", model, model.mask, decode, condition, 1, layout, statistics, constants)


def read_autoencoder(found: Artifact, device: torch.device) -> Autoencoder:
    """Load a trained autoencoder."""
    config = AutoencoderStageConfig.model_validate_json(json.dumps(found.section["autoencoder"]))
    model = build_autoencoder(config, found.facts["num_parameters"])
    model.load_state_dict(found.tensors("model.safetensors"), strict=True)
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
