"""Where networks come from, on disk: trained models, what lies beside their weights, and what trivial generators read.

find_source       which of them a run holds: manifests only
open_source       read it, so that it makes networks
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpgcli import artifact
from rpgcli.artifact import Artifact, Draft
from rpgcli.autoencoder import Autoencoder
from rpgcli.conditions import Asked, Condition, parse_state
from rpgcli.diffusion import Diffusion
from rpgcli.errors import ArtifactError, UsageError, nearest
from rpgcli.evaluation import EvaluateConfig
from rpgcli.evaluation.audit import answering_store
from rpgcli.evaluation.finetuning import original, trained_on
from rpgcli.generation import GenerateConfig, Generator, Maker, Model, Sample, Sampling, Source, condition_of
from rpgcli.layout import Layout
from rpgcli.methods import LEARNED, METHODS, OF_ONE_QUESTION, OF_TASKS, SHORT, baselines, resampling
from rpgcli.methods.pdiff import AutoencoderStageConfig, LatentDiffusion, LatentDiffusionConfig, build_autoencoder
from rpgcli.methods.rpg import RPG, RpgConfig
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.progress import OnStep
from rpgcli.subsets import Tail
from rpgcli.tokens import STATISTICS, Statistics, TokenStore

STAGE_OF = {"rpg": ("rpg", "train-rpg"), "pdiff": ("diffusion", "train-diffusion")}
"""Folder and stage of each learned method's model."""
STAGES = {"tokens": "tokenize", "autoencoder": "train-ae"} | dict(STAGE_OF.values())
"""Folder -> stage of all that a source may read."""
CHOSEN_BY = {"mlp": "mlp", "finetuned": "finetune"}
"""Trivial generator -> the setting of `evaluate` that it reads."""

# --- sources ----------------------------------------------------------------------------------------------------------


def find_source(run_folder: Path, method: str | None) -> Source:
    """What `method` makes networks from; without one the run's only model.

    Raises:
        UsageError: If there is no such method, if this zoo does not have what it needs, or if the run holds several
            models and none is named.
        ArtifactError: If something that it reads is missing.
    """
    there = [name for name, (folder, _) in STAGE_OF.items() if (run_folder / folder / artifact.MANIFEST).is_file()]
    if method is None and len(there) > 1:
        raise UsageError(f"{run_folder} holds several models.", f"Say which: --method {' or '.join(there)}.")
    if method is None and not there:
        raise ArtifactError(
            f"{run_folder} holds no trained model.",
            "Run `rpg train-rpg` first, or `rpg train-ae` and then `rpg train-diffusion`;",
            "trivial generators need none: --method average.",
        )
    chosen = there[0] if method is None else SHORT.get(method, method)
    if chosen in STAGE_OF:
        folder, stage = STAGE_OF[chosen]
        trained = artifact.read(run_folder / folder, stage)
        return Source(chosen, {folder: trained}, condition_of(trained))
    if chosen not in METHODS and not (run_folder / "tokens" / artifact.MANIFEST).is_file():
        raise unknown(chosen, METHODS)
    inputs = {"tokens": artifact.read(run_folder / "tokens", "tokenize")}
    tasks = inputs["tokens"].facts["tasks"]["seen"]
    trivial = OF_TASKS if tasks else OF_ONE_QUESTION
    if chosen not in METHODS:
        raise unknown(chosen, [*LEARNED, *trivial])
    if chosen not in trivial:
        what = "needs a zoo without tasks, and this one has" if tasks else "needs a zoo of tasks, and this one has no"
        raise UsageError(f"--method {chosen} {what} tasks.", f"Of this zoo: {', '.join(trivial)}.")
    if chosen in resampling.LATENT_GENERATORS:
        inputs["autoencoder"] = artifact.read(run_folder / "autoencoder", "train-ae")
    return Source(chosen, inputs, Condition("task-bits", len(tasks[0])) if tasks else None)


