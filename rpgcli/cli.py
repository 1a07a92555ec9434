"""The command `rpg`: parse -> recipe -> pipeline -> show. No mathematics here.

torch and everything that imports it are imported inside the commands, so that `rpg --help` answers at once.
"""

import inspect
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rpgcli import __version__
from rpgcli.console import Advance, Console, human_bytes, human_count, human_seconds
from rpgcli.errors import ArtifactError, Interrupted, RpgError, UsageError, nearest
from rpgcli.progress import Step

if TYPE_CHECKING:
    from rpgcli.pipeline import Run
    from rpgcli.recipe import Recipe

ClickUsageError: Any = typer.BadParameter.__base__
"""Typer carries its own click: this is its class of wrong arguments."""

app = typer.Typer(
    name="rpg",
    help="Collect zoos of trained networks, learn their parameters, generate new networks, and judge them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A pipeline: rpg collect, tokenize, train-rpg, generate, evaluate. Each ends by naming the next command.",
)

# --- options ----------------------------------------------------------------------------------------------------------

RecipeArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RECIPE]", help="A recipe file or name (see `rpg recipes`); default: the run's own."),
]
RecipesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE]...", help="A recipe file or name; several with --dry-run. Default: the run's own."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the recipe; repeatable.")
]
ZooOption = Annotated[Path | None, typer.Option("--zoo", help="Read the zoo from this folder instead of the run's.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the artifact to this folder instead of the run.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there, atomically, at the end.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted stage.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show counts, sizes and a time estimate; do nothing.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of this stage.")]
DataRootOption = Annotated[Path | None, typer.Option("--data-root", help="Folder that holds the data set's files.")]
DownloadOption = Annotated[bool, typer.Option("--download", help="Allow fetching data sets or published weights.")]


@dataclass(frozen=True)
class Common:
    """Options that every command has."""

    run: Annotated[Path, typer.Option("--run", envvar="RPG_RUN", help="Folder of the run.")] = Path("runs/default")
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:I.")] = "auto"
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (the latter two: autocast).")] = "float32"
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results, warnings and errors.")] = False
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="More notes; -vv: tracebacks.")] = 0


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command: its own parameters after (console, common), then the common ones."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[2:]
        shared = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(Common)
        ]

        def run(**arguments: Any) -> None:
            common = Common(**{f.name: arguments.pop(f.name) for f in fields(Common)})
            console = Console(quiet=common.quiet, verbose=common.verbose, json_mode=common.json)
            try:
                if common.run.exists() and not common.run.is_dir():
                    raise UsageError(f"--run {common.run} is not a folder.", "Name a folder, or one that can be made.")
                with console.listening():
                    function(console, common, **arguments)
            except RpgError as error:
                fail(console, error, trace=common.verbose >= 2)
            except BrokenPipeError:
                raise typer.Exit(128 + signal.SIGPIPE) from None
            except OSError as error:
                what = f"{error.filename or 'the system'}: {error.strerror or error}."
                fail(console, RpgError(what, "Nothing that existed was changed."), trace=common.verbose >= 2)

        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature([*keyword, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*keyword, *shared]}
        app.command(name, help=inspect.getdoc(function))(run)
        return function

    return register


# --- stages -----------------------------------------------------------------------------------------------------------


