"""p-diff's ablations (arXiv 2402.13144) repeated on Fashion-MNIST: `make ablations`.

    base network, once -> zoo, one for each of its settings -> tokens -> autoencoder -> diffusion -> networks, measured

A table holds rows, a row is a recipe: a composition (the fast default, or the paper's) and what the row changes in it.
Rows with equal recipes share one cell, whichever table they stand in. A cell is measured `repeats` times; a repeat
differs in all seeds but the base network's, that of the run whose snapshots are the zoo included. What is kept of a
cell is an artifact of numbers; the 90 MB of frozen parameters beside its tokens and its model are not. An interrupted
run goes on where it was, and the same run again finds everything up to date.

Unlike the paper's, networks are ResNet-18s on 28 x 28 images of Fashion-MNIST and small samples of those, so rows
compare with the rows beside them; the paper's own numbers (CIFAR-100) stand there for their order.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rpgcli import artifact, rng
from rpgcli.artifact import Artifact
from rpgcli.autoencoder import LatentScale
from rpgcli.collection import SeedsConfig, TrajectoryConfig
from rpgcli.conditions import Asked
from rpgcli.errors import DataError, OutputError, RpgError
from rpgcli.evaluation.accuracy import best
from rpgcli.evaluation.similarity import error_iou, nearest, pairs
from rpgcli.generation import Generator, Request, Sampling
from rpgcli.methods.pdiff import Vectors, encode
from rpgcli.methods.resampling import Originals, kernel_density, network
from rpgcli.models import read_autoencoder, read_model, sampling_of
from rpgcli.pipeline import Run, run_collect, run_tokenize, run_train_ae, run_train_diffusion
from rpgcli.problem import ProblemConfig, Split, State
from rpgcli.recipe import Recipe, as_today, load, section
from rpgcli.subsets import Tail
from rpgcli.tokens import TokenStore
from rpgcli.zoo import Zoo

DEVICE = torch.device("cpu")
Draw = Literal["diffusion", "prior", "kde"]
"""What latents are drawn from: the diffusion, N(0, 1) (of a VAE), or a kernel density estimate of the latents."""


# --- the tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one row changes in the composition."""

    name: str
    settings: tuple[str, ...] = ()
    """As after `--set`."""
    paper: str = ""
    """Best / mean / median of the paper's generated networks, in percent."""
    draw: Draw = "diffusion"


@dataclass(frozen=True)
class Table:
    """Rows that are to be compared."""

    name: str
    title: str
    rows: tuple[Row, ...]