def unknown(method: str, known: Sequence[str]) -> UsageError:
    """Nobody knows the method."""
    short = {name: whole for name, whole in SHORT.items() if whole in known}
    meant = ", ".join(f"{name} means {whole}" for name, whole in short.items())
    return UsageError(
        f"--method {method!r} is unknown{nearest(method, [*known, *short])}", *([meant + "."] * bool(meant))
    )


def open_source(
    source: Source, config: GenerateConfig, evaluate: EvaluateConfig, problem: Callable[[], Problem],
    device: torch.device, dtype: torch.dtype, on_step: OnStep,
) -> Maker:  # fmt: skip
    """Read a source.

    Args:
        source: A trained model, or what a trivial generator reads.
        config: How networks are sampled.
        evaluate: Settings of the trivial generators that have any.
        problem: Opens the zoo's problem; for those that choose their settings on validation images, or train.
        device: Where a model runs.
        dtype: What it computes in.
        on_step: Called while something is fitted.
    """
    if source.is_learned:
        return open_model(source, config, device, dtype)
    store = TokenStore(source.inputs["tokens"])
    if source.method == "finetuned":
        return open_finetuning(source, store, evaluate, problem(), config.seed)
    if source.condition is not None:
        return open_regression(source, store, evaluate, problem(), config.seed, on_step)
    return open_resampling(source, store, config.seed, device)


def open_model(source: Source, config: GenerateConfig, device: torch.device, dtype: torch.dtype) -> Maker:
    """A trained model, sampled as is asked for, or as was chosen on validation tasks."""
    (trained,) = source.inputs.values()
    sampling = sampling_of(trained, config)
    model = read_model(source.method, trained, device)
    generator = Generator(model, dtype)
    has_one_state = model.num_states == 1 or parse_state(config.state, model.num_states) is not None

    @functools.cache
    def free_core(asked: Asked, state: int) -> None:
        """Once, when the only prototypes that will be asked for are known."""
        generator.prototypes(asked, state)
        if isinstance(model.method, RPG):
            model.method.keep_denoiser()

    def make(sample: Sample) -> tuple[Iterator[tuple[str, Tensor]], int]:
        blocks, chosen = generator.blocks(sample, sampling, seed=config.seed, state=config.state)
        if model.condition is None and has_one_state:
            free_core(sample.asked, chosen)
        return generator.tensors(blocks), chosen

    facts = {"sampling": sampling.model_dump(mode="json"), "latents": trained.facts.get("latents")}
    return Maker(make, facts, trained.manifest.volatile.get("training_seconds"))


def open_resampling(source: Source, store: TokenStore, seed: int, device: torch.device) -> Maker:
    """A trivial generator of networks that all answer the same question."""
    originals, draws, seconds = resampling.from_store(store), dict(resampling.GENERATORS), 0.0
    if "autoencoder" in source.inputs:
        autoencoder = read_autoencoder(source.inputs["autoencoder"], device)
        draws |= resampling.latent_generators(
            originals,
            lambda x: autoencoder.encode(x.to(device)).cpu(),
            lambda z: autoencoder.decode(z.to(device)).cpu(),
        )
        seconds = source.inputs["autoencoder"].manifest.volatile.get("training_seconds", 0.0)

    def make(sample: Sample) -> tuple[Iterable[tuple[str, Tensor]], int]:
        x = resampling.network(source.method, draws[source.method], originals, seed, sample.index)
        return store.rebuilt(x).items(), 0

    return Maker(make, {"sampling": None}, seconds)


def open_regression(
    source: Source, store: TokenStore, evaluate: EvaluateConfig, problem: Problem, seed: int, on_step: OnStep
) -> Maker:
    """A trivial generator of a zoo of tasks, with the settings that do best on validation tasks and images.

    Raises:
        UsageError: If there are no settings to choose from.
    """
    candidates = baselines.GENERATORS[source.method](baselines.known_of(store), evaluate.mlp, seed, on_step)
    if not candidates:
        raise UsageError("the recipe's evaluate.mlp is empty: there are no settings of the MLP to try.")
    score = baselines.validation_score(problem, store, store.artifact.facts["tasks"]["validation"])
    fitted = baselines.best(source.method, candidates, score)

    def make(sample: Sample) -> tuple[Iterable[tuple[str, Tensor]], int]:
        return store.rebuilt(fitted.predict([sample.asked.task_bits or ""], sample.index)[0]).items(), 0

    settings = {"chosen": fitted.settings, "validation": fitted.validation}
    return Maker(make, {"sampling": None, "settings": settings}, round(fitted.seconds, 3))


