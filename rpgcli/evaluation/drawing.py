"""Pictures as matplotlib figures, as SVG to be put into a page and as PNG; needs the extra `[report]`.

Narrow figures with text that stays legible on a telephone. Colours are those of Okabe and Ito, which colour-blind
people tell apart; every group has a marker of its own as well. Text and axes of an SVG take the colour of the page.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rpgcli.evaluation.pictures import Picture

WIDTH = 4.0
"""Inches: 288 units of an SVG, about the width of a telephone, so that 9 units of text stay 9 pixels."""
DPI = 200
"""Dots per inch of a PNG."""
LABEL_LENGTH = 22
"""Letters of a name that are shown."""
LEGEND_WIDTH = 56
"""Letters that fit side by side below a picture; a mark takes the room of four."""
INK = "#121314"
"""Text, axes and trained networks; in an SVG `currentColor`, so that a page can be dark."""
GREY = "#8a8f94"
VERMILION = "#d55e00"
BLUE, ORANGE, GREEN, SKY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7"
BASELINES = (BLUE, ORANGE, GREEN, SKY, PURPLE)
MARKERS = ("o", "s", "^", "v", "P", "X", "<", ">", "p", "h", "d")
"""Eleven markers and five colours: only the 56th baseline looks like the first."""
HOLLOW = {"markerfacecolor": "none", "markeredgewidth": 1.2}
DASHES = ("-", "--", "-.", ":")
STYLE: Mapping[Any, Any] = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.grid": True,
    "grid.color": GREY, "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.markersize": 5.5, "lines.linewidth": 1.4,
    "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none", "svg.fonttype": "none",
    "text.parse_math": False, "font.family": "DejaVu Sans",
}  # fmt: skip
"""Whatever a user's own matplotlibrc says."""

Look = Mapping[str, Any]
"""Colour, marker and dashes of one group."""


def draw(name: str, picture: Picture) -> Figure:
    """The picture called `name` in `pictures.json`."""
    with styled():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        DRAWN[name](figure, picture)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # Everything has its place now: drawing it twice need not find it again.
        return figure


def svg(figure: Figure, prefix: str) -> str:
    """An `<svg>` element to be put into a page; its ids begin with `prefix`, so that no two figures share one."""
    buffer = io.StringIO()
    with styled({"svg.hashsalt": prefix}):
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :].strip(), flags=re.DOTALL)
    head, more, body = text.partition(">")
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head) + more + body
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'\bxlink:href="#', f'href="#{prefix}-', text).replace("xlink:href=", "href=")
    text = text.replace("url(#", f"url(#{prefix}-").replace(INK, "currentColor")
    return re.sub(r"\n\s*", "\n", text)