def tables(recipe: Recipe) -> tuple[Table, ...]:
    """The paper's ablations of a composition.

    Layers are those of the release: it trains bn1 and bn2 of two blocks of layer3 for the paper's BN10-14, of the first
    block of layer4 for BN14-16, of the second for BN16-18, and counts no norm of a shortcut, as `norm:` ranges do: each
    is 2,048 values. Its `conv` is the first convolution, its `linear` the last layer, both at a learning rate of 3e-4.
    No file of it says which shortcut is meant: here it is that of layer3, 33,280 values. All that comes after the first
    convolution has to be computed anew for each network, so that row looks at fewer images.
    """
    net, latent_dim = recipe.autoencoder.network, recipe.autoencoder.network.latent_dim
    is_conv = recipe.diffusion.denoiser.kind == "conv"
    conv = recipe.diffusion.denoiser.model_dump() if is_conv else {"kind": "conv", "norm": "group", "time": "add"}
    shape = net.model_dump(include={"latent_dim", "channels", "kernel_size", "norm", "input_noise"})
    conv_denoiser, vae = (json.dumps(value) for value in (conv, {"kind": "vae", **shape}))
    mlp_denoiser = "{kind: mlp, width: 128, depth: 3}" if is_conv else recipe.diffusion.denoiser.model_dump_json()
    slower = "collect.save.learning_rate=3e-4"

    def noises(at_input: float, at_latent: float) -> tuple[str, ...]:
        return f"autoencoder.network.input_noise={at_input}", f"autoencoder.network.latent_noise={at_latent}"

    def steps(num_steps: int, *more: str) -> tuple[str, ...]:
        """T of the diffusion; sampled as the composition does: at each step, or at the few that it takes."""
        usual = recipe.generate.num_steps or Sampling().num_steps
        asked = num_steps if usual == recipe.diffusion.diffusion.num_steps else min(usual, num_steps)
        sampled = () if asked == usual else (f"generate.num_steps={asked}",)
        return f"diffusion.diffusion.num_steps={num_steps}", *sampled, *more

    def norms(norm: str) -> tuple[str, ...]:
        inside = [f"autoencoder.network.norm={norm}", *([f"diffusion.denoiser.norm={norm}"] if is_conv else [])]
        return tuple(inside)

    raw = "diffusion.diffusion.schedule=linear", "diffusion.diffusion.rescale=false"
    fewer_images = "dataset.num_validation=250", "dataset.max_test=500"
    return (
        Table("checkpoints", "Number K of checkpoints in the zoo (500: of one more epoch)", (
            Row("K = 1", ("collect.num_checkpoints=1",), "76.6/70.7/73.2"),
            Row("K = 10", ("collect.num_checkpoints=10",), "76.5/71.2/73.8"),
            Row("K = 50", ("collect.num_checkpoints=50",), "76.7/71.3/74.3"),
            Row("K = 200", ("collect.num_checkpoints=200",), "76.9/72.4/75.6"),
            Row("K = 500", ("collect.num_checkpoints=500", "collect.save.epochs=3"), "76.8/72.3/75.4"),
        )),
        Table("depth", "Depth of the generated norms", (
            Row("BN10-14", ("collect.parameters=['norm:11-12', 'norm:14-15']",), "76.8/71.9/75.3"),
            Row("BN14-16", ("collect.parameters=['norm:16-17']",), "76.9/72.2/75.5"),
            Row("BN16-18", (), "76.9/72.4/75.6"),
        )),
        Table("type", "Type of the generated parameters (conv: on 500 test images)", (
            Row("linear", ("collect.parameters=['linear:last']", slower), "76.6/47.3/71.1"),
            Row("conv", ("collect.parameters=['conv:first']", slower, *fewer_images), "76.2/71.3/76.1"),
            Row("shortcut", ("collect.parameters=['shortcut:2']", slower), "76.0/73.6/75.7"),
            Row("bn", (), "76.9/72.4/75.6"),
        )),
        Table("noise", "Noise on input and latent of the autoencoder", (
            Row("none", noises(0, 0), "76.7/65.8/65.0"),
            Row("input", noises(1e-3, 0), "76.7/66.7/67.3"),
            Row("latent", noises(0, 0.1), "76.7/72.1/75.3"),
            Row("both", noises(1e-3, 0.1), "76.9/72.4/75.6"),
        )),
        Table("input-noise", "Deviation of the noise on the input", tuple(
            Row(f"{sigma:g}", noises(sigma, 0.1), f"-/{mean}/-")
            for sigma, mean in ((1e-4, 72.1), (1e-3, 72.4), (1e-2, 70.4), (1e-1, 71.4))
        )),
        Table("latent-noise", "Deviation of the noise on the latent", tuple(
            Row(f"{sigma:g}", noises(1e-3, sigma), f"-/{mean}/-")
            for sigma, mean in ((1e-3, 67.3), (1e-2, 70.1), (1e-1, 72.6), (1.0, 74.0))
        )),
        Table("steps", "Diffusion steps T (raw: the paper's betas for T = 1000, whatever T)", (
            *(Row(f"T = {t}", steps(t)) for t in (10, 100, 1000, 2000)),
            Row("T = 10, raw", steps(10, *raw), "76.6/70.6/74.9"),
            Row("T = 100, raw", steps(100, *raw), "76.8/75.9/76.5"),
            Row("T = 1000, raw", steps(1000, *raw), "76.9/72.4/75.6"),
            Row("T = 2000, raw", steps(2000, *raw), "76.8/73.1/75.1"),
        )),
        Table("normalisation", "Norm inside the generator", (
            Row("none", norms("none"), "-/67.4/-"), Row("batch", norms("batch"), "-/70.7/-"),
            Row("group", norms("group"), "-/72.1/-"), Row("instance", norms("instance"), "-/72.4/-"),
        )),
        Table("optimiser", "Optimiser of the run that makes the zoo (paper's originals: adam 70.5, adamw 71.5)", (
            Row("sgd", ("collect.save.optimiser=sgd",)),
            Row("adam", ("collect.save.optimiser=adam",), "70.5/64.6/69.3"),
            Row("adamw", ("collect.save.optimiser=adamw",), "71.6/67.0/70.5"),
        )),
        Table("generator", "What latents are drawn from", (
            Row("VAE", (f"autoencoder.network={vae}",), "76.7/62.7/70.8", "prior"),
            Row("AE + KDE", (), "76.7/70.3/73.4", "kde"),
            Row("p-diff", (), "76.9/72.4/75.6"),
        )),
        Table("architecture", "Convolutions against full connection (paper: a whole ConvNet-3 on MNIST)", (
            Row("conv", (f"diffusion.denoiser={conv_denoiser}",), "99.2/92.1/-"),
            Row("fc", (f"autoencoder.network={{kind: mlp, latent_dim: {latent_dim}}}",
                       f"diffusion.denoiser={mlp_denoiser}"), "98.0/90.1/-"),
            Row("conv, fc denoiser", (f"diffusion.denoiser={mlp_denoiser}",)),
        )),
    )  # fmt: skip