def open_finetuning(source: Source, store: TokenStore, evaluate: EvaluateConfig, problem: Problem, seed: int) -> Maker:
    """Trained networks trained a little further: any of them, or that of the nearest task on the task itself."""
    measure = answering_store(problem, store)
    tail = measure if isinstance(measure, Tail) else None
    known = baselines.known_of(store) if source.condition is not None else None
    closest = baselines.nearest(known, known.parameters[:, -1]) if known is not None else None

    def make(sample: Sample) -> tuple[Iterable[tuple[str, Tensor]], int]:
        bits, i = sample.asked.task_bits, sample.index
        start = store.rebuilt(closest([bits])[0]) if closest is not None and bits else original(store, seed, i)
        (state,) = trained_on(problem, [start], [bits], [i], evaluate.finetune, tail=tail, seed=seed)
        return state.items(), 0

    return Maker(make, {"sampling": None}, 0.0)


def sampling_of(trained: Artifact, config: GenerateConfig) -> Sampling:
    """What was asked for, else what was chosen on validation tasks, else the default."""
    given = {k: getattr(config, k) for k in ("sampler", "num_steps", "temperature") if getattr(config, k) is not None}
    selection = trained.facts["selection"]
    chosen = selection["chosen"]["sampling"] if selection is not None else {}
    return Sampling.model_validate_json(json.dumps(chosen)).model_copy(update=given)


# --- models -----------------------------------------------------------------------------------------------------------


def save_target(draft: Draft, store: TokenStore) -> None:
    """Keep beside a model what turns its tokens into networks, so that its folder is enough to generate."""
    draft.save_tensors(STATISTICS, store.statistics.tensors())
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


def read_model(method: str, trained: Artifact, device: torch.device) -> Model:
    """Load a trained model; everything it needs lies in its own folder."""
    facts = trained.facts
    layout = Layout.from_json(trained.json("layout.json"))
    condition = condition_of(trained)
    num_features = condition.num_features if condition is not None else 0
    model: RPG | LatentDiffusion
    autoencoder = None
    if method == "rpg":
        rpg = RpgConfig.model_validate_json(json.dumps(trained.section["rpg"]))
        with torch.device("meta"):  # Weights are mapped from the file; none are drawn before.
            model = RPG(
                rpg, *layout.indices(), token_dim=layout.token_dim,
                num_features=num_features, num_states=facts["num_states"],
            )  # fmt: skip
        model.diffusion = Diffusion(rpg.diffusion)
    else:
        config = LatentDiffusionConfig.model_validate_json(json.dumps(trained.section["diffusion"]))
        with torch.device("meta"):
            model = LatentDiffusion(config, latent_dim=facts["autoencoder"]["latent_dim"], num_features=num_features)
        model.diffusion = Diffusion(config.diffusion)
        autoencoder = load_autoencoder(facts["autoencoder"], trained.tensors("autoencoder.safetensors"), device)
    model.load_state_dict(trained.tensors("model.safetensors"), strict=True, assign=True)
    statistics = Statistics(**trained.tensors(STATISTICS))
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


def skeleton(source: Source) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the target's state dict, in its order, without values.

    Raises:
        LayoutError: If that is no longer the target that the source learned from.
    """
    facts, config = source.facts["network"], ProblemConfig.of(source.facts["problem"])
    with torch.device("meta"):
        target = config.target.build(facts["channels"], tuple(facts["size"]), facts["num_outputs"])
    state = dict(target.state_dict())
    Layout.from_json(next(iter(source.inputs.values())).json("layout.json")).check_shapes(state)
    return state
