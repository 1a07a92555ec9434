"""The command `rpg`: parse -> recipe -> pipeline -> show. No mathematics here.

What all commands share, the options above all, lies in `command.py`. torch and everything that imports it are imported
inside the commands, so that `rpg --help` answers at once.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpgcli.command import (
    DataRootOption,
    DownloadOption,
    MethodOption,
    Options,
    RecipeArgument,
    RecipesArgument,
    SeedOption,
    SharedOptions,
    StageOptions,
    ZooOption,
    app,
    command,
    finish,
    in_shards,
    main,
    not_nan,
    pick_device,
    running,
    set_threads,
    stored_recipe,
)
from rpgcli.console import Console, human_bytes, human_count, human_seconds
from rpgcli.errors import ArtifactError, RpgError, UsageError, nearest

if TYPE_CHECKING:
    from rpgcli.generation import GenerateConfig, Request, Source
    from rpgcli.recipe import Recipe

__all__ = ["app", "main"]

MAX_ROWS = 1000
"""Tensors or facts that `inspect` shows; --json has all."""
MAX_CELL = 200
"""Characters of a name or fact that it shows."""

# --- stages -----------------------------------------------------------------------------------------------------------


@command("collect")
def collect(
    console: Console,
    options: SharedOptions,
    recipe: RecipeArgument = None,
    arch: Annotated[
        str | None, typer.Option(help="Target network: cnn, convnet3, mlp3, rpg-cnn, or a name of timm.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set: digits, fashion-mnist, cifar10, ...")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Take the networks of this folder instead.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Separate trainings of a zoo of trajectories.")] = None,
    seed: SeedOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
) -> None:
    """Train a zoo of networks (or take one that exists) into RUN/zoo."""
    from rpgcli import pipeline
    from rpgcli import recipe as recipes
    from rpgcli.targets import parse_arch
    from rpgcli.tasks import parse_dataset

    assignments = options.assignments({"seed": seed, "collect.runs": runs})
    stored = options.run / pipeline.RECIPE
    if recipe is None and arch is None and dataset is None and stored.is_file():
        resolved = recipes.read_stored(stored, assignments)
    else:
        resolved = recipes.load(
            recipe, assignments,
            target=None if arch is None else parse_arch(arch),
            dataset=None if dataset is None else parse_dataset(dataset),
        )  # fmt: skip
    if options.dry_run:
        show_plan(console, options, "collect", [resolved], data_root)
        return
    given = {"data_root": data_root, "download": download}
    if source is not None and (options.shard or options.executor):
        raise UsageError("--from trains nothing: there is nothing to share.", "Leave out --shard and --executor.")
    if in_shards(console, options, "collect", lambda run, part: pipeline.share_collect(run, part, resolved), **given):
        return
    with running(console, options, "collect", **given) as run:
        found = pipeline.run_collect(run, resolved, source=source)
    networks = found.facts["networks"]
    rows, groups = [], {}
    for split in ("seen", "validation", "unseen"):
        members = [n for n in networks if n["split"] == split]
        if members:
            last = [n for n in members if n["last"]]
            mean = {s: sum(n["accuracy"][s] for n in last) / len(last) for s in ("validation", "test")}
            low = min(n["accuracy"]["test"] for n in last)
            groups[split] = {"networks": len(members), "trainings": len(last), "accuracy": mean, "lowest_test": low}
            rows.append(
                [split, len(last), len(members), f"{mean['validation']:.4f}", f"{mean['test']:.4f}", f"{low:.4f}"]
            )
    columns = ["split", "trainings", "networks", "validation", "test", "lowest"]
    console.table("accuracy of trained networks", columns, rows, numeric=columns[1:])
    finish(console, options, found, groups, "tokenize")


@command("tokenize")
def tokenize(console: Console, options: StageOptions, recipe: RecipeArgument = None, zoo: ZooOption = None) -> None:
    """Turn the zoo's seen networks into standardised tokens in RUN/tokens."""
    from rpgcli import pipeline

    resolved = stored_recipe(options, recipe, options.assignments({}), "tokens")
    if options.dry_run:
        show_plan(console, options, "tokenize", [resolved], None, zoo=zoo)
        return
    with running(console, options, "tokenize", zoo=zoo) as run:
        found = pipeline.run_tokenize(run, resolved)
    facts = {k: found.facts[k] for k in ("num_checkpoints", "num_tokens", "token_dim", "num_parameters", "num_fixed")}
    console.note(
        f"{facts['num_checkpoints']} checkpoints · {facts['num_tokens']} tokens · {facts['token_dim']} wide · "
        f"{human_count(facts['num_parameters'])} parameters, {human_count(facts['num_fixed'])} of them never vary"
    )
    finish(console, options, found, facts, "train-ae" if resolved.generate.method == "pdiff" else "train-rpg")