# --- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What one or several rows ask for."""

    name: str
    """`table/row` of the first of these rows: where it lies."""
    settings: tuple[str, ...]
    draw: Draw


@dataclass(frozen=True)
class Bench:
    """A composition, and where its cells lie."""

    out: Path
    composition: str
    """A recipe, by name or path."""
    networks: int
    """Networks drawn for each repeat of a cell."""

    def recipe(self, settings: Sequence[str] = (), repeat: int = 0) -> Recipe:
        """The composition with some settings and the seeds of a repeat."""
        seeds = [f"{name}seed={repeat}" for name in ("", "autoencoder.", "diffusion.", "generate.")]
        return load(self.composition, [*settings, *seeds])

    def cells(self, rows: Iterable[tuple[str, Row]]) -> dict[str, Cell]:
        """The cell of each row, given with the name of its table, under `table/row`; equal recipes share one."""
        first: dict[str, Cell] = {}
        found = {}
        for table, row in rows:
            key = artifact.digest([self.recipe(row.settings).to_json(), row.draw])
            name = f"{table}/{row.name}"
            found[name] = first.setdefault(key, Cell(folder_name(name), row.settings, row.draw))
        return found

    def base(self) -> Artifact:
        """The base network of all cells: a zoo of one whole network."""
        recipe = self.recipe()
        whole = SeedsConfig(num_networks=1, training=trajectory(recipe).training)
        return run_collect(Run(self.out / "base", resume=True), recipe.model_copy(update={"collect": whole}))

    def zoo_folder(self, recipe: Recipe) -> Path:
        """Where the zoo of a recipe lies, whatever comes after the zoo."""
        made_from = section(recipe, "seed", "dataset", "task", "target", "collect")
        return self.out / "zoos" / artifact.digest(made_from)[:8]

    def zoo(self, recipe: Recipe, base: Artifact) -> Zoo:
        """Snapshots of the subset of one network, all else as in `base`."""
        given = {"pretrained": str(base.file("00000.safetensors").resolve())}
        changed = recipe.model_copy(update={"collect": trajectory(recipe).model_copy(update=given)})
        return Zoo(run_collect(Run(self.zoo_folder(recipe), resume=True), changed))


def trajectory(recipe: Recipe) -> TrajectoryConfig:
    """How the zoo of a composition is collected."""
    assert isinstance(recipe.collect, TrajectoryConfig), "a composition trains a subset"
    return recipe.collect


def folder_name(name: str) -> str:
    """`steps/t-10-raw` for "steps/T = 10, raw"."""
    return re.sub(r"[^a-z0-9/.]+", "-", name.lower()).strip("-")


