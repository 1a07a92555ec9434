"""The report as pages: `report.md`, and with the extra `[report]` one self-contained `report.html` and PNGs.

All three begin with the verdict. The pages are made of `report.json` and `pictures.json` alone:

    for name, content in pages(report, pictures, about): ...

A number after ± is one standard error; bars in pictures are two.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from rpgcli.evaluation.pictures import ORDER, Picture, shown

logger = logging.getLogger(__name__)

EXTRA = ("matplotlib", "jinja2")
"""The packages of the extra `[report]`."""
TEMPLATE = "page.html.jinja"
GENERATED = " (generated)"
"""Marks the groups that are judged."""
Group = Mapping[str, Any]
About = Sequence[tuple[str, str]]
"""What was judged: names and a few words each."""


def pages(report: Mapping[str, Any], pictures: Mapping[str, Picture], about: About) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files beside `report.json` and `pictures.json`.

    Args:
        report: As in `report.json`.
        pictures: As in `pictures.json`.
        about: What was judged.
    """
    pictures = {name: pictures[name] for name in ORDER if name in pictures}  # JSON files know no order.
    can_draw = all(find_spec(package) is not None for package in EXTRA)
    yield "report.md", markdown(report, pictures, about, with_pictures=can_draw).encode()
    if not can_draw:
        logger.warning("no pictures and no report.html: pip install 'rpgcli[report]' brings what draws them.")
        return
    from rpgcli.evaluation import drawing

    drawn = {}
    for name, picture in pictures.items():
        figure = drawing.draw(name, picture)
        drawn[name] = drawing.svg(figure, name)
        yield f"{name}.png", drawing.png(figure)
    yield "report.html", html(report, pictures, about, drawn).encode()


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One figure of every group."""

    title: str
    meaning: str
    cell: Callable[[Group], str | None]
    """Its text, None where a group has no such figure."""


@dataclass(frozen=True)
class Table:
    """Titles and cells, all text."""

    title: str
    columns: Sequence[tuple[str, str]]
    """Title and meaning of each."""
    rows: Sequence[Sequence[str]]


def groups_table(report: Mapping[str, Any]) -> Table:
    """All groups that hold networks, with those columns that say something of any."""
    against = {comparison["against"]: comparison for comparison in report.get("comparisons", [])}

    def difference(group: Group) -> str | None:
        found = against.get(group["name"]) if group["kind"] == "baseline" else None
        if found is None:
            return None
        error = f" ± {100 * found['se']:.2f}" if found.get("has_error", True) else ""
        return f"{100 * found['difference']:+.2f}{error}"

    some_are_not = any(not comparison.get("comparable", True) for comparison in against.values())

    def as_novel(group: Group) -> str | None:
        if group["kind"] != "baseline" or group["name"] not in against or not some_are_not:
            return None
        return "yes" if against[group["name"]]["comparable"] else "no"

    def split_of(group: Group) -> str | None:
        return str(group["split"]) if report.get("per_task") else None

    tau = (report.get("scale") or {}).get("tau")
    known = [
        Column("group", "trained networks, the generator, then trivial generators, the strongest first", name_of),
        Column("tasks", "which tasks the networks are for", split_of),
        Column("accuracy", "mean on test images ± standard error", accuracy),
        Column("ahead by", "percentage points of accuracy that the generator has more than this group", difference),
        Column("as novel", "whether it is as novel as what was generated: what is not need not be beaten", as_novel),
        Column("n", "networks", lambda g: str(g["count"])),
        Column("failed", "networks that are not finite", at("failed", spoken)),
        Column("IoU", "error IoU with the nearest training network; 1: same mistakes", with_error("error_iou.nearest")),
        Column(
            "distance",
            "to the nearest training network, median" + (", in tau" if tau else ", standardised parameters"),
            at("distance.in_tau" if tau else "distance.median", length),
        ),
        Column("N&P", "fraction that is good and at least 1 tau away ± standard error", new_and_performant),
        Column(
            "new answers",
            "disagreement with the nearest training network, in units of the training networks' own; 0: copies",
            at("functional_novelty.mean", "{:.2f}".format),
        ),
        Column("vote", "percentage points that a majority vote gains over the mean network", at("vote_gain", points)),
        Column("median", "median accuracy", at("percentiles.p50")),
        Column("min to max", "worst and best accuracy", span),
        Column("best", "test accuracy of the network that is best on validation images", at("best.test")),
        Column("IoU within", "error IoU between networks of the group, mean", at("error_iou.within")),
        Column("NLL", "negative log-likelihood of the right answers, in nats", with_error("calibration.nll")),
        Column("ECE", "expected calibration error of a network's confidence", with_error("calibration.ece")),
        Column("seconds", "for one network", at("seconds_per_network", "{:.2g}".format)),
    ]
    groups = [*shown(report, lambda group: True), *(g for g in report["groups"] if no_network_works(g))]
    columns = [column for column in known if any(column.cell(group) is not None for group in groups)]
    rows = [[column.cell(group) or "" for column in columns] for group in groups]
    return Table("Groups", [(column.title, column.meaning) for column in columns], rows)


def name_of(group: Group) -> str:
    """Its name; what was generated is marked."""
    return f"{group['name']}{GENERATED if group['kind'] == 'generated' else ''}"


def at(path: str, text: Callable[[Any], str | None] = "{:.4f}".format) -> Callable[[Group], str | None]:
    """The figure that lies at `a.b` of a group, as text."""

    def cell(group: Group) -> str | None:
        value: Any = group
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return None if value is None else text(value)

    return cell


def no_network_works(group: Group) -> bool:
    """Whether all networks of a group failed."""
    return not group.get("accuracy") and bool(group.get("failed"))


def with_error(path: str) -> Callable[[Group], str | None]:
    """The figure that lies at `a.b` of a group, and its standard error at `a.b_se`; a single network has none."""

    def cell(group: Group) -> str | None:
        value, se = at(path)(group), at(f"{path}_se")(group)
        return value if se is None or group["count"] < 2 else f"{value} ± {se}"

    return cell


def accuracy(group: Group) -> str | None:
    """Mean and standard error; nobody knows that of a single network."""
    found = group["accuracy"]
    error = f" ± {found['se']:.4f}" if found and group["count"] > 1 else ""
    return f"{found['mean']:.4f}{error}" if found else None


def span(group: Group) -> str | None:
    """From the smallest to the largest accuracy."""
    found = group["accuracy"]
    return f"{found['min']:.4f} to {found['max']:.4f}" if found else None


def new_and_performant(group: Group) -> str | None:
    """N&P at m = 1."""
    share = next((share for share in group.get("np") or [] if share["m"] == 1), None)
    return share and f"{share['share']:.2f} ± {share['se']:.2f}"


def length(value: float) -> str:
    """A distance; what is as good as 0 is said so."""
    return f"{value:.3g}" if value == 0 or value >= 1e-3 else "< 0.001"


def points(fraction: float) -> str:
    """In percentage points."""
    return f"{100 * fraction:.2f}"


def spoken(value: Any) -> str | None:
    """How many, of a number or a list; None of none."""
    count = len(value) if isinstance(value, Sequence | Mapping) else int(value)
    return str(count) if count else None


def levels_table(report: Mapping[str, Any]) -> Table | None:
    """Networks that were asked for an accuracy, and how many have it."""
    levels = report.get("levels")
    if not levels:
        return None

    def hits(found: Mapping[str, Any] | None) -> str:
        return f"{found['share']:.2f} of {found['count']}" if found else ""

    rows = [[f"{x['low']:g} to {x['high']:g}", hits(x["asked"]), hits(x["unasked"])] for x in levels]
    columns = [
        ("accuracy", "the range asked for"),
        ("asked", "fraction of the networks that were asked for it whose test accuracy lies in it"),
        ("not asked", "the same of networks that were asked for nothing"),
    ]
    return Table("Accuracy on request", columns, rows)


def starts_table(report: Mapping[str, Any]) -> Table | None:
    """Epochs to reach an accuracy from each start."""
    found = report.get("initialisation")
    if not found:
        return None
    columns = [("start", "what networks are trained on from")] + [
        (f"{target['validation']:.4f}", f"epochs to {100 * target['fraction']:g} % of the trained networks' accuracy on"
         f" validation images, median of {found['num_seeds']} seeds; in brackets how many times fewer than afresh")
        for target in found["targets"]
    ]  # fmt: skip

    def epochs(start: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
        if mine["epochs"] is None:
            return "never"
        times = mine["speed_up"] if start["name"] != "fresh" else None
        return f"{mine['epochs']}" + (f" ({times:.3g} x)" if times else "")

    rows = [[start["name"], *(epochs(start, mine) for mine in start["reached"])] for start in found["starts"]]
    return Table("Epochs from each start", columns, rows)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All that there is data for."""
    return [t for t in (groups_table(report), levels_table(report), starts_table(report)) if t is not None]