@command("train-rpg")
def train_rpg(
    console: Console,
    options: StageOptions,
    recipe: RecipesArgument = None,
    seed: SeedOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
) -> None:
    """Train the recurrent diffusion model (RPG) on the tokens into RUN/rpg."""
    from rpgcli import pipeline

    resolved, *others = training_recipes(options, recipe, options.assignments({"rpg.seed": seed}), "rpg")
    if options.dry_run:
        show_plan(console, options, "train-rpg", [resolved, *others], data_root, named=bool(recipe))
        return
    with running(console, options, "train-rpg", data_root=data_root, download=download) as run:
        found = pipeline.run_train_rpg(run, resolved)
    show_selection(console, found.facts["selection"])
    facts = {k: found.facts[k] for k in ("num_weights", "num_tokens", "num_states", "selection")}
    finish(console, options, found, facts, with_method("generate", options, "rpg"))


@command("train-ae")
def train_ae(
    console: Console,
    options: StageOptions,
    recipe: RecipesArgument = None,
    seed: SeedOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
) -> None:
    """Train the parameter autoencoder (p-diff) on the tokens into RUN/autoencoder."""
    from rpgcli import pipeline

    assignments = options.assignments({"autoencoder.seed": seed})
    resolved, *others = training_recipes(options, recipe, assignments, "autoencoder")
    if options.dry_run:
        show_plan(console, options, "train-ae", [resolved, *others], data_root, named=bool(recipe))
        return
    with running(console, options, "train-ae", data_root=data_root, download=download) as run:
        found = pipeline.run_train_ae(run, resolved)
    rows = []
    for name, r in found.facts["reconstruction"].items():
        figures = [r["mean_squared_error"], r["explained_variance"], r["accuracy"], r["original"]]
        rows.append([name.replace("_", " "), r["count"], *(f"{x:.4f}" for x in figures)])
    columns = ["checkpoints", "count", "squared error", "explained variance", "accuracy", "originals"]
    console.table("reconstruction; accuracy on validation images", columns, rows, numeric=columns[1:])
    finish(console, options, found, dict(found.facts), "train-diffusion")


@command("train-diffusion")
def train_diffusion(
    console: Console,
    options: StageOptions,
    recipe: RecipesArgument = None,
    allow_bad: Annotated[
        bool, typer.Option("--allow-bad", help="Keep a diffusion whose samples are not like the training latents.")
    ] = False,
    seed: SeedOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
) -> None:
    """Train the latent diffusion (p-diff) on the autoencoder's latents into RUN/diffusion."""
    from rpgcli import pipeline
    from rpgcli.methods.pdiff import what_is_odd

    assignments = options.assignments({"diffusion.seed": seed})
    resolved, *others = training_recipes(options, recipe, assignments, "diffusion")
    if options.dry_run:
        show_plan(console, options, "train-diffusion", [resolved, *others], data_root, named=bool(recipe))
        return
    with running(console, options, "train-diffusion", data_root=data_root, download=download) as run:
        found = pipeline.run_train_diffusion(run, resolved, allow_bad=allow_bad)
    show_selection(console, found.facts["selection"])
    latents = found.facts["latents"]
    console.note(
        f"{latents['num_samples']} sampled latents deviate {latents['deviation_ratio']:.2f} times as much as training "
        f"latents and lie {latents['nearest_distance']:.2f} times as far from them as those from each other"
    )
    if odd := what_is_odd(latents):
        console.warn(odd)
    facts = {k: found.facts[k] for k in ("num_weights", "latents", "selection")}
    finish(console, options, found, facts, with_method("generate", options, "pdiff"))