class Rig:
    """A zoo of subsets and what measures its networks; the originals are asked once.

    Letters: n networks, K originals, N test images.
    """

    def __init__(self, zoo: Zoo) -> None:
        self.zoo = zoo
        self.problem = ProblemConfig.of(zoo.artifact.section).open(data_root=None, download=False, device=DEVICE)
        seen = zoo.select("seen")
        self.tail = Tail(self.problem, zoo.state(seen[0]), zoo.artifact.facts["parameters"])
        self.validation = [n.accuracy["validation"] for n in seen if n.accuracy is not None]
        self.test = [n.accuracy["test"] for n in seen if n.accuracy is not None]
        self.wrong = self.right(map(zoo.state, seen), "test").logical_not()  # (K, N)

    def right(self, states: Iterable[State], split: Split) -> Tensor:
        """Which images networks answer right, (n, N) bool."""
        labels = self.problem.labels(split, [None])[0]
        return torch.cat([self.tail.predictions([state], split) == labels for state in states]).cpu()

    def figures(self, states: Sequence[State]) -> dict[str, float]:
        """Accuracies and error IoU of networks, beside those of the originals; the best is chosen on validation."""
        validation, right = self.right(states, "validation").double().mean(1).tolist(), self.right(states, "test")
        test: list[float] = right.double().mean(1).tolist()
        wrong = right.logical_not()
        return {
            "original_mean": statistics.mean(self.test), "original_best": best(self.validation, self.test)[1],
            "best": best(validation, test)[1], "mean": statistics.mean(test), "median": statistics.median(test),
            "min": min(test), "iou_nearest": float(nearest(error_iou(wrong, self.wrong)).mean()),
            "iou_within": float(pairs(error_iou(wrong, wrong)).mean()),
        }  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """Networks of a cell."""

    states: Sequence[State]
    deviation_ratio: float
    """Of the latents they were decoded from, over that of the training latents; median over dimensions."""
    seconds: float
    """For training autoencoder and diffusion, and drawing."""


def draw(run: Run, recipe: Recipe, kind: Draw, num: int) -> Drawn:
    """Train what a cell needs and draw `num` networks."""
    tokens = run_tokenize(run, recipe)
    trained = run_train_ae(run, recipe)
    if kind == "diffusion":
        trained = run_train_diffusion(run, recipe, allow_bad=True)
        begun = time.perf_counter()
        generator, sampling = Generator(read_model("pdiff", trained, DEVICE)), sampling_of(trained, recipe.generate)
        samples = Request("all", [Asked()], num).samples()
        made = [
            generator.tokens(s, sampling, seed=recipe.generate.seed, state=recipe.generate.state)[0] for s in samples
        ]
        states, ratio = [generator.network(x) for x in made], trained.facts["latents"]["deviation_ratio"]
    else:
        begun = time.perf_counter()
        store, model = TokenStore(tokens), read_autoencoder(trained, DEVICE)
        latents = encode(model, Vectors(store), DEVICE)  # (K, Z)
        z = drawn_latents(latents, kind, recipe.generate.seed, num)  # (n, Z)
        with torch.no_grad():
            states = [store.rebuilt(x, 0) for x in model.decode(z)]
        scale = LatentScale.of(latents)
        ratio = float(scale.standardise(z).std(0)[scale.std > 0].median())
    seconds = trained.manifest.volatile["training_seconds"] + time.perf_counter() - begun
    return Drawn(states, ratio, seconds)


def drawn_latents(latents: Tensor, kind: Draw, seed: int, num: int) -> Tensor:
    """Without a diffusion: (n, Z) from the prior of a VAE, or from a kernel density estimate of latents (K, Z)."""
    if kind == "prior":
        return torch.randn(num, latents.shape[1], generator=rng.stream(seed, "prior"))
    return torch.stack([network("latent-kde", kernel_density, Originals(latents), seed, i) for i in range(num)])


@dataclass(frozen=True)
class Measured:
    """One repeat of a cell."""

    figures: Mapping[str, float]
    refused: str | None
    """Why there are none."""
    made_now: bool


