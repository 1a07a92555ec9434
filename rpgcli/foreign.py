"""Networks of others: plain folders of state dicts become the artifacts that `rpg evaluate` reads.

    --zoo DIR         RUN/zoo, as `rpg collect --from DIR` does, and RUN/tokens
    --generated DIR   RUN/generated/foreign-<name>-<hash>

A folder that rpg wrote itself is read where it lies, so either of the two may be ours.
"""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rpgcli import artifact
from rpgcli.alignment import free
from rpgcli.artifact import Artifact
from rpgcli.errors import ArtifactError, OutputError, UsageError
from rpgcli.imports import networks_in, read_fitting
from rpgcli.pipeline import Run, digest_of, run_collect, run_tokenize, target_of
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.progress import Step, in_phase
from rpgcli.recipe import Recipe
from rpgcli.targets import TargetConfig
from rpgcli.tasks import DatasetConfig
from rpgcli.zoo import Network, Zoo

METHOD = "foreign"
"""What made networks of which nobody says what made them."""
MAX_NAME = 40
"""Characters of a name that are kept."""


def is_plain(folder: Path) -> bool:
    """Whether a folder holds files of networks instead of an artifact of rpg.

    Raises:
        ArtifactError: If it does not exist, or holds neither.
    """
    if (folder / artifact.MANIFEST).is_file():
        return False
    networks_in(folder)
    return True


def bring(run: Run, recipe: Recipe, generated: Path) -> tuple[Run, Path]:
    """Bring what is not ours into the run, so that it can be evaluated.

    Args:
        run: Its `zoo` is the folder of trained networks; left out, the run's own.
        recipe: Of the run; data set, task and target where the zoo is not ours.
        generated: The folder of generated networks.

    Returns:
        The run, and the artifact of generated networks, for `run_evaluate`.

    Raises:
        ArtifactError: If a folder holds no networks, or networks that cannot be compared.
        OutputError: If the run holds another zoo.
    """
    zoo_is_plain, generated_is_plain = run.zoo is not None and is_plain(run.zoo), is_plain(generated)
    stage = replace(run, out=None, force=run.force and zoo_is_plain)  # Nothing that was trained here is replaced.
    if zoo_is_plain:
        assert run.zoo is not None, "only a named folder is plain"
        check_replaceable(run, run.zoo)
        stage = replace(stage, zoo=None)
        run_collect(stage, recipe, source=run.zoo)
    zoo = Zoo.read(stage.at("zoo"))
    run_tokenize(replace(stage, on_step=in_phase(run.on_step, "tokenize", "checkpoint")), audited(recipe, zoo))
    if generated_is_plain:
        problem = run.open(ProblemConfig.of(zoo.artifact.section))
        generated = run_import(replace(stage, force=False), problem, generated).path
    return replace(run, zoo=stage.zoo), generated


def check_replaceable(run: Run, source: Path) -> None:
    """Refuse what would take the place of a zoo that was trained here, or cannot be judged."""
    if len(networks_in(source)) < 2:
        raise ArtifactError(
            f"{source} holds a single network: how far networks lie apart cannot be said.",
            "Name the folder of all networks that the generator learned from.",
        )
    at = run.folder / "zoo"
    if (at / artifact.MANIFEST).is_file() and "from" not in artifact.read(at, "collect").section:
        raise OutputError(
            f"{at} was trained here; networks from elsewhere do not take its place.", "Choose another --run."
        )


def audited(recipe: Recipe, zoo: Zoo) -> Recipe:
    """The recipe, with hidden units aligned where nobody knows whether the networks had starts of their own.

    A copy whose hidden units were permuted would pass for new otherwise, and averages of independent networks for bad.
    """
    tokens = recipe.tokens
    if tokens.align == "auto" and "from" in zoo.artifact.section:
        target = ProblemConfig.of(zoo.artifact.section).target
        if free(target.symmetries(target_of(zoo)), zoo.shared):
            tokens = tokens.model_copy(update={"align": "weight-matching"})
    return recipe.model_copy(update={"tokens": tokens})


def run_import(run: Run, problem: Problem, source: Path) -> Artifact:
    """Bring in the networks of a folder as generated ones; those that are not finite too, to be counted as failed.

    Raises:
        UsageError: If the problem has tasks: nobody knows those of the networks.
        LayoutError: If one does not fit the target.
    """
    begun = time.perf_counter()
    if problem.has_bits:
        raise UsageError(
            f"the networks of {source} come without task bits, but those of the zoo are told apart by them.",
            "Name a zoo of networks that all answer the same question.",
        )
    digest = digest_of(source)
    name = f"{METHOD}-{plain(source.resolve().name)}-{digest[:8]}"
    made_from: dict[str, Any] = {"from": digest, "request": name, "problem": problem.config.model_dump(mode="json")}
    with run.draft(f"generated/{name}", "generate", made_from, {}) as draft:
        if draft.finished is not None:
            return draft.finished
        paths = networks_in(source)
        networks = []
        for i, path in enumerate(paths):
            state = read_fitting(path, problem.reference, must_be_finite=False)
            label = path.parent.name if path.parent != source else None
            network = Network(f"{i:05d}-{plain(path.stem)}.safetensors", "all", sample=i, label=label)
            draft.save_tensors(network.file, state)
            networks.append(network.to_json())
            run.on_step(Step(i + 1, len(paths), phase="read generated", unit="network"))
        facts = {
            "networks": networks, "method": METHOD, "seed": None, "classes": list(problem.dataset.classes),
            "sampling": None, "condition": None,
        }  # fmt: skip
        return draft.commit(facts, run.volatile(begun, **{"from": str(source)}))


def check_described(zoo: Path, target: TargetConfig | None, dataset: DatasetConfig | None) -> None:
    """Refuse --arch and --dataset that say otherwise than a zoo of ours does."""
    there = ProblemConfig.of(artifact.read(zoo, "collect").section)
    for option, given, found in (("arch", target, there.target), ("dataset", dataset, there.dataset)):
        names = [getattr(one, "name", one.kind) for one in (given, found) if one is not None]
        if len(set(names)) > 1:
            raise UsageError(f"--{option} is {names[0]}, but {zoo} was made for {names[1]}.", "Leave it out.")


def counted(recipe: Recipe, generated: Path) -> Recipe:
    """The recipe, with as many generated networks as there are; for a plan."""
    num = len(networks_in(generated)) if is_plain(generated) else len(Zoo.read(generated, "generate").networks)
    return recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"count": num})})


def plain(name: str) -> str:
    """A name that an artifact's file or folder may have."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name)[:MAX_NAME].strip("-") or "networks"