@command("generate")
def generate(
    console: Console,
    options: SharedOptions,
    recipe: RecipeArgument = None,
    task_bits: Annotated[str | None, typer.Option(metavar="BITS", help="The task: one bit for each class.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="LIST", help="The task as classes: 2,4.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="FILE|-", help="Many tasks: one bit string a line.")] = None,
    label: Annotated[str | None, typer.Option(help="The label of a model that learned labels.")] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(min=0, max=1, callback=not_nan, help="The accuracy, of a model that learned accuracies."),
    ] = None,
    method: MethodOption = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Networks for each task; default: 1, without tasks 20.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm or dpm-solver++.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, callback=not_nan, help="Scale of the starting noise.")
    ] = None,
    state: Annotated[str | None, typer.Option(metavar="random|none|I", help="Permutation state.")] = None,
    seed: SeedOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
) -> None:
    """Write new networks for a task, or for all validation and unseen tasks and some seen ones."""
    from rpgcli import models, pipeline
    from rpgcli.methods.pdiff import what_is_odd

    if sum(x is not None for x in (task_bits, classes, tasks, label, accuracy)) > 1:
        several = "several of --task-bits, --classes, --tasks, --label and --accuracy were given."
        raise UsageError(several, "Give one of them.")
    assignments = options.assignments({
        "generate.count": count, "generate.num_steps": steps, "generate.temperature": temperature,
        "generate.seed": seed,
        "generate.sampler": None if sampler is None else f'{{kind: "{sampler}"}}',
        "generate.state": None if state is None else f'"{state}"',
    })  # fmt: skip
    resolved = stored_recipe(options, recipe, assignments, "generate")
    source = models.find_source(options.run, resolved.generate.method if method is None else method)
    denoising = {"--steps": steps, "--sampler": sampler, "--temperature": temperature, "--state": state}
    idle = [option for option, value in denoising.items() if value is not None]
    if idle and not source.is_learned:
        raise UsageError(f"{source.method} denoises nothing: {', '.join(idle)} would do nothing.", "Leave it out.")
    request = make_request(source, resolved.generate, task_bits, classes, tasks, label, accuracy)
    if options.dry_run:
        total = request.count * len(request.asked)
        size = total * 4 * source.facts["num_parameters"]
        console.note(f"{total} networks · {human_bytes(size)} · request {request.name}")
        console.result({"networks": total, "bytes": size, "request": request.name})
        return
    given = {"data_root": data_root, "download": download}
    if tasks == "-" and options.executor is not None:
        raise UsageError("--tasks - can be read only once.", "With --executor, name a file.")
    if in_shards(
        console, options, "generate", lambda run, part: pipeline.share_generate(run, part, resolved, source, request),
        **given,
    ):  # fmt: skip
        return
    with running(console, options, "generate", **given) as run:
        found = pipeline.run_generate(run, resolved, source, request)
    seconds = found.manifest.volatile.get("seconds_per_network", [])
    networks = [
        {**n, "path": str(found.path / n["file"]), "seconds": s} for n, s in zip(found.facts["networks"], seconds)
    ]
    rows = [
        [n["file"], n["split"], in_words(n, found.facts["classes"]), n["run"], f"{n['seconds']:.3f}"]
        for n in networks[:20]
    ]
    console.table(
        f"{len(networks)} network{'s' * (len(networks) > 1)} in {found.path}",
        ["file", "task is", "asked for", "state", "seconds"],
        rows,
        numeric=["state", "seconds"],
    )
    if len(networks) > len(rows):
        console.note(f"and {len(networks) - len(rows)} more")
    following = f"inspect {shlex.quote(str(found.path))}"
    if all(x is None for x in (task_bits, classes, tasks, label, accuracy)):
        following = evaluation_of(found.path, options, source)
    chosen: dict[str, Any] = {name: found.facts[name] for name in ("sampling", "settings") if name in found.facts}
    if found.facts.get("settings", {}).get("chosen"):
        tried = ", ".join(f"{name} {value}" for name, value in chosen["settings"]["chosen"].items())
        console.note(f"chosen on validation tasks: {tried}; accuracy {chosen['settings']['validation']:.4f} there")
    if (latents := found.facts.get("latents")) and (odd := what_is_odd(latents)):
        console.warn(odd)
    finish(console, options, found, {"networks": networks, **chosen}, following)


