"""The report as pages: what stands on them, that nothing is loaded or run, and that no text lies on another."""

import json
import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn.decomposition import PCA

from rpgcli import artifact, rng
from rpgcli.evaluation import drawing, pictures
from rpgcli.evaluation.page import about_of, groups_table, pages, plain
from rpgcli.evaluation.pictures import Sources, make_pictures
from rpgcli.targets import Mlp3Config
from rpgcli.zoo import Network, Zoo
from tests.helpers import State, draw, make, token_store

BASELINES = (
    "average", "soup-4", "soup-16", "interpolation", "gaussian", "gaussian-full", "gaussian-pca", "noise-0.05",
    "noise-0.1", "noise-abs-0.06", "noise-abs-0.12", "latent-gaussian", "latent-kde", "finetuned",
)  # fmt: skip
HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "br", "hr", "img", "link"}


def group(name: str, kind: str, mean: float, **figures: Any) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "split": "all", "count": 100, "seconds_per_network": 0.01,
        "accuracy": {"mean": mean, "se": 0.004, "min": mean - 0.1, "max": mean + 0.05}, **figures,
    }  # fmt: skip


def audited(name: str, kind: str, i: int) -> dict[str, Any]:
    """A group of networks that all answer one question; `i` tells groups apart."""
    share = [{"m": m, "share": max(0.0, 0.9 - 0.2 * m - 0.05 * i), "se": 0.05} for m in (1, 2, 3, 4, 6)]
    return group(
        name, kind, 0.9 - 0.02 * i, np=share, is_foundiles={"p10": 0.8, "p90": 0.95},
        error_iou={"within": 0.7, "nearest": 0.95 - 0.03 * i, "minimal_similarity": 0.5}, vote_gain=0.01,
        distance={"mean": 20.0 + i, "p10": 10.0 + i, "median": 19.0 + 5 * i, "in_tau": 0.3 + 0.1 * i},
        best={"index": 3, "validation": 0.9, "test": 0.91}, functional_novelty={"mean": 1.5, "p10": 1.1},
    )  # fmt: skip


def one_question(*names: str) -> dict[str, Any]:
    """The report of a zoo of one question with these baselines."""
    groups = [audited("trained", "trained", 0), audited("pdiff", "generated", 1)]
    groups += [audited(name, "baseline", 2 + i) for i, name in enumerate(names)]
    starts = [start(name, 0.3 + 0.1 * i) for i, name in enumerate(("generated", "fresh", "average", "trained"))]
    return {
        "schema": 1, "verdict": "pdiff reaches 0.88: no better than average.", "beats_baselines": False,
        "findings": [{"kind": "copies", "count": 3, "of": 100, "sentence": "3 of 100 are copies."}],
        "groups": [*groups, group("pdiff", "generated", 0.0) | {"accuracy": None, "count": 0, "split": "seen"}],
        "comparisons": [{"against": n, "difference": -0.01, "se": 0.002, "above": False} for n in names],
        "scale": {"tau": 60.0, "alpha": 0.85, "coordinates": 3760}, "seed": 0, "num_test_images": 360,
        "levels": [{"low": 0.5, "high": 0.7, "asked": {"count": 5, "share": 0.8}, "unasked": None}],
        "sampling": {"sampler": {"kind": "ddim"}, "num_steps": 20, "temperature": 1.0}, "training_seconds": 12.0,
        "initialisation": {
            "starts": starts, "tasks": [], "num_seeds": 5, "seconds_per_epoch": 0.4,
            "targets": [{"fraction": 0.9, "validation": 0.81, "test": 0.8}],
        },
    }  # fmt: skip


def start(name: str, low: float) -> dict[str, Any]:
    mean = [low, 0.8, 0.85, 0.9]
    return {
        "name": name, "test": {"mean": mean, "se": [0.01] * 4}, "seconds_per_start": 0.1, "seconds_once": 30.0,
        "reached": [{"epochs": 2, "speed_up": 1.5}],
    }  # fmt: skip


def of_tasks(*names: str) -> dict[str, Any]:
    """The report of a zoo of tasks with these baselines."""
    rows = [("trained", "trained", s) for s in ("seen", "unseen")]
    rows += [("rpg", "generated", s) for s in ("seen", "validation", "unseen")]
    rows += [(name, "baseline", "unseen") for name in names]
    bits = [f"{i:06b}" for i in range(1, 41)]
    return {
        "schema": 1, "verdict": "rpg reaches 0.96.", "beats_baselines": True, "comparisons": [], "num_test_images": 360,
        "groups": [group(name, kind, 0.9) | {"split": split} for name, kind, split in rows],
        "per_task": {f"{n} {s}": {b: 0.9 + 0.002 * i for i, b in enumerate(bits)} for n, _, s in rows},
    }  # fmt: skip