def answer(report: Mapping[str, Any]) -> str:
    """The verdict in a word."""
    return f"Better than what is trivial: {'yes' if report['beats_baselines'] else 'no evidence'}."


def findings(report: Mapping[str, Any]) -> list[str]:
    """What else the audit found, a sentence each."""
    return [str(one["sentence"] if isinstance(one, Mapping) else one) for one in report.get("findings") or []]


def about_of(problem: Mapping[str, Any], report: Mapping[str, Any], judged: str) -> About:
    """What was judged: data set, target network, sampling.

    Args:
        problem: Sections `dataset`, `task` and `target` of the recipe.
        report: Of the same networks.
        judged: Where they lie.
    """

    def words(section: Mapping[str, Any]) -> str:
        rest = ", ".join(f"{key} {value}" for key, value in section.items() if key != "kind" and value is not None)
        return f"{section.get('kind', '')}" + (f" ({rest})" if rest else "")

    sampling = report.get("sampling") or {}
    sampler = sampling.get("sampler") or {}
    entries = {
        "data set": words(problem.get("dataset", {})), "task": words(problem.get("task", {})),
        "target network": words(problem.get("target", {})), "judged": judged,
        "sampling": sampling and f"{sampler.get('kind', '')}, {sampling.get('num_steps')} steps, temperature"
        f" {sampling.get('temperature'):g}, seed {report.get('seed')}",
        "test images": report.get("num_test_images"),
        "training": report.get("training_seconds") and f"{report['training_seconds']:.0f} s",
    }  # fmt: skip
    return [(name, str(value)) for name, value in entries.items() if value]


