"""What every command of `rpg` shares: options, the decorator that registers it, a stage at work, and how it all ends.

    main -> app -> command(...) -> running(...) -> the stage

torch and everything that imports it are imported inside functions, so that `rpg --help` answers at once.
"""

import inspect
import io
import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rpgcli import __version__
from rpgcli.console import Advance, Console, human_seconds
from rpgcli.errors import Interrupted, RpgError, UsageError, nearest
from rpgcli.progress import Step
from rpgcli.ranks import ALONE, Ranks, Released, here

if TYPE_CHECKING:
    from rpgcli.artifact import Artifact
    from rpgcli.pipeline import Run
    from rpgcli.recipe import Recipe
    from rpgcli.sharding import Shard, Share

ClickUsageError: Any = typer.BadParameter.__base__
"""Typer carries its own click: this is its class of wrong arguments."""

app = typer.Typer(
    name="rpg",
    help="Collect zoos of trained networks, learn their parameters, generate new networks, and judge them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A pipeline: rpg collect, tokenize, train-rpg, generate, evaluate; for p-diff train-ae and train-diffusion "
    "instead of train-rpg. Each ends by naming the next command.",
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
ZooOption = Annotated[Path | None, typer.Option("--zoo", help="Read the zoo from this folder instead of the run's.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of this stage.")]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="rpg, pdiff, or a trivial generator: average, average-trunk, soup (soup-16), interpolation, gaussian, "
        "noise (noise-0.1), kde (latent-kde), finetuned, ...; of tasks: nearest, ridge, ridge-pairs, mlp, ...; "
        "default: the only model that the run holds.",
    ),
]
DataRootOption = Annotated[Path | None, typer.Option("--data-root", help="Folder that holds the data set's files.")]
DownloadOption = Annotated[bool, typer.Option("--download", help="Allow fetching data sets or published weights.")]

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the recipe; repeatable.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the artifact to this folder instead of the run.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there, atomically, at the end.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted stage.")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Compute only part I of N, I from 0 to N - 1; the same command without --shard, with --resume, puts all "
        "together. Machines share the run's folder.",
    ),
]
ExecutorOption = Annotated[
    str | None,
    typer.Option(metavar="local:N|ray", help="Share the work among N processes (each with --threads), or over Ray."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show counts, sizes and a time estimate; do nothing.")]


def not_nan(value: float | None) -> float | None:
    """NaN lies in every range of a typer before 0.29."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a number.")
    return value


@dataclass(frozen=True)
class Options:
    """Options that every command has."""

    run: Annotated[Path, typer.Option("--run", envvar="RPG_RUN", help="Folder of the run.")] = Path("runs/default")
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:I.")] = "auto"
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (the latter two: autocast).")] = "float32"
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results, warnings and errors.")] = False
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="More notes; -vv: tracebacks.")] = 0


@dataclass(frozen=True)
class StageOptions(Options):
    """Options that every stage has besides."""

    settings: SetOption = None
    out: OutOption = None
    force: ForceOption = False
    resume: ResumeOption = False
    dry_run: DryRunOption = False

    def assignments(self, shortcuts: Mapping[str, object]) -> list[str]:
        """`key=value` of --set, then of the shortcuts that were given."""
        given = [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
        return [*(self.settings or []), *given]


@dataclass(frozen=True)
class SharedOptions(StageOptions):
    """Options of a stage that several processes or machines can share."""

    shard: ShardOption = None
    executor: ExecutorOption = None


# --- commands ---------------------------------------------------------------------------------------------------------


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(console, options, ...)`: its own parameters become arguments and options of the command.

    The options that it shares with others are those of the class that `options` is annotated with.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _, options, *own = inspect.signature(function).parameters.values()
        kind = options.annotation
        shared = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in sorted(fields(kind), key=lambda f: hasattr(Options, f.name))  # Those of all commands come last.
        ]

        def run(**arguments: Any) -> None:
            given: Options = kind(**{f.name: arguments.pop(f.name) for f in fields(kind)})
            console = Console(quiet=given.quiet, verbose=given.verbose, json_mode=given.json)
            ranks = ALONE
            try:
                ranks = here()
                if given.run.exists() and not given.run.is_dir():
                    raise UsageError(f"--run {given.run} is not a folder.", "Name a folder, or one that can be made.")
                shown = console if ranks.first else Console(quiet=True, stdout=io.StringIO(), stderr=io.StringIO())
                with shown.listening():
                    function(shown, given, **arguments)
            except Released:
                return
            except RpgError as error:
                fail(console, error, ranks, trace=given.verbose >= 2)
            except BrokenPipeError:
                raise typer.Exit(128 + signal.SIGPIPE) from None
            except OSError as error:
                what = f"{error.filename or 'the system'}: {error.strerror or error}."
                fail(console, RpgError(what, "Nothing that existed was changed."), ranks, trace=given.verbose >= 2)

        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature([*keyword, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*keyword, *shared]}
        app.command(name, help=inspect.getdoc(function))(run)
        return function

    return register


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


# --- a stage at work --------------------------------------------------------------------------------------------------


def stored_recipe(
    options: Options, name: str | None, assignments: list[str], own: str, *, fresh: bool = False
) -> "Recipe":
    """The run's recipe (or the named one, where the run has none yet) with overrides of the stage's own section.

    Raises:
        UsageError: If another section is overridden, or the run has a recipe and `name` is another one.
    """
    from rpgcli import pipeline
    from rpgcli import recipe as recipes

    for assignment in assignments:
        section = assignment.partition("=")[0].split(".")[0].strip()
        if section != own and not fresh:
            raise UsageError(
                f"--set {assignment}: this stage reads only the section {own!r}.",
                "Settings of earlier stages are fixed by what they made; give them to those stages.",
            )
    stored = options.run / pipeline.RECIPE
    if not stored.is_file() or fresh:
        return recipes.load(name, assignments)
    if name is not None and recipes.load(name).to_json() != recipes.read_stored(stored).to_json():
        raise UsageError(
            f"{options.run} has a recipe already, and {name} is another one.",
            f"Leave it out, use --set {own}.KEY=VALUE, or choose another --run.",
        )
    return recipes.read_stored(stored, assignments)


class running:
    """A stage at work: threads and device set, progress shown, signals turned into `Interrupted`."""

    def __init__(self, console: Console, options: StageOptions, stage: str, **more: Any) -> None:
        self.console, self.options, self.stage, self.more = console, options, stage, more
        self.merges = isinstance(options, SharedOptions) and options.executor is not None
        """Whether other processes compute what this one puts together."""
        self.signal = 0
        self.bars = ExitStack()
        self.shown: tuple[str, int] | None = None
        self.advance: Advance | None = None

    def __enter__(self) -> "Run":
        from rpgcli import pipeline

        given, ranks = self.options, here()
        set_threads(given)
        if ranks.size > 1 and not self.stage.startswith("train-"):
            raise UsageError(
                f"torchrun has started rpg {self.stage} {ranks.size} times, and each would do the same.",
                "Only train-rpg, train-ae and train-diffusion share their work; type rpg without torchrun.",
            )
        device = pick_device(given.device)
        run = pipeline.Run(
            given.run, device=device, dtype=pick_dtype(given.dtype), on_step=self.on_step, out=given.out,
            force=given.force, resume=given.resume or self.merges, ranks=ranks.join(device), **self.more,
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
        with suppress(RuntimeError):  # The signal may have come in the middle of a line.
            self.console.note("stopping after this step; once more stops at once")

    def on_step(self, step: Step) -> None:
        """Show a step; a new phase gets a new bar."""
        if self.signal:
            raise Interrupted(self.signal, "Type the same command with --resume to go on.")
        if self.shown != (step.phase, step.total):
            self.bars.close()
            title = f"{self.stage}: {step.phase}" if step.phase else self.stage
            self.advance = self.bars.enter_context(self.console.progress(title, step.total, step.unit))
            self.shown = (step.phase, step.total)
        assert self.advance is not None
        self.advance(step.done, **step.facts)


def in_shards(
    console: Console, options: SharedOptions, stage: str, share: Callable[["Run", "Shard"], "Share"], **more: Any
) -> bool:
    """Compute what --shard names and say so; or, with --executor, let other processes compute all shards.

    Returns:
        Whether that was all: True for a shard, False where the stage itself follows.

    Raises:
        UsageError: If an option has a wrong form, or both are given.
    """
    from rpgcli import sharding

    shard = None if options.shard is None else sharding.Shard.parse(options.shard)
    executor = None if options.executor is None else sharding.Executor.parse(options.executor)
    if shard is not None and executor is not None:
        raise UsageError("--shard and --executor were given.", "An executor starts all shards: leave out --shard.")
    if executor is not None:
        with running(console, options, stage, **more) as run:
            executor.run(shard_arguments(options), run.on_step, devices=devices_of(options))
    if shard is None:
        return False
    with running(console, options, stage, **more) as run:
        found = share(run, shard)
    if found.finished is not None:
        console.done(f"{found.finished.path}: up to date")
    else:
        new = f"{found.num_computed} of them new" if found.num_computed else "up to date"
        console.done(f"shard {shard}: {found.num_blocks} of {found.num_all} blocks in {found.folder}, {new}")
    console.result({
        "shard": str(shard), "path": str(found.folder), "blocks": found.num_blocks, "computed": found.num_computed,
        "blocks_of_all": found.num_all, "up_to_date": not found.num_computed,
    })  # fmt: skip
    return True


def shard_arguments(options: SharedOptions) -> list[str]:
    """The command line that is at work, as it is given to shards."""
    words = sys.argv[1:]
    for i, word in enumerate(words):
        if word.partition("=")[0] == "--executor":
            del words[i : i + 1 + (word == "--executor")]
            break
    return [words[0], "--run", str(options.run), "--json", "--quiet", *words[1:]]


def devices_of(options: SharedOptions) -> list[str]:
    """The GPUs that shards of this machine share out among them, if there are several and none was named."""
    import torch

    num = torch.cuda.device_count() if options.device in {"auto", "cuda"} else 0
    return [f"cuda:{i}" for i in range(num)] if num > 1 else []


def finish(console: Console, options: Options, found: "Artifact", facts: dict[str, Any], following: str) -> None:
    """The last words of a stage: what was made, and what to type next. A report, which has a schema, is its result."""
    seconds = found.manifest.volatile.get("seconds", 0.0)
    console.done(f"{found.path}: up to date" if not found.made_now else f"{found.path} in {human_seconds(seconds)}")
    made = {"path": str(found.path), "id": found.id, "up_to_date": not found.made_now, "seconds": seconds}
    console.result(facts if "schema" in facts else made | {"facts": facts})
    if isinstance(options, StageOptions) and options.out is not None and str(options.out) not in following:
        following = f"inspect {shlex.quote(str(found.path))}"  # Later stages look for it in the run.
    known = options.run == Path("runs/default") or following.startswith(("inspect", "verify"))
    console.next_command(f"rpg {following}" if known else f"rpg {following} --run {shlex.quote(str(options.run))}")


def set_threads(options: Options) -> None:
    """Threads of this process."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)


def pick_device(text: str) -> Any:
    """The device that --device names; of the processes that train together, each has a GPU of its own.

    Raises:
        UsageError: If it does not exist here.
    """
    import torch

    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = text.partition(":")
    if kind not in {"cpu", "cuda"} or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise UsageError(f"--device {text!r} is not a device.", "Give auto, cpu, cuda or cuda:I.")
    if kind == "cuda" and here().size > 1:
        if number:
            raise UsageError(f"--device {text} gives all processes the same GPU.", "Leave it out: each takes its own.")
        text, number = f"cuda:{here().local_rank}", str(here().local_rank)
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {text} does not exist here.", f"CUDA devices found: {torch.cuda.device_count()}.")
    return torch.device(text)


def pick_dtype(text: str) -> Any:
    """The dtype that --dtype names.

    Raises:
        UsageError: If it is unknown.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text not in known:
        raise UsageError(f"--dtype {text!r} is unknown{nearest(text, known)}")
    return known[text]


# --- how it ends ------------------------------------------------------------------------------------------------------


def fail(console: Console, error: RpgError, ranks: Ranks, *, trace: bool) -> NoReturn:
    """Show an error once, in whichever process it ends first, and end with its exit code."""
    if ranks.fail_with(error):
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