def cloud(*shape: int) -> list[Any]:
    return list(draw(*shape).tolist())


def made_up(report: dict[str, Any]) -> dict[str, Any]:
    """The pictures of a report alone."""
    made = {
        "accuracy-iou": pictures.accuracy_iou(report), "np": pictures.profiles(report),
        "distance": pictures.distances(report), "initialisation": pictures.initialisation(report),
        "tasks": pictures.tasks(report),
    }  # fmt: skip
    return {name: picture for name, picture in made.items() if picture is not None}


def of_networks() -> dict[str, Any]:
    """The other pictures, made up in their real sizes."""
    loss = [1 / (1 + i) for i in range(100)]
    return {
        "tsne": {"groups": [{"name": n, "points": cloud(200, 2)} for n in ("training networks", "made", "noised")]},
        "trajectories": {"explained": [0.5, 0.1], "trained": cloud(200, 2), "paths": cloud(6, 21, 2)},
        "heatmap": {"generated": cloud(16, 48), "trained": cloud(16, 48), "middle": 0.0},
        "training": {"panels": [{"stage": s, "steps": [*range(100)], "losses": loss} for s in ("autoencoder", "rpg")]},
    }  # fmt: skip


REPORTS = {
    "one question": one_question(*BASELINES),
    "tasks": of_tasks("majority", "average", "average-trunk", "nearest", "ridge", "ridge-pairs", "mlp"),
    "hostile": one_question(HOSTILE, "$x_1$ \\frac", "_hidden", "a|b", "long " * 20, "line\nbreak", "数据"),
    "minimal": {"schema": 1, "verdict": "nothing was generated.", "beats_baselines": False, "groups": []},
}


@pytest.fixture(scope="module", params=["tasks", "hostile", "minimal"])
def written(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, str]]:
    """A report and the texts of its pages."""
    report = REPORTS[request.param]
    files = dict(pages(report, made_up(report), [("data set", HOSTILE)]))
    return report, {name: content.decode() for name, content in files.items() if not name.endswith(".png")}