@command("evaluate")
def evaluate(
    console: Console,
    options: SharedOptions,
    recipe: RecipeArgument = None,
    request: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Folder in RUN/generated to judge; default: of `rpg generate` without a task."
        ),
    ] = None,
    generated: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Judge the networks of this folder: .safetensors or .pth files of any program, or ours."
        ),
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture of the networks in a --zoo that is not ours.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set of these networks.")] = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Also train from generated and from other starts: what is saved?")
    ] = False,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, callback=not_nan, help="Exit 5 if generated networks stay below.")
    ] = None,
    method: MethodOption = None,
    zoo: ZooOption = None,
    seed: SeedOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
) -> None:
    """Compare generated networks with trained ones and with trivial generators, on test images."""
    from rpgcli import foreign, pipeline
    from rpgcli.evaluation.initialisation import InitialisationConfig
    from rpgcli.evaluation.report import check_gate

    assignments = options.assignments({"evaluate.seed": seed})
    if generated is None:
        if arch is not None or dataset is not None:
            raise UsageError("--arch and --dataset describe networks of others.", "Name their folder: --generated DIR.")
        resolved = stored_recipe(options, recipe, assignments, "evaluate")
    else:
        if request is not None or method is not None:
            raise UsageError("--generated names the networks already.", "Leave out --request and --method.")
        resolved = recipe_of_others(options, recipe, assignments, zoo, arch, dataset)
    if finetune and resolved.evaluate.initialisation is None:
        more = {"initialisation": InitialisationConfig()}
        resolved = resolved.model_copy(update={"evaluate": resolved.evaluate.model_copy(update=more)})
    if options.dry_run:
        planned = resolved if generated is None else foreign.counted(resolved, generated)
        show_plan(console, options, "evaluate", [planned], data_root, zoo=zoo)
        return
    at = generated or pipeline.generated_folder(options.run, request, resolved, method)
    if generated is not None and (options.shard or options.executor):
        raise UsageError("--generated is judged by one process.", "Leave out --shard and --executor.")
    given = {"zoo": zoo, "data_root": data_root, "download": download}
    if in_shards(
        console, options, "evaluate", lambda run, part: pipeline.share_evaluate(run, part, resolved, at), **given
    ):
        return
    with running(console, options, "evaluate", **given) as run:
        if generated is not None:
            run, at = foreign.bring(run, resolved, generated)
        found = pipeline.run_evaluate(run, resolved, at)
    report = found.json("report.json")
    show_groups(console, report)
    show_starts(console, report.get("initialisation"))
    console.done(report["verdict"])
    finish(console, options, found, report, f"verify {shlex.quote(str(options.run))}")
    if min_accuracy is not None:
        check_gate(report, min_accuracy, found.path)


# --- helpers ----------------------------------------------------------------------------------------------------------


@command("recipes")
def recipes(
    console: Console,
    options: Options,
    name: Annotated[str | None, typer.Argument(help="Show this recipe.")] = None,
    copy: Annotated[Path | None, typer.Option("--copy", metavar="FILE", help="Write it to a file.")] = None,
) -> None:
    """List the recipes that come with rpg, show one, or copy it."""
    from rpgcli import recipe as module

    known = module.embedded()
    if name is None:
        heads = {key: file.read_text().partition("\n")[0].lstrip("# ") for key, file in known.items()}
        console.table("", ["recipe", "what it is"], list(heads.items()))
        console.result({"recipes": heads})
        return
    if name not in known:
        raise UsageError(f"no recipe {name!r}{nearest(name, known)}")
    text = known[name].read_text()
    if copy is not None:
        if copy.exists():
            raise UsageError(f"{copy} exists.", "Name a file that does not exist yet.")
        copy.write_text(text)
        console.done(f"{name} copied to {copy}")
    elif not options.json:
        sys.stdout.write(text)
    console.result({"name": name, "text": text})


