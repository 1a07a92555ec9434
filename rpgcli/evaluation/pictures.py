"""What the pictures of a report show, as plain numbers: `pictures.json`, from which anyone can draw them again.

    accuracy-iou     how good each group is against how alike its mistakes are to a training network's
    np               how many networks are good and at least m tau away
    distance         how far groups are from the training networks
    initialisation   accuracy of networks that are trained on from generated and from other starts
    tsne             where trained, generated and noised networks lie
    trajectories     how a few samples are denoised (p-diff Fig. 4)
    heatmap          one layer of a generated network beside that of the nearest training network
    tasks            accuracy of each task, sorted
    training         loss of the generator

A picture without data is left out.

Letters: K training networks, P parameters, n networks of a group, p coordinates looked at, D those of a sample.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from rpgcli import rng
from rpgcli.alignment import Aligner, Group
from rpgcli.artifact import Artifact
from rpgcli.autoencoder import Autoencoder
from rpgcli.conditions import Asked
from rpgcli.evaluation import distance
from rpgcli.generation import Generator, Model
from rpgcli.layout import TensorSpec
from rpgcli.methods import resampling
from rpgcli.methods.pdiff import LatentDiffusion
from rpgcli.progress import OnStep, Step, silent
from rpgcli.samplers import DdimConfig
from rpgcli.tokens import TokenStore
from rpgcli.training import METRICS
from rpgcli.zoo import Network, Zoo

PICTURES_SCHEMA = 1
ORDER = (
    "accuracy-iou", "np", "distance", "initialisation", "tsne", "trajectories", "heatmap", "tasks", "training",
)  # fmt: skip
"""In which pictures are shown."""
Picture = dict[str, Any]
"""`title`, `caption` (what to see and how it was computed), and the numbers."""

NUM_POINTS = 200
"""Networks of a group among the points of a picture, at most."""
NUM_PATHS, NUM_STEPS = 6, 20
"""Samples whose denoising is shown, and its steps."""
LOOKED_AT = 2**26
"""Values of all networks of a picture that are held at once; of larger networks, every so manieth coordinate."""
NUM_COMPONENTS = 50
"""Principal components that t-SNE starts from."""
PERPLEXITY = 30.0
NOISE = "noise-0.1"
"""The trivial generator that makes noised networks, of `resampling.GENERATORS`."""
KIND_OF_START = {"generated": "generated", "trained": "trained"}
"""Starts of training that are drawn as the group that they come from."""
SIDE = 48
"""Rows and columns of a layer that are shown, at most."""
DIGITS = 5
"""Significant digits that are stored."""


@dataclass(frozen=True)
class Sources:
    """What pictures are made of, beside the report."""

    store: TokenStore
    generated: Zoo
    seed: int
    """Names the streams that networks and noise are drawn from."""
    model: Model | None = None
    """The generator, where the run holds it."""
    autoencoder: Autoencoder | None = None
    """p-diff's."""
    stages: Mapping[str, Artifact] = field(default_factory=dict)
    """What was trained, by name."""
    groups: Sequence[Group] = ()
    """Hidden units that may be exchanged: those of networks that were not made in the order of the store's."""

    @cached_property
    def networks(self) -> list[Network]:
        """The generated networks that are finite."""
        learned = [spec.name for spec in self.store.layout.generated]

        def is_finite(network: Network) -> bool:
            state = self.generated.state(network)
            return all(bool(state[name].isfinite().all()) for name in learned)

        return [network for network in self.generated.networks if is_finite(network)]

    @cached_property
    def first(self) -> Aligner:
        """Brings networks into the order of the store's."""
        return Aligner(self.store.state(0), self.groups)

    def state(self, i: int) -> Mapping[str, Tensor]:
        """Generated network i."""
        state = self.generated.state(self.networks[i])
        return self.first(state).state if self.groups else state

    def made(self, i: int) -> Tensor:
        """Its standardised parameters, (P,)."""
        return self.store.vector_of(self.state(i))


