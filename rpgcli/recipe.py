"""The recipe: every setting of a pipeline, one section for each stage.

A recipe says only what differs from the defaults; the resolved one is stored in the run. Reading follows YAML 1.2 and
reports all problems at once with file:line:column (`strict_yaml.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rpgcli import strict_yaml
from rpgcli.artifact import read_json
from rpgcli.collection import CollectConfig, TasksConfig
from rpgcli.errors import ArtifactError, UsageError, nearest
from rpgcli.evaluation import EvaluateConfig
from rpgcli.generation import GenerateConfig
from rpgcli.methods.pdiff import AutoencoderStageConfig, LatentDiffusionConfig
from rpgcli.methods.rpg import RpgConfig
from rpgcli.problem import ProblemConfig
from rpgcli.targets import TargetConfig
from rpgcli.tasks import DatasetConfig
from rpgcli.tokens import TokensConfig

DEFAULT = "digits-demo"
"""The recipe of commands that name none."""
MAX_STORED_BYTES = 2**18
"""A resolved recipe has a few KiB."""
DEFAULT_TIMM = "digits-resnet18"
"""The recipe that `--arch` starts from when it names a network of timm and there is no recipe."""


class Recipe(ProblemConfig):
    """All stages of a run."""

    name: str = Field("unnamed", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}$")
    """Shown in tables; nothing depends on it."""
    seed: int = 0
    """Of the zoo: tasks, starts, orders."""
    collect: CollectConfig = Field(default_factory=TasksConfig)
    """The zoo."""
    tokens: TokensConfig = TokensConfig()
    """How checkpoints become tokens."""
    autoencoder: AutoencoderStageConfig = AutoencoderStageConfig()
    """p-diff's parameter autoencoder."""
    diffusion: LatentDiffusionConfig = LatentDiffusionConfig()
    """p-diff's diffusion on latents."""
    rpg: RpgConfig = RpgConfig()
    """The recurrent diffusion model."""
    generate: GenerateConfig = GenerateConfig()
    """How networks are sampled."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What they are compared with."""

    def problem(self) -> ProblemConfig:
        """Data set, task and target alone."""
        return ProblemConfig(dataset=self.dataset, task=self.task, target=self.target)

    def to_json(self) -> dict[str, Any]:
        """Every setting, resolved."""
        return self.model_dump(mode="json")


def embedded() -> dict[str, Traversable]:
    """The recipes of the package by name; those of a sub-folder come last, as `paper/imagenet-resnet18`."""
    return recipes_in(resources.files("rpgcli.recipes"))


def recipes_in(folder: Traversable) -> dict[str, Traversable]:
    """The recipes in a folder and its sub-folders by name, in order."""
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    found = {entry.name.removesuffix(".yaml"): entry for entry in entries if entry.name.endswith(".yaml")}
    for entry in entries:
        if entry.is_dir():
            found |= {f"{entry.name}/{name}": file for name, file in recipes_in(entry).items()}
    return found


def load(
    source: str | None,
    assignments: Sequence[str] = (),
    *,
    target: TargetConfig | None = None,
    dataset: DatasetConfig | None = None,
) -> Recipe:
    """Resolve a recipe.

    Args:
        source: A file, the name of an embedded recipe, or None for the default.
        assignments: `--set` overrides, `a.b=value`.
        target: `--arch`; without a source a network of timm starts from `digits-resnet18`.
        dataset: `--dataset`.

    Raises:
        RecipeError: With every problem found.
        UsageError: If there is no such recipe.
    """
    if source is None:
        source = DEFAULT_TIMM if target is not None and target.kind == "timm" else DEFAULT
    known = embedded()
    is_file = Path(source).exists() or source.endswith((".yaml", ".yml"))
    if source in known and not is_file:
        document = strict_yaml.parse(known[source].read_bytes(), source)
    elif is_file or ("/" in source and source.partition("/")[0] not in {name.partition("/")[0] for name in known}):
        document = strict_yaml.read(Path(source))
    else:
        raise UsageError(f"no recipe {source!r}{nearest(source, known)}", "Give a file, or one of these names.")
    chosen = {"target": target, "dataset": dataset}
    given = {k: v.model_dump(mode="json") for k, v in chosen.items() if v is not None}
    document = replace(document, value={**document.value, **given})
    return strict_yaml.validate(strict_yaml.override(document, assignments), Recipe)


def read_stored(path: Path, assignments: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a run, with overrides.

    Raises:
        ArtifactError: If the file is damaged.
    """
    value = read_json(path, MAX_STORED_BYTES)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not the recipe of a run.", "Name one: `rpg collect RECIPE` writes it anew.")
    document = strict_yaml.Document(value, str(path), {})
    return strict_yaml.validate(strict_yaml.override(document, assignments), Recipe)


def section(recipe: Recipe, *names: str) -> dict[str, Any]:
    """Some top-level fields of the resolved recipe: what a stage's key is made of."""
    whole = json.loads(recipe.model_dump_json())
    return {name: whole[name] for name in names}


def as_today(made_from: dict[str, Any]) -> dict[str, Any]:
    """What an artifact was made from, as this version writes it: a setting that did not exist then has its default."""
    known = {name: made_from[name] for name in made_from if name in Recipe.model_fields}
    try:
        return made_from | section(Recipe.model_validate_json(json.dumps(known)), *known)
    except ValidationError:
        return made_from  # Of a version that knew other settings.