class Page(HTMLParser):
    """Elements, ids, references and text of a page; fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style" and "body" in self.open:
            self.texts.append(" ".join(data.split()))


# --- the pages --------------------------------------------------------------------------------------------------------


def test_the_verdict_is_the_first_text_of_every_page(written):
    report, files = written
    assert Page(files["report.html"]).texts[0] == report["verdict"]
    assert files["report.md"].splitlines()[0] == f"**{plain(report['verdict'])}**"


def test_every_group_and_picture_is_on_every_page(written):
    report, files = written
    texts = Page(files["report.html"]).texts
    for g in report["groups"]:
        if g["accuracy"] is not None:
            name = " ".join(g["name"].split())
            assert {name, f"{name} (generated)"} & set(texts)
            assert plain(g["name"]) in files["report.md"]
    assert files["report.html"].count("<svg") == files["report.md"].count("![") == len(made_up(report))


def test_what_was_found_follows_the_verdict(written):
    report, files = written
    for finding in report.get("findings", []):
        assert finding["sentence"] in Page(files["report.html"]).texts[1:3]
        assert f"- {finding['sentence']}" in files["report.md"].splitlines()[:6]


def test_the_page_loads_and_runs_nothing(written):
    _, files = written
    page = Page(files["report.html"])
    assert {"script", "link", "iframe", "object"} & set(page.tags) == set()
    assert "http:" not in files["report.html"] and "https:" not in files["report.html"]
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "xlink:href", "action"}:
            assert value.startswith(("#", "data:image/png;base64,"))


def test_ids_are_unique_and_references_lead_somewhere(written):
    text = written[1]["report.html"]
    page = Page(text)
    ids = [value for name, value in page.attributes if name == "id"]
    used = {v[1:] for n, v in page.attributes if n == "href" and v.startswith("#")} | set(
        re.findall(r"url\(#([^)]*)\)", text)
    )
    used |= {value for name, value in page.attributes if name == "aria-labelledby"}
    assert len(ids) == len(set(ids))
    assert used <= set(ids)


def test_nothing_on_a_page_is_not_a_number(written):
    _, files = written
    for text in (" ".join(Page(files["report.html"]).texts), files["report.md"]):
        assert re.search(r"\b(nan|inf|None|null)\b", text) is None


def test_hostile_names_stay_text(written):
    report, files = written
    page = Page(files["report.html"])
    assert "script" not in page.tags
    assert HOSTILE in page.texts  # among what was judged
    if report is REPORTS["hostile"]:
        assert f"{HOSTILE[: drawing.LABEL_LENGTH - 1]}…" in page.texts  # in a picture
        assert "$x_1$ \\frac" in page.texts
    assert "<script>" not in files["report.md"].replace("\\<", "")
    rows = [line for line in files["report.md"].splitlines() if line.startswith("| ") and "±" in line]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1  # a|b makes no column


def test_without_the_extra_there_is_a_note_and_the_text(caplog):
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        files = dict(pages(REPORTS["tasks"], made_up(REPORTS["tasks"]), []))
    assert list(files) == ["report.md"]
    assert b"![" not in files["report.md"]
    assert "pip install 'rpgcli[report]'" in caplog.text


def test_the_error_of_a_single_network_is_not_known():
    report = one_question("average")
    report["groups"][2]["count"] = 1
    cells = dict(row_of(report, "accuracy"))
    assert (cells["average"], cells["pdiff (generated)"]) == ("0.8600", "0.8800 ± 0.0040")


def test_only_what_is_known_is_said_about_a_run():
    assert about_of({}, {}, "all-s0-n1") == [("judged", "all-s0-n1")]
    told = dict(about_of({"dataset": {"kind": "digits", "split_seed": 0}}, REPORTS["one question"], "x"))
    assert told["data set"] == "digits (split_seed 0)"
    assert told["sampling"] == "ddim, 20 steps, temperature 1, seed 0"


def row_of(report: dict[str, Any], title: str) -> list[tuple[str, str]]:
    """A column of the table of groups, with their names."""
    table = groups_table(report)
    place = [name for name, _ in table.columns].index(title)
    return [(row[0], row[place]) for row in table.rows]


# --- drawing ----------------------------------------------------------------------------------------------------------


def boxes(figure: Figure) -> list[tuple[str, Any]]:
    """Every text that is drawn, with its place in dots."""
    found: list[tuple[str, Any]] = []
    original = Text.draw

    def recorded(self: Text, renderer: Any) -> None:
        original(self, renderer)
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), self.get_window_extent(renderer)))

    with drawing.styled(), mock.patch.object(Text, "draw", recorded):
        FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    return found


@cache
def figures(report: str) -> dict[str, Figure]:
    """All pictures of a report, drawn."""
    found = made_up(REPORTS[report]) | (of_networks() if report == "one question" else {})
    return {name: drawing.draw(name, picture) for name, picture in found.items()}


@pytest.mark.parametrize("report", ["one question", "tasks", "hostile"])
def test_no_text_of_a_picture_lies_on_another_or_leaves_it(report):
    for name, figure in figures(report).items():
        found = boxes(figure)
        width, height = figure.get_size_inches() * figure.dpi
        assert len(found) > 2
        for i, (text, a) in enumerate(found):
            assert a.x0 >= -1 and a.y0 >= -1 and a.x1 <= width + 1 and a.y1 <= height + 1, (name, text)
            for other, b in found[:i]:
                apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
                assert apart, (name, text, other)


def test_text_of_a_picture_is_at_least_8_units_of_its_width_of_288():
    for name, figure in figures("one question").items():
        svg = drawing.svg(figure, name)
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert min(sizes) >= 8
        assert float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0]) == pytest.approx(288)
        assert drawing.INK not in svg and "currentColor" in svg  # It takes the colour of the page.


def test_all_groups_look_different():
    looks = drawing.looks([{"kind": "trained"}, {"kind": "generated"}, *({"kind": "baseline"} for _ in range(30))])
    assert len({(look["color"], look["marker"]) for look in looks}) == 32


def test_the_same_picture_gives_the_same_bytes():
    first, again = figures("tasks")["tasks"], drawing.draw("tasks", made_up(REPORTS["tasks"])["tasks"])
    assert drawing.svg(first, "a") == drawing.svg(again, "a")
    assert drawing.png(first) == drawing.png(again)


# --- what pictures show -----------------------------------------------------------------------------------------------


def test_groups_without_a_figure_are_left_out_of_its_picture():
    report = one_question("average", "gaussian")
    del report["groups"][2]["error_iou"]
    shown = pictures.accuracy_iou(report)
    assert shown is not None and [p["name"] for p in shown["points"]] == ["trained", "pdiff", "gaussian"]
    assert pictures.accuracy_iou(of_tasks("mlp")) is None
    assert pictures.profiles(of_tasks("mlp")) is pictures.distances(of_tasks("mlp")) is None
    assert pictures.tasks(report) is None


def test_groups_at_chance_are_named_instead_of_squeezing_the_others():
    report = one_question("average", "gaussian")
    report["groups"][3]["accuracy"]["mean"] = 0.1
    shown = pictures.accuracy_iou(report)
    assert shown is not None and [p["name"] for p in shown["points"]] == ["trained", "pdiff", "average"]
    assert "gaussian (0.1000)." in shown["caption"]


def test_marks_of_less_novel_groups_are_hollow():
    report = one_question("average", "gaussian")
    report["comparisons"][0]["comparable"] = False
    report["comparisons"][1]["comparable"] = True
    shown = pictures.accuracy_iou(report)
    assert shown is not None
    assert [p["name"] for p in shown["points"] if p["less_novel"]] == ["average"]
    assert "Hollow" in shown["caption"]
    assert dict(row_of(report, "as novel"))["average"] == "no"
    assert "as novel" not in [title for title, _ in groups_table(one_question("average")).columns]


def test_networks_that_failed_are_counted():
    report = one_question("average")
    report["groups"][1] |= {"failed": ["0.safetensors", "7.safetensors"]}
    report["groups"][2] |= {"failed": ["x"], "accuracy": None, "count": 0}
    assert row_of(report, "failed") == [("trained", ""), ("pdiff (generated)", "2"), ("average", "1")]


def test_groups_that_never_are_new_and_good_are_named_under_the_profile():
    report = one_question("average", "gaussian")
    for entry in report["groups"][1:3]:
        entry["np"] = [{"m": m, "share": 0.0, "se": 0.0} for m in (1, 2)]
    shown = pictures.profiles(report)
    assert shown is not None and [row["name"] for row in shown["rows"]] == ["pdiff", "gaussian"]
    assert "0 at every m: average." in shown["caption"]


def test_distances_are_in_tau_where_there_is_one():
    report = one_question("average")
    shown = pictures.distances(report)
    assert shown is not None and shown["rows"][1]["median"] == pytest.approx(24.0 / 60)
    report["scale"]["tau"] = None
    shown = pictures.distances(report)
    assert shown is not None and shown["rows"][1]["median"] == 24.0


def test_curves_of_tasks_are_sorted_and_weak_ones_named():
    report = of_tasks("mlp", "majority")
    report["per_task"]["rpg unseen"] = {"01": 0.95, "10": 0.85, "11": 0.9}
    report["per_task"]["majority unseen"] = {"01": 0.7, "10": 0.9}
    shown = pictures.tasks(report)
    assert shown is not None and [panel["split"] for panel in shown["panels"]] == ["seen", "unseen"]
    curves = {curve["name"]: curve["accuracies"] for curve in shown["panels"][1]["curves"]}
    assert curves["rpg"] == [0.85, 0.9, 0.95]
    assert "majority" not in curves and "worst generated network: majority." in shown["caption"]


def test_principal_components_are_those_of_scikit_learn():
    x = draw(20, 7)
    mine, theirs = pictures.components(x, 3), PCA(3).fit(x.numpy())
    projected = theirs.transform(x.numpy())
    signs = np.sign((projected * mine.project(x).numpy()).sum(0))
    np.testing.assert_allclose(mine.project(x).numpy() * signs, projected, atol=1e-4)  # float32
    np.testing.assert_allclose(mine.explained.numpy(), theirs.explained_variance_ratio_, atol=1e-5)


def test_a_tensor_is_shown_as_rows_and_columns():
    assert pictures.matrix_of(torch.arange(12.0)).tolist() == torch.arange(12.0).reshape(3, 4).tolist()
    assert pictures.matrix_of(draw(6, 2, 3, 3)).shape == (6, 18)
    assert pictures.matrix_of(draw(100, 100)).shape == (pictures.SIDE, pictures.SIDE)
    assert pictures.matrix_of(draw(13)).shape == (1, 13)


def test_stored_numbers_are_short():
    value = {"a": 0.123456789, "b": [1, 2.0000001], "c": "0.123456789", "d": None, "e": True}
    assert pictures.rounded(value) == {"a": 0.12346, "b": [1, 2.0], "c": "0.123456789", "d": None, "e": True}


def sources_of(folder: Path, states: list[State], made: list[State], **more: Any) -> Sources:
    """Trained and generated networks in artifacts."""

    def body(draft: artifact.Draft) -> dict[str, Any]:
        for i, state in enumerate(made):
            draft.save_tensors(f"{i}.safetensors", state)
        return {"networks": [Network(f"{i}.safetensors", "all").to_json() for i in range(len(made))]}

    store = token_store(folder / "tokens", states, token_dim=8)
    return Sources(store, Zoo(make(folder / "generated", body, stage="generate")), seed=0, **more)


def networks(folder: Path, *, copied: int) -> Sources:
    """Ten trained networks, and four generated ones of which one is a copy and one is not finite."""
    states = [{"w": draw(4, 6, seed=i), "b": draw(4, seed=i)} for i in range(10)]
    made = [{"w": draw(4, 6, seed=50 + i), "b": draw(4, seed=50 + i)} for i in range(4)]
    made[2], made[3]["w"] = states[copied], torch.full((4, 6), torch.nan)
    return sources_of(folder, states, made)


def test_the_layer_shown_is_that_of_the_copy(tmp_path):
    sources = networks(tmp_path, copied=7)
    shown = pictures.heatmap(sources)
    assert shown is not None and shown["generated"] == draw(4, 6, seed=7).tolist()
    np.testing.assert_allclose(shown["trained"], shown["generated"], atol=1e-6)  # standardised and back in float32
    assert shown["title"] == "One layer: w"
    assert "(2.safetensors)" in shown["caption"] and " 0.0 %" in shown["caption"]


def test_networks_from_elsewhere_are_brought_into_the_order_of_the_others(tmp_path):
    """A copy of the first network with its hidden units in another order."""
    config = Mlp3Config(hidden=(6,))
    states = []
    for seed in range(5):
        with rng.initialising(seed):
            network = config.build(1, (2, 2), 3)
        states.append(dict(network.state_dict()))
    order, copy = torch.tensor([3, 0, 5, 1, 4, 2]), dict(states[0])
    copy |= {f"layers.0.{name}": copy[f"layers.0.{name}"][order] for name in ("weight", "bias")}
    copy["layers.2.weight"] = copy["layers.2.weight"][:, order].clone()
    for groups, is_found in ((), False), (config.symmetries(network), True):
        folder = tmp_path / str(is_found)
        folder.mkdir()
        shown = pictures.heatmap(sources_of(folder, states, [copy], groups=groups))
        assert shown is not None and (" 0.0 %" in shown["caption"]) is is_found


def test_networks_in_the_plane_are_all_there_and_stay_where_they_are(tmp_path):
    sources = networks(tmp_path, copied=7)
    shown, again = pictures.tsne(sources), pictures.tsne(sources)
    assert shown is not None and shown == again
    assert [len(g["points"]) for g in shown["groups"]] == [10, 3, 10]


def test_a_run_without_model_or_metrics_has_fewer_pictures(tmp_path):
    made = make_pictures(REPORTS["one question"], networks(tmp_path, copied=0))
    assert list(made) == ["accuracy-iou", "np", "distance", "initialisation", "tsne", "heatmap"]
    json.dumps(made, allow_nan=False)


# --- a real run -------------------------------------------------------------------------------------------------------


def test_evaluate_writes_pages_that_can_be_drawn_again(tiny):
    folder = tiny.folder / "report"
    stored = json.loads((folder / "pictures.json").read_text())
    assert {"tsne", "trajectories", "heatmap", "tasks"} <= set(stored["pictures"])
    files = dict(pages(json.loads((folder / "report.json").read_text()), stored["pictures"], stored["about"]))
    assert {"report.html", "report.md", "tsne.png"} < set(files)
    for name, content in files.items():
        assert (folder / name).read_bytes() == content
    assert (folder / "report.html").stat().st_size < 2 * 2**20


def test_a_path_of_denoising_goes_from_noise_to_a_sample(tiny):
    shown = json.loads((tiny.folder / "report" / "pictures.json").read_text())["pictures"]["trajectories"]
    assert {len(path) for path in shown["paths"]} == {pictures.NUM_STEPS + 1}
    assert len({tuple(path[0]) for path in shown["paths"]}) == pictures.NUM_PATHS


def test_pages_are_outside_the_id_of_the_report(tiny):
    report = artifact.read(tiny.folder / "report", "evaluate")
    assert not {name for name in report.manifest.files if not name.endswith(".json")}
    assert {"report.html", "report.md", "pictures.json"} <= report.manifest.all_files().keys()
    assert artifact.verify(tiny.folder / "report")[1] == []