def png(figure: Figure) -> bytes:
    """The same on white, for documents."""
    buffer = io.BytesIO()
    with styled():
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def styled(more: Mapping[Any, Any] = MappingProxyType({})) -> Iterator[None]:
    """Our own settings; a name in letters that the font lacks is no reason for a warning."""
    with matplotlib.rc_context(rc={**STYLE, **more}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


# --- what several pictures share --------------------------------------------------------------------------------------


def looks(groups: Iterable[Mapping[str, Any]]) -> list[Look]:
    """How each group is drawn: trained networks in ink, generated ones in vermilion, baselines in what is left."""
    colours, markers, dashes = cycle(BASELINES), cycle(MARKERS), cycle(DASHES[1:])
    fixed: dict[str, Look] = {
        "trained": {"color": INK, "marker": "*", "markersize": 8, "linestyle": "-"},
        "generated": {"color": VERMILION, "marker": "D", "markersize": 6, "linestyle": "-"},
    }
    return [
        fixed.get(g["kind"])
        or {"color": next(colours), "marker": next(markers), "markersize": 5.5, "linestyle": next(dashes)}
        for g in groups
    ]


def legend(
    figure: Figure, names: Sequence[str], handles: Sequence[Look], *, columns: int = 3, lines: bool = False
) -> None:
    """Below the picture, where nothing can lie under it."""
    names = [label(name) for name in names]
    keys = [Line2D([], [], **{**look, **({} if lines else {"linestyle": "none"})}) for look in handles]
    columns = min(columns, max(1, LEGEND_WIDTH // (max(map(len, names)) + 4)))
    figure.legend(
        keys, names, loc="outside lower center", ncols=columns,
        handlelength=2.4 if lines else 1.0, columnspacing=1.0, handletextpad=0.5, labelspacing=0.3,
    )  # fmt: skip


def label(name: str) -> str:
    """A name on one line, not too long; matplotlib leaves out what begins with an underscore."""
    text = "".join(c if c.isprintable() else " " for c in name).lstrip("_") or "?"
    return text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 1]}…"


def rows_of(figure: Figure, names: Sequence[str], *, row: float, more: float) -> Axes:
    """Axes with one row for each name, the first at the top; the figure grows with them (inches)."""
    figure.set_size_inches(WIDTH, row * len(names) + more)
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return axes


# --- the pictures -----------------------------------------------------------------------------------------------------


def draw_accuracy_iou(figure: Figure, picture: Picture) -> None:
    """A mark for each group, its names below."""
    points = picture["points"]
    figure.set_size_inches(WIDTH, 2.9 + 0.18 * -(-len(points) // 2))
    axes = figure.add_subplot()
    styles = [{**look, **HOLLOW} if point["less_novel"] else look for point, look in zip(points, looks(points))]
    for point, look in zip(points, styles):
        front = 3 if point["kind"] != "baseline" else 2
        error = {"xerr": 2 * point["iou_se"], "yerr": 2 * point["se"], "capsize": 2, "elinewidth": 1}
        axes.errorbar(point["iou"], point["mean"], zorder=front, **error, **look)
    axes.set_xlabel("error IoU with the nearest training network")
    axes.set_ylabel("accuracy")
    axes.margins(0.08)
    axes.locator_params(nbins=5)
    legend(figure, [point["name"] for point in points], styles)


def draw_np(figure: Figure, picture: Picture) -> None:
    """A row for each group, in it a mark for each m."""
    rows = picture["rows"]
    axes = rows_of(figure, [row["name"] for row in rows], row=0.42, more=0.95)
    multiples = [share["m"] for share in rows[0]["shares"]]
    handles: list[Look] = [
        {"color": colour, "marker": marker, "linestyle": "none"}
        for colour, marker, _ in zip((VERMILION, *BASELINES), ("D", *MARKERS), multiples)
    ]
    for i, row in enumerate(rows):
        if i % 2:
            axes.axhspan(i - 0.5, i + 0.5, color=GREY, alpha=0.12, linewidth=0)
        for k, (share, look) in enumerate(zip(row["shares"], handles)):
            y, error = i + 0.15 * (k - (len(multiples) - 1) / 2), 2 * share["se"]
            axes.errorbar(share["share"], y, xerr=error, markersize=4, capsize=1.5, elinewidth=1, **look)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("good and at least m tau away (fraction)")
    legend(figure, [f"m = {m}" for m in multiples], handles, columns=len(multiples))


def draw_distance(figure: Figure, picture: Picture) -> None:
    """A row for each group: from its 10th percentile to its median."""
    rows = picture["rows"]
    axes = rows_of(figure, [row["name"] for row in rows], row=0.22, more=0.6)
    for i, (row, look) in enumerate(zip(rows, looks(rows))):
        axes.plot([row["p10"], row["median"]], [i, i], color=look["color"], linewidth=1.4)
        axes.plot(row["p10"], i, marker="|", color=look["color"], markersize=7)
        axes.plot(row["median"], i, **look)
    if picture["tau"]:
        axes.axvline(1, color=INK, linewidth=0.9, linestyle="--")
    axes.set_xlim(left=-0.03 * axes.get_xlim()[1])  # The marks of copies are not cut off.
    axes.set_xlabel("distance in tau" if picture["tau"] else "distance (standardised parameters)")


def draw_initialisation(figure: Figure, picture: Picture) -> None:
    """Against epochs above, against seconds below."""
    curves = picture["curves"]
    figure.set_size_inches(WIDTH, 4.6)
    above, below = figure.subplots(2)
    for curve, look in zip(curves, looks(curves)):
        style = {**look, "markersize": look["markersize"] * 0.7, "capsize": 1.5, "elinewidth": 0.8}
        error = [2 * se for se in curve["se"]]
        above.errorbar(range(len(curve["mean"])), curve["mean"], yerr=error, **style)
        if curve["seconds"] is not None:
            below.errorbar(curve["seconds"], curve["mean"], yerr=error, **style)
    above.set_xlabel("epochs")
    below.set_xlabel("seconds for one network")
    after = [(c["mean"], c["se"], 0 if c["kind"] == "generated" else min(1, len(c["mean"]) - 1)) for c in curves]
    lowest = min(mean[epoch] - 2 * se[epoch] for mean, se, epoch in after)
    for axes in (above, below):
        axes.set_ylabel("accuracy")
        axes.locator_params(nbins=5)
        axes.set_ylim(bottom=max(lowest - 0.02, axes.get_ylim()[0]))
    legend(figure, [curve["name"] for curve in curves], looks(curves), lines=True)


def draw_tsne(figure: Figure, picture: Picture) -> None:
    """A cloud for each kind of network."""
    groups = picture["groups"]
    figure.set_size_inches(WIDTH, 4.2)
    axes = figure.add_subplot()
    styles: list[Look] = [
        {"color": INK, "marker": "o", "markersize": 3.2, "alpha": 0.7},
        {"color": VERMILION, "marker": "D", "markersize": 3.6, "alpha": 0.8},
        {"color": SKY, "marker": "^", "markersize": 3.2, "alpha": 0.7},
    ]
    for group, look, front in zip(groups, styles, (2, 4, 3)):
        x, y = zip(*group["points"])
        axes.plot(x, y, linestyle="none", markeredgewidth=0, zorder=front, **look)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    legend(figure, [group["name"] for group in groups], [{**look, "markersize": 5} for look in styles])


def draw_trajectories(figure: Figure, picture: Picture) -> None:
    """Paths over the dots of training networks."""
    figure.set_size_inches(WIDTH, 3.9)
    axes = figure.add_subplot()
    x, y = zip(*picture["trained"])
    axes.plot(x, y, "o", color=GREY, markersize=2.4, markeredgewidth=0, alpha=0.7)
    for path, colour in zip(picture["paths"], cycle((VERMILION, *BASELINES))):
        x, y = zip(*path)
        axes.plot(x, y, color=colour, linewidth=1, marker=".", markersize=2.5, zorder=3)
        axes.plot(x[0], y[0], "o", color=colour, markerfacecolor="none", markersize=6, zorder=3)
        axes.plot(x[-1], y[-1], "D", color=colour, markersize=5, zorder=4)
    first, second = (f"{100 * share:.0f} %" for share in picture["explained"])
    axes.set_xlabel(f"first principal component ({first} of variance)")
    axes.set_ylabel(f"second ({second})")
    axes.locator_params(nbins=5)
    handles: list[Look] = [
        {"color": INK, "marker": "o", "markerfacecolor": "none", "markersize": 6},
        {"color": INK, "marker": "D", "markersize": 5},
        {"color": GREY, "marker": "o", "markersize": 2.4},
    ]
    legend(figure, ["noise", "sample", "training network"], handles)


def draw_heatmap(figure: Figure, picture: Picture) -> None:
    """Generated, trained, difference; one scale of colours."""
    middle = picture["middle"]
    made, trained = ([[x - middle for x in row] for row in picture[name]] for name in ("generated", "trained"))
    difference = [[a - b for a, b in zip(*rows)] for rows in zip(made, trained)]
    panels = {"generated": made, "trained": trained, "difference": difference}
    tall = len(made) >= len(made[0])  # Beside each other where they are tall, below each other where they are wide.
    shape = min(1.6, max(0.3, len(made) / len(made[0])))
    figure.set_size_inches(WIDTH, 0.9 + 1.2 * shape if tall else 0.9 + 3 * (0.25 + 3.4 * min(shape, 0.5)))
    axes = figure.subplots(*((1, 3) if tall else (3, 1)), squeeze=False).flatten()
    limit = max(abs(value) for panel in panels.values() for row in panel for value in row) or 1.0
    image = None
    for one, (title, panel) in zip(axes, panels.items()):
        image = one.imshow(panel, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="none", aspect="auto")
        one.set_title(title)
        one.grid(visible=False)
        one.set_xticks([])
        one.set_yticks([])
        one.spines[:].set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes), location="bottom", shrink=0.7, aspect=30, pad=0.02)
    bar.locator = MaxNLocator(4)
    bar.outline.set_visible(False)
    bar.set_label(f"weight - {middle:.3g}" if middle else "weight")


def draw_tasks(figure: Figure, picture: Picture) -> None:
    """A panel for each split, a curve for each group."""
    panels = picture["panels"]
    groups = {curve["name"]: curve for panel in panels for curve in panel["curves"]}
    order = {"trained": 0, "generated": 1}
    names = sorted(groups, key=lambda name: order.get(groups[name]["kind"], 2))
    styles = dict(zip(names, looks(groups[name] for name in names)))
    figure.set_size_inches(WIDTH, 2.1 * len(panels) + 0.25 + 0.18 * -(-len(names) // 3))
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False).flatten(), panels):
        for curve in sorted(panel["curves"], key=lambda curve: curve["kind"] != "baseline"):
            values, look = curve["accuracies"], styles[curve["name"]]
            x = [i / max(1, len(values) - 1) for i in range(len(values))]
            axes.plot(x, values, **{**look, "markersize": 4, "markevery": (0.0, 0.2)}, label=label(curve["name"]))
        counts = sorted({len(curve["accuracies"]) for curve in panel["curves"]})
        axes.set_title(f"{panel['split']} ({' and '.join(map(str, counts))} tasks)", loc="left")
        axes.set_ylabel("accuracy")
        axes.set_xticks([0, 0.5, 1], ["worst", "median", "best"])
        axes.yaxis.set_major_locator(MaxNLocator(5))
    legend(figure, names, [styles[name] for name in names], lines=True)


def draw_training(figure: Figure, picture: Picture) -> None:
    """A panel for each stage."""
    panels = picture["panels"]
    figure.set_size_inches(WIDTH, 2.0 * len(panels) + 0.2)
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False).flatten(), panels):
        axes.plot(panel["steps"], panel["losses"], color=VERMILION)
        if min(panel["losses"]) > 0 and max(panel["losses"]) > 5 * min(panel["losses"]):
            axes.set_yscale("log")
        axes.set_title(panel["stage"], loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(5))


DRAWN: Mapping[str, Callable[[Figure, Picture], None]] = {
    "accuracy-iou": draw_accuracy_iou, "np": draw_np, "distance": draw_distance,
    "initialisation": draw_initialisation, "tsne": draw_tsne, "trajectories": draw_trajectories,
    "heatmap": draw_heatmap, "tasks": draw_tasks, "training": draw_training,
}  # fmt: skip
"""One function for each picture."""