# --- pages ------------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any], pictures: Mapping[str, Picture], about: About, *, with_pictures: bool) -> str:
    """`report.md`."""
    lines = [f"**{plain(report['verdict'])}**", "", answer(report), ""]
    lines += [f"- {plain(sentence)}" for sentence in findings(report)] + [""]
    lines += [f"{name}: {plain(value)}  " for name, value in about] + [""]
    for table in tables(report):
        rows = [[title for title, _ in table.columns], ["---"] * len(table.columns), *table.rows]
        lines += [f"## {table.title}", ""]
        lines += ["| " + " | ".join(cell if cell == "---" else plain(cell) for cell in row) + " |" for row in rows]
        lines += ["", *(f"- {plain(title)}: {plain(meaning)}" for title, meaning in table.columns), ""]
    if with_pictures:
        for name, picture in pictures.items():
            title = plain(picture["title"])
            lines += [f"## {title}", "", f"![{title}]({name}.png)", "", plain(picture["caption"]), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip() + "\n")


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def html(report: Mapping[str, Any], pictures: Mapping[str, Picture], about: About, drawn: Mapping[str, str]) -> str:
    """`report.html`: no script, nothing loaded from anywhere.

    Args:
        report: As in `report.json`.
        pictures: Titles and captions.
        about: What was judged.
        drawn: Each picture as an `<svg>` element.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(files("rpgcli.evaluation").joinpath(TEMPLATE).read_text("utf-8")).render(
        verdict=report["verdict"], answer=answer(report), beats=report["beats_baselines"],
        findings=findings(report), about=about, tables=tables(report), generated=GENERATED,
        pictures=[(name, pictures[name], Markup(drawing)) for name, drawing in drawn.items()],
    )  # fmt: skip