@command("inspect")
def inspect_(
    console: Console,
    options: Options,
    path: Annotated[
        Path | None, typer.Argument(help="A run, an artifact, or a safetensors file; default: --run.")
    ] = None,
) -> None:
    """Show what a run, an artifact or a network file holds."""
    from rpgcli import artifact
    from rpgcli.strict_yaml import printable

    path = path or options.run
    if path.is_file():
        tensors = artifact.tensors_of(path)
        rows = [
            [printable(name, MAX_CELL), printable("x".join(map(str, shape)) or "scalar", MAX_CELL), dtype]
            for name, (dtype, shape) in list(tensors.items())[:MAX_ROWS]
        ]
        console.table(str(path), ["tensor", "shape", "dtype"], rows, numeric=["shape"])
        if len(tensors) > MAX_ROWS:
            console.note(f"and {len(tensors) - MAX_ROWS} more; --json lists all")
        console.result({"tensors": {n: {"dtype": d, "shape": list(s)} for n, (d, s) in tensors.items()}})
        return
    folders = artifacts_in(path)
    summaries: list[dict[str, Any]] = []
    for folder in folders:
        manifest = artifact.read_manifest(folder / artifact.MANIFEST)
        files = manifest.all_files()
        size = sum(record.size for record in files.values())
        scalars = {k: v for k, v in manifest.facts.items() if isinstance(v, int | float | str)}
        summaries.append({
            "path": str(folder), "stage": manifest.stage, "id": manifest.identity(), "files": len(files), "bytes": size,
            "facts": scalars, "section": manifest.section, "inputs": manifest.inputs, "volatile": manifest.volatile,
        })  # fmt: skip
    rows = [[s["path"], s["stage"], s["id"][:12], s["files"], human_bytes(s["bytes"])] for s in summaries]
    console.table("", ["folder", "made by", "id", "files", "size"], rows, numeric=["files", "size"])
    if len(summaries) == 1:
        given = list(summaries[0]["facts"].items())[:MAX_ROWS]
        facts = [[printable(k, MAX_CELL), printable(str(v), MAX_CELL)] for k, v in given]
        console.table("", ["fact", "value"], facts)
    console.result({"artifacts": summaries})


@command("verify")
def verify(
    console: Console,
    options: Options,
    path: Annotated[Path | None, typer.Argument(help="A run or an artifact; default: --run.")] = None,
) -> None:
    """Check every byte of an artifact, or of all in a run, against the manifests."""
    from rpgcli import artifact

    problems, rows = [], []
    for folder in artifacts_in(path or options.run):
        try:
            found, wrong = artifact.verify(folder)
            rows.append(
                [str(folder), found.manifest.stage, len(found.manifest.all_files()), "ok" if not wrong else "damaged"]
            )
        except ArtifactError as error:
            wrong = [error.what]
            rows.append([str(folder), "-", "-", "damaged"])
        problems += wrong
    console.table("", ["folder", "made by", "files", ""], rows, numeric=["files"])
    console.result(
        {"artifacts": [dict(zip(("path", "stage", "files", "state"), row)) for row in rows], "problems": problems}
    )
    if problems:
        raise ArtifactError(f"{len(problems)} problem{'s' * (len(problems) > 1)} found.", *problems[:20])


@command("doctor")
def doctor(console: Console, options: Options, data_root: DataRootOption = None) -> None:
    """Say what this machine offers: versions, device, kernels, threads, disk, data sets."""
    from rpgcli import diagnosis

    set_threads(options)
    found = diagnosis.examine(pick_device(options.device), options.run, data_root)
    console.table("", ["what", "found"], found.rows)
    console.result(found.to_json())
    for problem in found.problems:
        console.warn(problem)
    if found.broken:
        raise RpgError("something that rpg needs does not work.", *found.broken)