def make_pictures(report: Mapping[str, Any], sources: Sources, on_step: OnStep = silent) -> dict[str, Picture]:
    """All pictures that there is data for."""
    made: dict[str, Callable[[], Picture | None]] = {
        "accuracy-iou": lambda: accuracy_iou(report),
        "np": lambda: profiles(report),
        "distance": lambda: distances(report),
        "initialisation": lambda: initialisation(report),
        "tsne": lambda: tsne(sources),
        "trajectories": lambda: trajectories(sources),
        "heatmap": lambda: heatmap(sources),
        "tasks": lambda: tasks(report),
        "training": lambda: training(sources.stages),
    }
    pictures = {}
    for i, name in enumerate(ORDER):
        picture = made[name]()
        if picture is not None:
            pictures[name] = rounded(picture)
        on_step(Step(i + 1, len(ORDER), phase="pictures", unit="picture"))
    return pictures


# --- of the report alone ----------------------------------------------------------------------------------------------


def shown(report: Mapping[str, Any], has: Callable[[Mapping[str, Any]], object]) -> list[Mapping[str, Any]]:
    """Groups with networks that `has` is true of: trained, generated, then the baselines, the strongest first."""
    order = {"trained": 0, "generated": 1}
    groups = [g for g in report["groups"] if g.get("accuracy") and has(g)]
    return sorted(groups, key=lambda g: (order.get(g["kind"], 2), -g["accuracy"]["mean"]))