def measure(bench: Bench, base: Artifact, cells: Sequence[Cell], repeat: int) -> dict[str, Measured]:
    """Measure cells of one zoo under the seeds of one repeat; what was measured before is read."""
    found: dict[str, Measured] = {}
    rig: Rig | None = None
    for cell in cells:
        begun = time.perf_counter()
        recipe, folder = bench.recipe(cell.settings, repeat), bench.out / cell.name / f"repeat-{repeat}"
        made_from = recipe.to_json() | {"draw": cell.draw, "networks": bench.networks}
        with artifact.draft(
            folder / "figures", "ablation", section=made_from, inputs={"base": base.id}, force=False, resume=True,
            as_today=as_today,
        ) as draft:  # fmt: skip
            done = draft.finished
            if done is None:
                rig = rig or Rig(bench.zoo(recipe, base))
                done = draft.commit(*measure_cell(bench, rig, cell, recipe, folder))
        for stage in ("tokens", "autoencoder", "diffusion"):
            shutil.rmtree(folder / stage, ignore_errors=True)
        seconds = {name: value for name, value in done.manifest.volatile.items() if name == "seconds"}
        found[cell.name] = one = Measured(done.facts["figures"] | seconds, done.facts["refused"], done.made_now)
        if one.made_now:
            said = one.refused or f"mean {100 * one.figures['mean']:.2f} %"
            num_done = len(list(bench.out.glob(f"*/*/repeat-*/figures/{artifact.MANIFEST}")))
            print(
                f"{num_done} done · {cell.name} · repeat {repeat} · {time.perf_counter() - begun:.0f} s: {said}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return found


def measure_cell(
    bench: Bench, rig: Rig, cell: Cell, recipe: Recipe, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is kept of a cell: facts, and what varies from run to run."""
    try:
        drawn = draw(Run(folder, zoo=rig.zoo.artifact.path, resume=True), recipe, cell.draw, bench.networks)
    except (OutputError, DataError):
        raise  # About this run, not about the cell.
    except RpgError as error:
        return {"figures": {}, "refused": error.what}, {}
    figures = rig.figures(drawn.states) | {"deviation_ratio": drawn.deviation_ratio}
    return {"figures": figures, "refused": None}, {"seconds": round(drawn.seconds, 3)}


# --- the report -------------------------------------------------------------------------------------------------------

PERCENT = {
    "original_mean": "originals: mean", "original_best": "best", "best": "generated: best", "mean": "mean",
    "median": "median", "min": "min",
}  # fmt: skip
"""Figures shown in percent, and what stands above them."""
PLAIN = {
    "iou_nearest": ("IoU nearest", 3), "iou_within": ("IoU within", 3), "deviation_ratio": ("deviation", 2),
    "seconds": ("seconds", 1),
}  # fmt: skip
"""Other figures, what stands above them, and digits."""
LEGEND = (
    "Accuracy on test images in percent, the best network chosen on validation images; mean ± standard error over "
    "repeats. IoU of wrong answers: with the most similar original, and among the generated. Deviation of generated "
    "latents over that of training latents, 1 where the diffusion has learned. Seconds for training autoencoder and "
    "diffusion and for drawing, on one core. Paper: best / mean / median on CIFAR-100, where it has the row."
)


def make_report(
    bench: Bench, chosen: Sequence[Table], repeats: int, each: Callable[..., Iterable[dict[str, Measured]]] = map
) -> dict[str, Any]:
    """Measure what is not measured yet and put the tables together.

    Args:
        bench: The composition.
        chosen: What is compared.
        repeats: Repeats of each cell.
        each: `map`, or that of an executor.
    """
    cells = bench.cells((table.name, row) for table in chosen for row in table.rows)
    base = bench.base()
    of_zoo: dict[Path, dict[Cell, None]] = {}
    for cell in cells.values():
        of_zoo.setdefault(bench.zoo_folder(bench.recipe(cell.settings)), {})[cell] = None
    parts = [(list(together), repeat) for together in of_zoo.values() for repeat in range(repeats)]
    found: list[dict[str, Measured]] = [{} for _ in range(repeats)]
    for (_, repeat), measured in zip(parts, each(partial(measure, bench, base), *zip(*parts))):
        found[repeat] |= measured
    if not base.made_now and not any(m.made_now for results in found for m in results.values()):
        print("up to date", file=sys.stderr)
    return {
        "composition": bench.composition, "repeats": repeats, "networks": bench.networks,
        "tables": [
            {"name": table.name, "title": table.title, "rows": [
                {"name": row.name, "settings": row.settings, "paper": row.paper}
                | summary([results[cells[f"{table.name}/{row.name}"].name] for results in found])
                for row in table.rows
            ]} for table in chosen
        ],
    }  # fmt: skip


def summary(repeats: Sequence[Measured]) -> dict[str, Any]:
    """Mean and standard error of each figure over the repeats that have it."""
    ran = [m.figures for m in repeats if m.refused is None]
    figures = {}
    for name in ran[0] if ran else ():
        values = [figure[name] for figure in ran]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        figures[name] = {"mean": statistics.mean(values), "se": error, "values": values}
    refused = next((m.refused for m in repeats if m.refused is not None), None)
    return {"figures": figures, "refused": refused, "num_refused": len(repeats) - len(ran)}


def shown(figure: Mapping[str, Any] | None, *, scale: float, digits: int) -> str:
    """`86.61 ± 0.05`."""
    if figure is None:
        return "-"
    error = "" if figure["se"] is None else f" ± {scale * figure['se']:.{digits}f}"
    return f"{scale * figure['mean']:.{digits}f}{error}"


def text(report: Mapping[str, Any]) -> str:
    """The tables in Markdown that reads as plain text."""
    lines = [
        f"# Ablations of {report['composition']}", "",
        f"{report['repeats']} repeats, {report['networks']} networks each. {LEGEND}",
    ]  # fmt: skip
    for table in report["tables"]:
        header = ["", *PERCENT.values(), *(above for above, _ in PLAIN.values()), "paper"]
        rows, notes = [header, ["-"] * len(header)], []
        for row in table["rows"]:
            figures = row["figures"]
            rows.append([
                row["name"], *(shown(figures.get(name), scale=100, digits=2) for name in PERCENT),
                *(shown(figures.get(name), scale=1, digits=digits) for name, (_, digits) in PLAIN.items()),
                row["paper"] or "-",
            ])  # fmt: skip
            if row["refused"] is not None:
                notes.append(f"{row['name']}: {row['num_refused']} of {report['repeats']} refused: {row['refused']}")
        widths = [max(map(len, column)) for column in zip(*rows)]
        rows[1] = ["-" * width for width in widths]
        lines += ["", f"## {table['title']}", ""]
        lines += ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def calm() -> None:
    """One thread for each worker: its networks are too small for two. What is said of a poor one is in the tables."""
    torch.set_num_threads(1)
    logging.getLogger("rpgcli").setLevel(logging.ERROR)


def main() -> None:
    """`python -m tests.bench.ablations`."""
    parser = argparse.ArgumentParser(description="Repeat p-diff's ablations on Fashion-MNIST.")
    parser.add_argument("--out", type=Path, required=True, help="folder of cells and tables")
    parser.add_argument(
        "--full", action="store_true", help="the paper's composition, 3 repeats, 100 networks (default: 2 and 50)"
    )
    options = parser.parse_args()
    name, repeats, networks = (
        ("pdiff-fashion-resnet18-paper", 3, 100) if options.full else ("pdiff-fashion-resnet18", 2, 50)
    )
    bench = Bench(options.out, name, networks)
    workers = min(repeats, os.cpu_count() or 1)
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), calm) as pool:
            report = make_report(bench, tables(bench.recipe()), repeats, pool.map)
        artifact.write_bytes(options.out / "ablations.json", artifact.canonical(report) + b"\n")
        artifact.write_bytes(options.out / "ablations.md", text(report).encode())
    except RpgError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(text(report), end="")


if __name__ == "__main__":
    main()