# --- asked and shown --------------------------------------------------------------------------------------------------


def make_request(
    source: "Source", config: "GenerateConfig", task_bits: str | None, classes: str | None, tasks: str | None,
    label: str | None, accuracy: float | None,
) -> "Request":  # fmt: skip
    """What `rpg generate` was asked for.

    Raises:
        UsageError: If a task is not one of this zoo's.
    """
    from rpgcli import artifact, generation
    from rpgcli.conditions import Asked
    from rpgcli.tasks import parse_classes, parse_task_bits, read_tasks

    names = source.facts["network"]["classes"]
    if label is not None or accuracy is not None:
        asked = Asked(label=label, accuracy=accuracy)
        return generation.request_of(source, config, [asked], asked.words)
    if task_bits is None and classes is None and tasks is None:
        return generation.default_request(source, config)
    if tasks is None:
        bits = parse_task_bits(task_bits, names) if task_bits is not None else parse_classes(classes or "", names)
        return generation.request_of(source, config, [Asked(task_bits=bits)], bits)
    try:
        lines = sys.stdin.readlines() if tasks == "-" else Path(tasks).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--tasks {tasks} cannot be read: {error}.", "Give a text file with one bit string a line."
        ) from None
    listed = read_tasks(lines, names)
    name = f"list-{artifact.digest(listed)[:8]}"
    return generation.request_of(source, config, [Asked(task_bits=bits) for bits in listed], name)


def with_method(words: str, options: Options, method: str) -> str:
    """The next command, told the method where the run holds several models."""
    from rpgcli.models import STAGE_OF

    num_models = sum((options.run / folder / "manifest.json").is_file() for folder, _ in STAGE_OF.values())
    return f"{words} --method {method}" if num_models > 1 else words


def recipe_of_others(
    options: StageOptions, name: str | None, assignments: list[str], zoo: Path | None, arch: str | None,
    dataset: str | None,
) -> "Recipe":  # fmt: skip
    """What networks of others are judged by: --arch and --dataset, or the recipe that the run or the zoo has.

    Raises:
        UsageError: If nothing says what the networks are, or the zoo says otherwise.
    """
    from rpgcli import foreign, pipeline
    from rpgcli import recipe as recipes
    from rpgcli.targets import parse_arch
    from rpgcli.tasks import parse_dataset

    target = None if arch is None else parse_arch(arch)
    data = None if dataset is None else parse_dataset(dataset)
    stored = (options.run / pipeline.RECIPE).is_file()
    if zoo is not None and foreign.is_plain(zoo):
        if name is None and target is None and data is None and stored:
            return stored_recipe(options, None, assignments, "evaluate")
        if name is None and (target is None or data is None):
            raise UsageError(
                f"nothing says what the networks of {zoo} are.", "Give --arch NAME and --dataset NAME, or a recipe."
            )
        task = ["name=foreign", "task.kind=multi-class"] if name is None else []
        return recipes.load(name, [*task, *assignments], target=target, dataset=data)
    foreign.check_described(options.run / "zoo" if zoo is None else zoo, target, data)
    if zoo is not None and not stored and (zoo.parent / pipeline.RECIPE).is_file():
        return recipes.read_stored(zoo.parent / pipeline.RECIPE, assignments)
    return stored_recipe(options, name, assignments, "evaluate")


def evaluation_of(generated: Path, options: Options, source: "Source") -> str:
    """The command that judges networks which were generated without asking for anything."""
    from rpgcli import pipeline

    resolved = stored_recipe(options, None, [], "generate")
    words = with_method("evaluate", options, source.method)
    by_itself = pipeline.generated_folder(options.run, None, resolved, source.method)
    if generated != by_itself or not source.is_learned:
        is_own = generated.parent == options.run / "generated"
        words = f"evaluate --request {shlex.quote(generated.name if is_own else str(generated.resolve()))}"
    zoo = pipeline.zoo_of(options.run)
    return words if zoo in (None, options.run / "zoo") else f"{words} --zoo {shlex.quote(str(zoo))}"