def named(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name and kind of groups that a picture shows; where several have one name, it says which tasks they are for."""
    names = [group["name"] for group in groups]
    return [
        {"name": g["name"] if names.count(g["name"]) == 1 else f"{g['name']} {g['split']}", "kind": g["kind"]}
        for g in groups
    ]


def accuracy_iou(report: Mapping[str, Any]) -> Picture | None:
    """Mean accuracy against mean error IoU with the nearest training network (Zeng et al., CVPR 2026)."""
    groups = shown(report, lambda g: (g.get("error_iou") or {}).get("nearest") is not None)
    if not groups:
        return None
    made = [g["accuracy"]["mean"] for g in groups if g["kind"] == "generated"]
    low = [g for g in groups if g["kind"] == "baseline" and g["accuracy"]["mean"] < min(made, default=0.0) / 2]
    groups = [g for g in groups if g not in low]
    less = {c["against"] for c in report.get("comparisons", []) if not c.get("comparable", True)}
    points = [
        name
        | {"iou": g["error_iou"]["nearest"], "iou_se": g["error_iou"].get("nearest_se", 0.0)}
        | {"mean": g["accuracy"]["mean"], "se": g["accuracy"]["se"]}
        | {"less_novel": g["kind"] == "baseline" and g["name"] in less}
        for name, g in zip(named(groups), groups)
    ]
    caption = (
        "Each mark is a group: its mean accuracy on test images, and the mean over its networks of the error IoU with"
        " the most similar training network, with two standard errors each. Upwards is better, to the left is newer; at"
        " 1 a network errs on the same images as some training network. What lies below and to the right of a trivial"
        " generator is worse than trivial."
    )
    if less:
        caption += " Hollow: less novel than the generated networks, so nothing that they have to beat."
    if low:
        names = ", ".join(f"{g['name']} ({g['accuracy']['mean']:.4f})" for g in low)
        caption += f" Left out, as they have less than half of the generated networks' accuracy: {names}."
    return {"title": "Accuracy against likeness of mistakes", "caption": caption, "points": points}


def profiles(report: Mapping[str, Any]) -> Picture | None:
    """N&P of the generator and of every baseline."""
    groups = shown(report, lambda g: g["kind"] != "trained" and g.get("np"))
    if not groups:
        return None
    scale = report.get("scale") or {}
    reached = [g for g in groups if g["kind"] == "generated" or any(share["share"] > 0 for share in g["np"])]
    none = [g["name"] for g in groups if g not in reached]
    caption = (
        f"Fraction of networks that reach an accuracy of {scale['alpha']:.4f} and lie at least m tau from every"
        " training network, with two binomial standard errors. tau is the median distance of a training network to the"
        " nearest of another training: a group just below 1 tau has 0 at m = 1 by construction, see the distances."
        + (f" 0 at every m: {', '.join(none)}." if none else "")
    )
    rows = [name | {"shares": g["np"]} for name, g in zip(named(reached), reached)]
    return {"title": "New and performant: the N&P profile", "caption": caption, "rows": rows}


def distances(report: Mapping[str, Any]) -> Picture | None:
    """Distance to the nearest training network, in units of tau where there is one."""
    groups = shown(report, lambda g: (g.get("distance") or {}).get("median") is not None)
    if not groups:
        return None
    tau = (report.get("scale") or {}).get("tau")
    unit = tau or 1.0
    rows = [
        name | {key: g["distance"][key] / unit for key in ("p10", "median", "mean")}
        for name, g in zip(named(groups), groups)
    ]
    caption = (
        "Distance of standardised parameters to the nearest training network: the mark is the median of a group, the"
        " line begins at its 10th percentile. 0 is a copy. "
    ) + (
        f"In units of tau = {tau:.4g}, the median distance of a training network to the nearest of another training:"
        " left of 1, networks are closer to a training network than those are to each other."
        if tau
        else "This zoo comes from one training: its own distances are optimiser steps, so there is no unit tau."
    )
    return {"title": "Distance to the nearest training network", "caption": caption, "tau": tau, "rows": rows}


def initialisation(report: Mapping[str, Any]) -> Picture | None:
    """Accuracy of networks that are trained on, against epochs and seconds, for each kind of start."""
    found = report.get("initialisation")
    if not found:
        return None
    per_epoch = found["seconds_per_epoch"]
    curves = []
    for start in found["starts"]:
        reached, each = start["test"]["mean"], start.get("seconds_per_start")
        seconds = None if each is None else [each + epoch * per_epoch for epoch in range(len(reached))]
        curve = {"mean": reached, "se": start["test"]["se"], "seconds": seconds}
        curves.append({"name": start["name"], "kind": KIND_OF_START.get(start["name"], "baseline"), **curve})
    caption = (
        "Mean accuracy on test images while networks are trained on, with two standard errors over"
        f" {'tasks' if len(found['tasks']) > 1 else 'seeds'}, against epochs and against seconds for one network. What"
        " begins much lower enters from below."
    )
    once = [(s["name"], s["seconds_once"]) for s in found["starts"] if s.get("seconds_once")]
    if once:
        words = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in once)
        caption += f" Not counted is what is spent once, however many networks are wanted: {words}."
    return {"title": "Generated networks as a start of training", "caption": caption, "curves": curves}


def tasks(report: Mapping[str, Any]) -> Picture | None:
    """Accuracies of the tasks of each split, each curve sorted by itself."""
    kinds = {(g["name"], g["split"]): g["kind"] for g in report["groups"]}
    curves: dict[str, list[dict[str, Any]]] = {}
    for key, accuracies in (report.get("per_task") or {}).items():
        name, _, split = key.rpartition(" ")
        row = {"name": name, "kind": kinds.get((name, split), "baseline"), "accuracies": sorted(accuracies.values())}
        curves.setdefault(split, []).append(row)
    made = {s for s, rows in curves.items() if any(row["kind"] == "generated" for row in rows)}
    if "unseen" in made:
        made.discard("validation")  # What was chosen on says less.
    panels, weak = [], []
    for split in ("seen", "validation", "unseen"):
        if split in made:
            worst = min(row["accuracies"][0] for row in curves[split] if row["kind"] == "generated")
            low = [row for row in curves[split] if row["kind"] == "baseline" and mean(row["accuracies"]) < worst]
            panels.append({"split": split, "curves": [row for row in curves[split] if row not in low]})
            weak += [row["name"] for row in low]
    if not panels:
        return None
    caption = (
        "Accuracy on test images of the network of each task, lowest first; every curve is sorted by itself, so that"
        " its left end shows the worst tasks and equal ranks need not be equal tasks."
    )
    if images := report.get("num_test_images"):
        caption += f" On {images} images the accuracy 0.95 of one task has a standard error of"
        caption += f" {math.sqrt(0.95 * 0.05 / images):.3f}."
    if weak:
        caption += f" Left out, as they are worse on average than the worst generated network: {', '.join(weak)}."
    return {"title": "Accuracy of each task", "caption": caption, "panels": panels}


# --- of the networks themselves ---------------------------------------------------------------------------------------


def tsne(sources: Sources) -> Picture | None:
    """Trained, generated and noised networks in the plane, neighbours kept."""
    store, seed = sources.store, sources.seed
    look = looking(sources)
    chosen = drawn(len(sources.networks), rng.stream(seed, "picture", "tsne", "generated"))
    made = [look(sources.made(i)) for i in chosen]
    originals = [look(store.vector(i)) for i in drawn(len(store), rng.stream(seed, "picture", "tsne", "trained"))]
    checkpoints, draw = resampling.from_store(store), resampling.GENERATORS[NOISE]
    noised = [look(resampling.network(NOISE, draw, checkpoints, seed, i)) for i in range(len(originals))]
    rows = [("training networks", originals), ("generated", made), (f"trained + {NOISE}", noised)]
    x = torch.stack([one for _, group in rows for one in group])  # (n, p)
    if len(x) < 8:
        return None
    plane = embedded(components(x, NUM_COMPONENTS).project(x), rng.derive(seed, "picture", "tsne"))  # (n, 2)
    where = "latents of the autoencoder" if sources.autoencoder is not None else "standardised parameters"
    groups = [
        {"name": name, "points": part.tolist()}
        for (name, group), part in zip(rows, plane.split([len(group) for _, group in rows]))
    ]
    return {
        "title": f"t-SNE of {where}",
        "caption": f"Each mark is a network, at most {NUM_POINTS} of a kind. Networks that are close in their {where}"
        " are close here; axes, sizes of clusters and gaps between them mean nothing. Generated networks on top of"
        " training networks are near-copies, in clouds of their own they are something else. Noised: a training"
        " network with noise of a tenth of each tensor's deviation. Perplexity at most"
        f" {PERPLEXITY:g}, on {NUM_COMPONENTS} principal components.",
        "groups": groups,
    }


def looking(sources: Sources) -> Callable[[Tensor], Tensor]:
    """What is looked at of a network's standardised parameters (P,): their latent (Z,), or some coordinates (p,)."""
    autoencoder = sources.autoencoder
    if autoencoder is None:
        stride = -(-3 * NUM_POINTS * sources.store.layout.num_parameters // LOOKED_AT)
        return lambda x: x[::stride].clone()
    device = next(iter(autoencoder.state_dict().values())).device

    @torch.no_grad()
    def latent(x: Tensor) -> Tensor:
        return autoencoder.encode(x[None].to(device))[0].float().cpu()

    return latent


def drawn(num: int, generator: torch.Generator) -> list[int]:
    """At most NUM_POINTS numbers below `num`, rising."""
    return sorted(torch.randperm(num, generator=generator)[:NUM_POINTS].tolist())


def embedded(x: Tensor, seed: int) -> Tensor:
    """t-SNE of (n, p) to (n, 2) (van der Maaten & Hinton 2008)."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(x) - 1) / 3)
    made = TSNE(perplexity=perplexity, init="pca", random_state=seed % 2**32).fit_transform(x.numpy())
    return torch.from_numpy(made)


@dataclass(frozen=True)
class Components:
    """Principal components of a few vectors."""

    mean: Tensor
    """(p,)"""
    directions: Tensor
    """Orthonormal, (k, p)."""
    explained: Tensor
    """Fraction of the variance along each, (k,)."""

    def project(self, x: Tensor) -> Tensor:
        """(n, p) to (n, k)."""
        return (x - self.mean) @ self.directions.T


def components(x: Tensor, num: int) -> Components:
    """The leading `num` (at most n - 1) of (n, p), from their Gram matrix; the sign of each is fixed."""
    centre = x.mean(0, dtype=torch.float64).to(x.dtype)
    centred = x - centre
    gram = centred.double() @ centred.double().T  # (n, n)
    variance, vectors = torch.linalg.eigh(gram)  # rising
    num = min(num, len(x) - 1, x.shape[1])
    variance, vectors = variance.flip(0).clamp(min=0), vectors.flip(1)[:, :num]  # (n,), (n, num)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    rows = vectors.T.to(x.dtype) @ centred  # (num, p)
    norms = rows.norm(dim=1, keepdim=True)
    total = float(variance.sum()) or 1.0
    return Components(centre, rows / torch.where(norms > 0, norms, 1.0), variance[:num] / total)


def trajectories(sources: Sources) -> Picture | None:
    """A few samples on their way from noise to networks, on two principal components of the training networks."""
    model = sources.model
    if model is None or (model.name == "pdiff" and sources.autoencoder is None):
        return None
    originals = trained_samples(sources, model)  # (n, D)
    if len(originals) < 3:
        return None
    axes = components(originals, 2)
    networks = sources.generated.networks
    evenly = [networks[i * len(networks) // NUM_PATHS] for i in range(NUM_PATHS)]
    paths = [axes.project(denoised(sources, model, one, i)).tolist() for i, one in enumerate(evenly)]
    what = "latents" if model.name == "pdiff" else "tokens"
    return {
        "title": f"Denoising of {NUM_PATHS} samples",
        "caption": f"The {what} of {NUM_PATHS} samples over {len(paths[0]) - 1} DDIM steps from noise (open circles) to"
        " what is decoded into a network (filled marks), at temperature 1, whatever the judged networks were sampled"
        f" with. Small dots: {what} of training networks, whose two leading principal components are the axes. Paths"
        " should end among the dots; paths that end on single dots have found copies.",
        "explained": axes.explained.tolist(), "trained": axes.project(originals).tolist(), "paths": paths,
    }  # fmt: skip


def coordinates(model: Model) -> Callable[[Tensor], Tensor]:
    """Of a sample, (R, D): the values that vary, (D',); of large ones every so manieth."""
    count = NUM_POINTS + NUM_STEPS
    stride = -(-count * int(model.mask.sum()) // LOOKED_AT)
    return lambda x: x[model.mask][::stride].float().cpu()


def trained_samples(sources: Sources, model: Model) -> Tensor:
    """Training networks as the diffusion sees them, (n, D')."""
    store, seen = sources.store, coordinates(model)
    chosen = drawn(len(store), rng.stream(sources.seed, "picture", "trajectories", "trained"))
    if isinstance(model.method, LatentDiffusion):
        look, scale = looking(sources), model.method.scale
        device = scale.mean.device
        return torch.stack([seen(scale.standardise(look(store.vector(i)).to(device))[None]) for i in chosen])
    return torch.stack([seen(store.network(i).to(model.mask.device)) for i in chosen])


@torch.no_grad()
def denoised(sources: Sources, model: Model, network: Network, i: int) -> Tensor:
    """Sample i on its way, asked for what `network` was asked for: (steps + 1, D')."""
    asked = Asked(network.split, network.task_bits, network.label, network.asked_accuracy)
    seen, method = coordinates(model), model.method
    e = method.denoiser.embed(Generator(model).prototypes(asked, network.run))  # (R, M)
    steps = []

    def recorded(x_t: Tensor, t: Tensor) -> Tensor:
        steps.append(seen(x_t))
        return method.denoiser(x_t, t, e)

    stream = rng.stream(sources.seed, "picture", "trajectories", i)
    x_T = torch.randn(model.mask.shape, generator=stream).to(model.mask.device)  # (R, D)
    num_steps = min(NUM_STEPS, method.diffusion.num_steps)
    x_0 = DdimConfig().sample(method.diffusion, recorded, x_T, num_steps, mask=model.mask)
    return torch.stack([*steps, seen(x_0)])


def heatmap(sources: Sources) -> Picture | None:
    """One layer of the generated network that lies nearest to a training network, and of that training network."""
    store = sources.store
    spec = layer_to_show(store.layout.generated)
    if spec is None or not sources.networks:
        return None
    num = len(store) + len(sources.networks)
    stride = -(-num * store.layout.num_parameters // LOOKED_AT)
    made = torch.stack([sources.made(i)[::stride] for i in range(len(sources.networks))])
    trained = torch.stack([store.vector(i)[::stride] for i in range(len(store))])
    found = distance.nearest(made, trained)
    nearest = int(found.distance.argmin())
    network = sources.networks[nearest]
    layers = [sources.state(nearest)[spec.name], store.state(int(found.index[nearest]))[spec.name]]
    a, b = (matrix_of(layer.float()) for layer in layers)
    whole = "x".join(map(str, spec.shape))
    part = "" if a.numel() == spec.numel else f", its first {a.shape[0]} rows and {a.shape[1]} columns"
    ratio = float((a - b).norm() / b.norm()) if float(b.norm()) > 0 else 0.0
    low, high = (float(f(torch.stack([a, b]))) for f in (torch.min, torch.max))
    middle = 0.0 if low < 0 < high else (low + high) / 2
    return {
        "title": f"One layer: {spec.name}",
        "caption": f"{spec.name} ({whole}{part}) of the generated network that lies nearest to any training network"
        f" ({network.file}), of that training network, and the difference of the two, all on one scale of raw weights."
        f" The difference has {100 * ratio:.1f} % of the training network's norm. An empty third picture is a copy.",
        "generated": a.tolist(), "trained": b.tolist(), "middle": middle,
    }  # fmt: skip


def layer_to_show(specs: Iterable[TensorSpec]) -> TensorSpec | None:
    """The largest matrix, else the largest vector."""
    several = [spec for spec in specs if spec.numel > 1]
    return max(several, key=lambda spec: (len(spec.shape) > 1, spec.numel), default=None)


def matrix_of(x: Tensor) -> Tensor:
    """A tensor as rows and columns: its first dimension against the others; a vector folded to be nearly square."""
    if x.dim() < 2:
        rows = max(k for k in range(1, math.isqrt(x.numel()) + 1) if x.numel() % k == 0)
        x = x.reshape(rows, -1)
    return x.flatten(1)[:SIDE, :SIDE]


# --- of the training --------------------------------------------------------------------------------------------------


def training(stages: Mapping[str, Artifact]) -> Picture | None:
    """Loss of each stage that was trained, from its metrics."""
    panels = []
    for name, found in sorted(stages.items()):
        if METRICS in found.manifest.all_files():
            lines = [json.loads(line) for line in found.file(METRICS).read_text().splitlines()]
            lines = [line for line in lines if math.isfinite(line["loss"])]
            if len(lines) > 1:
                row = {"stage": name, "steps": [x["step"] for x in lines], "losses": [x["loss"] for x in lines]}
                panels.append(row)
    if not panels:
        return None
    return {
        "title": "Training of the generator",
        "caption": "Mean loss since the last mark, against optimiser steps. A curve that still falls at its end was"
        " stopped early.",
        "panels": panels,
    }


def rounded(value: Any) -> Any:
    """The same with floats of a few digits, which keeps the file small."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(entry) for entry in value]
    return value