@command("collect")
def collect(
    console: Console,
    common: Common,
    recipe: RecipeArgument = None,
    arch: Annotated[str | None, typer.Option(help="Target network: cnn, convnet3, mlp3, or a name of timm.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set: digits, fashion-mnist, cifar10, ...")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Take the networks of this folder instead.")] = None,
    set_: SetOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
    force: ForceOption = False,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train a zoo of networks (or take one that exists) into RUN/zoo."""
    from rpgcli import pipeline
    from rpgcli import recipe as recipes
    from rpgcli.targets import parse_arch
    from rpgcli.tasks import parse_dataset

    assignments = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    named = recipe is not None or arch is not None or dataset is not None or assignments
    if not named and (common.run / pipeline.RECIPE).is_file():
        resolved = recipes.read_stored(common.run / pipeline.RECIPE)
    else:
        resolved = recipes.load(
            recipe, assignments,
            target=None if arch is None else parse_arch(arch),
            dataset=None if dataset is None else parse_dataset(dataset),
        )  # fmt: skip
    if dry_run:
        show_plan(console, common, "collect", [resolved], data_root)
        return
    with running(
        console, common, "collect", out=out, data_root=data_root, download=download, force=force, resume=resume
    ) as run:
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
    finish(console, common, found, groups, "tokenize")


@command("tokenize")
def tokenize(
    console: Console,
    common: Common,
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    zoo: ZooOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Turn the zoo's seen networks into standardised tokens in RUN/tokens."""
    from rpgcli import pipeline

    resolved = stored_recipe(common, recipe, set_, "tokens")
    if dry_run:
        show_plan(console, common, "tokenize", [resolved], None)
        return
    with running(console, common, "tokenize", zoo=zoo, out=out, force=force, resume=resume) as run:
        found = pipeline.run_tokenize(run, resolved)
    facts = {k: found.facts[k] for k in ("num_checkpoints", "num_tokens", "token_dim", "num_parameters", "num_fixed")}
    console.note(
        f"{facts['num_checkpoints']} checkpoints · {facts['num_tokens']} tokens · {facts['token_dim']} wide · "
        f"{human_count(facts['num_parameters'])} parameters, {human_count(facts['num_fixed'])} of them never vary"
    )
    finish(console, common, found, facts, "train-rpg")


@command("train-rpg")
def train_rpg(
    console: Console,
    common: Common,
    recipe: RecipesArgument = None,
    set_: SetOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
    force: ForceOption = False,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train the recurrent diffusion model (RPG) on the tokens into RUN/rpg."""
    from rpgcli import pipeline

    assignments = [*(set_ or []), *([f"rpg.seed={seed}"] if seed is not None else [])]
    if dry_run:
        names: list[str | None] = [*recipe] if recipe else [None]
        plans = [stored_recipe(common, name, assignments, "rpg", fresh=bool(recipe)) for name in names]
        show_plan(console, common, "train-rpg", plans, data_root)
        return
    if recipe and len(recipe) > 1:
        raise UsageError("several recipes were given.", "One at a time; several only with --dry-run.")
    resolved = stored_recipe(common, recipe[0] if recipe else None, assignments, "rpg")
    with running(
        console, common, "train-rpg", out=out, data_root=data_root, download=download, force=force, resume=resume
    ) as run:
        found = pipeline.run_train_rpg(run, resolved)
    selection = found.facts["selection"]
    rows = []
    for entry in (selection or {"tried": []})["tried"]:
        s, chosen = entry["sampling"], "chosen" if entry == selection["chosen"] else ""
        rows.append([s["sampler"]["kind"], s["num_steps"], f"{s['temperature']:g}", f"{entry['accuracy']:.4f}", chosen])
    if rows:
        columns = ["sampler", "steps", "temperature", "accuracy", ""]
        console.table("sampling, on validation tasks and images", columns, rows, numeric=columns[1:4])
    facts = {k: found.facts[k] for k in ("num_weights", "num_tokens", "num_states", "selection")}
    finish(console, common, found, facts, "generate")


@command("generate")
def generate(
    console: Console,
    common: Common,
    recipe: RecipeArgument = None,
    task_bits: Annotated[str | None, typer.Option(metavar="BITS", help="The task: one bit for each class.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="LIST", help="The task as classes: 2,4.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="FILE|-", help="Many tasks: one bit string a line.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Networks for each task.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm or dpm-solver++.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Scale of the starting noise.")] = None,
    state: Annotated[str | None, typer.Option(metavar="random|none|I", help="Permutation state.")] = None,
    set_: SetOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    force: ForceOption = False,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Write new networks for a task, or for all validation and unseen tasks and some seen ones."""
    from rpgcli import artifact, pipeline

    if sum(x is not None for x in (task_bits, classes, tasks)) > 1:
        raise UsageError("several of --task-bits, --classes and --tasks were given.", "Give one of them.")
    given = {"count": count, "num_steps": steps, "temperature": temperature, "seed": seed}
    assignments = [*(set_ or []), *(f"generate.{k}={v}" for k, v in given.items() if v is not None)]
    assignments += [f'generate.sampler={{kind: "{sampler}"}}'] if sampler is not None else []
    assignments += [f'generate.state="{state}"'] if state is not None else []
    config = stored_recipe(common, recipe, assignments, "generate").generate
    trained = artifact.read(common.run / "rpg", "train-rpg")
    request = make_request(trained, config, task_bits, classes, tasks)
    if dry_run:
        total = config.count * len(request.tasks)
        size = total * 4 * trained.facts["num_parameters"]
        console.note(f"{total} networks · {human_bytes(size)} · request {request.name}")
        console.result({"networks": total, "bytes": size, "request": request.name})
        return
    with running(console, common, "generate", out=out, force=force, resume=resume) as run:
        found = pipeline.run_generate(run, request, config, trained)
    seconds = found.manifest.volatile.get("seconds_per_network", [])
    networks = [
        {**n, "path": str(found.path / n["file"]), "seconds": s} for n, s in zip(found.facts["networks"], seconds)
    ]
    rows = [
        [n["file"], n["split"], in_words(n["task_bits"], found.facts["classes"]), n["run"], f"{n['seconds']:.3f}"]
        for n in networks[:20]
    ]
    console.table(
        f"{len(networks)} networks in {found.path}",
        ["file", "task is", "asked for", "state", "seconds"],
        rows,
        numeric=["state", "seconds"],
    )
    if len(networks) > len(rows):
        console.note(f"and {len(networks) - len(rows)} more")
    following = "evaluate" if request.name in {"tasks", "all"} else f"inspect {shlex.quote(str(found.path))}"
    finish(console, common, found, {"networks": networks, "sampling": found.facts["sampling"]}, following)


@command("evaluate")
def evaluate(
    console: Console,
    common: Common,
    recipe: RecipeArgument = None,
    request: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Folder in RUN/generated to judge; default: of `rpg generate` without a task."
        ),
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit 5 if generated networks stay below.")
    ] = None,
    set_: SetOption = None,
    zoo: ZooOption = None,
    out: OutOption = None,
    seed: SeedOption = None,
    data_root: DataRootOption = None,
    download: DownloadOption = False,
    force: ForceOption = False,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Compare generated networks with trained ones and with trivial generators, on test images."""
    from rpgcli import pipeline

    assignments = [*(set_ or []), *([f"evaluate.seed={seed}"] if seed is not None else [])]
    resolved = stored_recipe(common, recipe, assignments, "evaluate")
    if dry_run:
        show_plan(console, common, "evaluate", [resolved], data_root)
        return
    at = pipeline.generated_folder(common.run, request, resolved)
    with running(
        console,
        common,
        "evaluate",
        zoo=zoo,
        out=out,
        data_root=data_root,
        download=download,
        force=force,
        resume=resume,
    ) as run:
        found = pipeline.run_evaluate(run, resolved, at)
    report = found.json("report.json")
    rows = []
    for g in report["groups"]:
        a, s = g["accuracy"], g["seconds_per_network"]
        figures = [f"{a[k]:.4f}" for k in ("mean", "se", "min", "max")] if a else ["-"] * 4
        rows.append([g["name"], g["kind"], g["split"], g["count"], *figures, "-" if s is None else f"{s:.3g}"])
    columns = ["name", "kind", "split", "count", "mean", "se", "min", "max", "s/network"]
    console.table(f"accuracy on {report['num_test_images']} test images", columns, rows, numeric=columns[3:])
    console.done(report["verdict"])
    finish(console, common, found, report, f"verify {shlex.quote(str(common.run))}")
    if min_accuracy is not None:
        pipeline.check_gate(report, min_accuracy, found.path)


# --- helpers ----------------------------------------------------------------------------------------------------------


@command("recipes")
def recipes(
    console: Console,
    common: Common,
    name: Annotated[str | None, typer.Argument(help="Show this recipe.")] = None,
    copy: Annotated[Path | None, typer.Option("--copy", metavar="FILE", help="Write it to a file.")] = None,
) -> None:
    """List the recipes that come with rpg, show one, or copy it."""
    from rpgcli import recipe as module

    known = module.embedded()
    if name is None:
        heads = {key: first_line(file.read_text()) for key, file in known.items()}
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
    elif not common.json:
        sys.stdout.write(text)
    console.result({"name": name, "text": text})


@command("inspect")
def inspect_(
    console: Console,
    common: Common,
    path: Annotated[
        Path | None, typer.Argument(help="A run, an artifact, or a safetensors file; default: --run.")
    ] = None,
) -> None:
    """Show what a run, an artifact or a network file holds."""
    from rpgcli import artifact

    path = path or common.run
    if path.is_file():
        tensors = artifact.tensors_of(path)
        rows = [[name, "x".join(map(str, shape)) or "scalar", dtype] for name, (dtype, shape) in tensors.items()]
        console.table(str(path), ["tensor", "shape", "dtype"], rows, numeric=["shape"])
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
        facts = [[k, v] for k, v in summaries[0]["facts"].items()]
        console.table("", ["fact", "value"], facts)
    console.result({"artifacts": summaries})


@command("verify")
def verify(
    console: Console,
    common: Common,
    path: Annotated[Path | None, typer.Argument(help="A run or an artifact; default: --run.")] = None,
) -> None:
    """Check every byte of an artifact, or of all in a run, against the manifests."""
    from rpgcli import artifact

    problems, rows = [], []
    for folder in artifacts_in(path or common.run):
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
def doctor(console: Console, common: Common, data_root: DataRootOption = None) -> None:
    """Say what this machine offers: versions, device, kernels, threads, disk, data sets."""
    from rpgcli import diagnosis

    setup(common)
    found = diagnosis.examine(pick_device(common.device), common.run, data_root)
    console.table("", ["what", "found"], found.rows)
    console.result(found.to_json())
    for problem in found.problems:
        console.warn(problem)
    if found.broken:
        raise RpgError("something that rpg needs does not work.", *found.broken)


# --- shared by commands -----------------------------------------------------------------------------------------------


class running:
    """A stage at work: threads and device set, progress shown, signals turned into `Interrupted`."""

    def __init__(self, console: Console, common: Common, stage: str, **options: Any) -> None:
        self.console, self.common, self.stage, self.options = console, common, stage, options
        self.signal = 0
        self.bars = ExitStack()
        self.shown: tuple[str, int] | None = None
        self.advance: Advance | None = None

    def __enter__(self) -> "Run":
        from rpgcli import pipeline

        setup(self.common)
        run = pipeline.Run(
            self.common.run, device=pick_device(self.common.device), dtype=pick_dtype(self.common.dtype),
            on_step=self.on_step, **self.options,
        )  # fmt: skip
        self.before = {s: signal.signal(s, self.stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return run

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.bars.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal and kind is None:
            raise Interrupted(self.signal, f"rpg {self.stage} was complete by then: the same command shows its result.")

    def stop(self, number: int, frame: object) -> None:
        """The first signal ends the stage at its next step, a second one at once."""
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        self.console.note("stopping after this step; once more stops at once")

    def on_step(self, step: Step) -> None:
        """Show a step; a new phase gets a new bar."""
        if self.signal:
            raise Interrupted(self.signal, f"Type the same command with --resume to go on: rpg {self.stage} ...")
        if self.shown != (step.phase, step.total):
            self.bars.close()
            title = f"{self.stage}: {step.phase}" if step.phase else self.stage
            self.advance = self.bars.enter_context(self.console.progress(title, step.total, step.unit))
            self.shown = (step.phase, step.total)
        assert self.advance is not None
        self.advance(step.done, **step.facts)


def setup(common: Common) -> None:
    """Threads of this process."""
    import torch

    if common.threads is not None:
        torch.set_num_threads(common.threads)


def pick_device(text: str) -> Any:
    """The device that --device names.

    Raises:
        UsageError: If it does not exist here.
    """
    import torch

    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = text.partition(":")
    if kind not in {"cpu", "cuda"} or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise UsageError(f"--device {text!r} is not a device.", "Give auto, cpu, cuda or cuda:I.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {text} does not exist here.", f"CUDA devices found: {torch.cuda.device_count()}.")
    return torch.device(text)


def pick_dtype(text: str) -> Any:
    """The dtype that --dtype names."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text not in known:
        raise UsageError(f"--dtype {text!r} is unknown{nearest(text, known)}")
    return known[text]


def stored_recipe(
    common: Common, name: str | None, assignments: Sequence[str] | None, own: str, *, fresh: bool = False
) -> "Recipe":
    """The run's recipe (or the named one, where the run has none yet) with overrides of the stage's own section."""
    from rpgcli import pipeline
    from rpgcli import recipe as module

    for assignment in assignments or []:
        section = assignment.partition("=")[0].split(".")[0].strip()
        if section != own and not fresh:
            raise UsageError(
                f"--set {assignment}: this stage reads only the section {own!r}.",
                "Settings of earlier stages are fixed by what they made; give them to those stages.",
            )
    stored = common.run / pipeline.RECIPE
    if stored.is_file() and not fresh:
        if name is not None and module.load(name).to_json() != module.read_stored(stored).to_json():
            raise UsageError(
                f"{common.run} has a recipe already, and {name} is another one.",
                f"Leave it out, use --set {own}.KEY=VALUE, or choose another --run.",
            )
        return module.read_stored(stored, assignments or [])
    return module.load(name, assignments or [])


def make_request(trained: Any, config: Any, task_bits: str | None, classes: str | None, tasks: str | None) -> Any:
    """What `rpg generate` was asked for."""
    from rpgcli import artifact, pipeline
    from rpgcli.tasks import parse_classes, parse_task_bits, read_tasks

    if task_bits is None and classes is None and tasks is None:
        return pipeline.default_request(trained, config)
    names = trained.facts["network"]["classes"]
    if not trained.facts["num_bits"]:
        raise UsageError(
            "this model is unconditional: it knows no tasks.", "Leave out --task-bits, --classes and --tasks."
        )
    if tasks is None:
        bits = parse_task_bits(task_bits, names) if task_bits is not None else parse_classes(classes or "", names)
        return pipeline.request_of(trained, [bits], bits)
    try:
        lines = sys.stdin.readlines() if tasks == "-" else Path(tasks).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--tasks {tasks} cannot be read: {error}.", "Give a text file with one bit string a line."
        ) from None
    listed = read_tasks(lines, names)
    return pipeline.request_of(trained, listed, f"list-{artifact.digest(listed)[:8]}")


def in_words(bits: str | None, classes: Sequence[str]) -> str:
    """Which classes a task asks for."""
    return "-" if bits is None else f"{bits} ({', '.join(c for c, bit in zip(classes, bits) if bit == '1')})"


def finish(console: Console, common: Common, found: Any, facts: Any, following: str) -> None:
    """The last words of a stage: what was made, and what to type next."""
    seconds = found.manifest.volatile.get("seconds", 0.0)
    console.done(f"{found.path}: up to date" if not found.made_now else f"{found.path} in {human_seconds(seconds)}")
    if isinstance(facts, dict) and "schema" in facts:
        console.result(facts)
    else:
        console.result(
            {
                "path": str(found.path),
                "id": found.id,
                "up_to_date": not found.made_now,
                "seconds": seconds,
                "facts": facts,
            }
        )
    known = common.run == Path("runs/default") or following.startswith(("inspect", "verify"))
    console.next_command(f"rpg {following}" if known else f"rpg {following} --run {shlex.quote(str(common.run))}")


def show_plan(
    console: Console, common: Common, stage: str, resolved: Sequence["Recipe"], data_root: Path | None
) -> None:
    """What a stage would do, without doing it."""
    from rpgcli import planning

    setup(common)
    device = pick_device(common.device)
    zoo = common.run / "zoo"
    plans = [planning.plan(stage, recipe, zoo=zoo, data_root=data_root, device=device) for recipe in resolved]
    for plan in plans:
        rows = [in_units(name, value) for name, value in plan.items() if name not in {"recipe", "stage"}]
        console.table(f"{plan['recipe']}: rpg {stage}", ["what", "how much"], rows, numeric=["how much"])
    console.result({"plans": plans})


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


def first_line(text: str) -> str:
    """The first comment of a recipe."""
    return next((line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")), "")


def show_version(asked: bool) -> None:
    """`rpg --version`."""
    if asked:
        sys.stdout.write(f"rpg {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Collect zoos of trained networks, learn their parameters, generate new networks, and judge them."""


def fail(console: Console, error: RpgError, *, trace: bool) -> NoReturn:
    """Show an error once and end with its exit code."""
    console.error(error)
    if trace:
        traceback.print_exception(error)
    raise typer.Exit(error.exit_code)


def report_bug(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What is shown of an exception that nobody foresaw."""
    what = f"internal error: {kind.__name__}: {error}"
    Console(json_mode="--json" in sys.argv).error(
        RpgError(what, "This is a fault of rpg. -vv shows where it happened.")
    )


def close_pipes() -> None:
    """After a reader has gone: let nothing more be written to it, not even at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_app() -> Any:
    """Run the command; what nobody foresaw ends in `report_bug`, with -vv in a traceback."""
    try:
        return app(standalone_mode=False)
    finally:
        if not any(a.startswith("-vv") for a in sys.argv):
            sys.excepthook = report_bug  # Not earlier: Typer puts its own hook there.


def main() -> NoReturn:
    """Run the command line and exit with the code that its outcome has."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Waiting threads that spin starve other processes.
    try:
        code = run_app()
        sys.stdout.flush()
    except ClickUsageError as error:
        wrong = UsageError(error.format_message(), "See --help.")
        if wrong.what:  # Without any argument the help was shown instead.
            Console(json_mode="--json" in sys.argv).error(wrong)
        code = wrong.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    if code == 128 + signal.SIGPIPE:
        close_pipes()
    sys.exit(code if isinstance(code, int) else 0)