def show_groups(console: Console, report: dict[str, Any]) -> None:
    """The table of a report; of networks that all answer one question also how alike they are."""
    alike = any("error_iou" in group for group in report["groups"])
    rows = []
    for g in report["groups"]:
        a, s = g["accuracy"], g["seconds_per_network"]
        figures = [f"{a[k]:.4f}" for k in ("mean", "se", "min", "max")] if a else ["-"] * 4
        row = [g["name"], g["kind"], g["split"], g["count"], *figures]
        if alike and a is None:
            continue
        if alike:
            iou = g.get("error_iou", {"nearest": None, "within": None})
            best = [f"{g['best']['test']:.4f}"] if "best" in g else ["-"]
            row = [g["name"], g["count"], *figures[:3], *best]
            row += ["-" if iou[k] is None else f"{iou[k]:.3f}" for k in ("nearest", "within")]
        rows.append([*row, "-" if s is None else f"{s:.3g}"])
    columns = ["name", "kind", "split", "count", "mean", "se", "min", "max", "s/network"]
    if alike:
        columns = ["name", "count", "mean", "se", "min", "best", "IoU near", "within", "s/network"]
        console.note("best: chosen on validation images; IoU of errors with the nearest trained network, and inside")
    first = columns.index("count")
    console.table(f"accuracy on {report['num_test_images']} test images", columns, rows, numeric=columns[first:])
    rows = [
        [
            f"{r['low']:g}-{r['high']:g}",
            *(f"{r[k]['share']:.0%} of {r[k]['count']}" if r[k] else "-" for k in ("asked", "unasked")),
        ]
        for r in report.get("levels", [])
    ]
    if rows:
        console.table("share of networks in a level, on test images", ["level", "asked for it", "asked for none"], rows)


def show_starts(console: Console, found: dict[str, Any] | None) -> None:
    """How fast training reaches the accuracy of trained networks from each start."""
    if found is None:
        return
    targets = [f"to {t['fraction']:.0%}" for t in found["targets"]]
    rows = []
    for start in found["starts"]:
        test, error = start["test"]["mean"], start["test"]["se"]
        epochs = [
            "-" if r["epochs"] is None
            else f"{r['epochs']}" + (f" ({r['speed_up']:.1f}x)" if r["speed_up"] not in (None, 1) else "")
            for r in start["reached"]
        ]  # fmt: skip
        seconds = start["seconds_per_start"]
        figures = [f"{test[0]:.4f}", f"{test[-1]:.4f}", f"{error[-1]:.4f}"]
        rows.append([start["name"], start["count"], *figures, *epochs, "-" if seconds is None else f"{seconds:.3g}"])
    columns = ["start", "count", "before", "after", "se", *targets, "s/start"]
    title = f"training for {found['training']['epochs']} epochs of {found['seconds_per_epoch']:.3g} s from each start"
    console.table(title, columns, rows, numeric=columns[1:])
    share = found["trained"]
    console.note(
        f"epochs until validation accuracy reaches a share of the trained networks' {share['validation']:.4f} "
        f"(test {share['test']:.4f}), median of {found['num_seeds']} seeds; how many times fewer than from fresh ones"
    )


def show_selection(console: Console, selection: dict[str, Any] | None) -> None:
    """How a trained model will be sampled, and what else was tried."""
    rows = []
    for entry in (selection or {"tried": []})["tried"]:
        s, chosen = entry["sampling"], "chosen" if selection and entry == selection["chosen"] else ""
        rows.append([s["sampler"]["kind"], s["num_steps"], f"{s['temperature']:g}", f"{entry['accuracy']:.4f}", chosen])
    if rows:
        columns = ["sampler", "steps", "temperature", "accuracy", ""]
        console.table("sampling, on validation tasks and images", columns, rows, numeric=columns[1:4])


def in_words(network: dict[str, Any], classes: Sequence[str]) -> str:
    """What a network was asked for."""
    bits, label, accuracy = network["task_bits"], network["label"], network["asked_accuracy"]
    if bits is not None:
        return f"{bits} ({', '.join(c for c, bit in zip(classes, bits) if bit == '1')})"
    return label or ("-" if accuracy is None else f"accuracy {accuracy:g}")


def training_recipes(
    options: StageOptions, names: list[str] | None, assignments: list[str], own: str
) -> list["Recipe"]:
    """The recipe of a training stage; for a plan, those that are named, whatever the run holds.

    Raises:
        UsageError: If several are named and it is no plan.
    """
    if options.dry_run and names:
        return [stored_recipe(options, name, assignments, own, fresh=True) for name in names]
    if names and len(names) > 1:
        raise UsageError("several recipes were given.", "One at a time; several only with --dry-run.")
    return [stored_recipe(options, names[0] if names else None, assignments, own)]


def show_plan(
    console: Console, options: Options, stage: str, resolved: Sequence["Recipe"], data_root: Path | None,
    *, zoo: Path | None = None, named: bool = False,
) -> None:  # fmt: skip
    """What a stage would do, without doing it; recipes that are `named` are planned whatever the run holds."""
    from rpgcli import pipeline, planning

    set_threads(options)
    device, run = pick_device(options.device), None if named else options.run
    zoo = zoo if run is None or zoo is not None else pipeline.zoo_of(run)
    plans = [
        planning.plan(stage, recipe, run=run, zoo=zoo, data_root=data_root, device=device, place=options.run)
        for recipe in resolved
    ]
    for plan in plans:
        rows = [in_units(name, value) for name, value in plan.items() if name not in {"recipe", "stage"}]
        console.table(f"{plan['recipe']}: rpg {stage}", ["what", "how much"], rows, numeric=["how much"])
    if stage == "train-rpg" and len(plans) > 1:
        columns = ["recipe", "parameters", "tokens", "model", "disk", "training", "generating", "here"]
        console.table("", columns, [side_by_side(plan) for plan in plans], numeric=columns[1:-1])
    console.result({"plans": plans})


def side_by_side(plan: dict[str, Any]) -> list[str]:
    """A row for one of several plans of train-rpg; training and generating as memory."""
    lacking = {"fits": "memory to train", "generating fits": "memory to generate", "fits on disk": "disk"}
    lacks = [what for name, what in lacking.items() if not plan[name]]
    sizes = ("model_bytes", "disk_bytes", "peak_memory_bytes", "peak_memory_of_generating_bytes")
    return [
        plan["recipe"], human_count(plan["parameters"]), human_count(plan["tokens"]),
        *(human_bytes(plan[name]) for name in sizes), f"lacks {', '.join(lacks)}" if lacks else "runs",
    ]  # fmt: skip


def in_units(name: str, value: Any) -> list[str]:
    """An entry of a plan for people; the end of its name says what it counts."""
    units: dict[str, Callable[[float], str]] = {
        "_bytes": human_bytes, "_seconds": human_seconds, "_fraction": lambda x: f"{100 * x:.1f} %"
    }  # fmt: skip
    for unit, show in units.items():
        if name.endswith(unit):
            roughly = "about " if name.startswith(("estimated", "peak")) else ""
            return [name.removesuffix(unit).replace("_", " "), roughly + show(value)]
    if isinstance(value, bool):
        return [name, "yes" if value else "no"]
    if isinstance(value, str):
        return [name, value]
    return [name.replace("_", " "), human_count(value)]


def artifacts_in(path: Path) -> list[Path]:
    """The artifact at `path`, or those of a run.

    Raises:
        ArtifactError: If there is none.
    """
    if (path / "manifest.json").is_file():
        return [path]
    found = sorted(p.parent for p in [*path.glob("*/manifest.json"), *path.glob("generated/*/manifest.json")])
    found = [p for p in found if not p.name.endswith((".partial", ".old"))]
    if not found:
        raise ArtifactError(f"{path} holds no artifact.", "Name a run, or a folder that a stage wrote.")
    return found
