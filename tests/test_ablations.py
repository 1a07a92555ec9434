"""The ablations: which rows share a cell, what a cell keeps, and the tables, on digits."""

import statistics
from collections.abc import Sequence

import pytest
import torch

from rpgcli import artifact
from rpgcli.errors import OutputError
from rpgcli.pipeline import run_train_ae
from rpgcli.recipe import load
from rpgcli.subsets import select_parameters
from tests.bench.ablations import Bench, Measured, Row, Table, drawn_latents, folder_name, make_report, summary, tables
from tests.helpers import draw

COMPOSITIONS = {
    "pdiff-fashion-resnet18": {"normalisation/instance", "architecture/conv, fc denoiser"},
    "pdiff-fashion-resnet18-paper": {"normalisation/batch", "architecture/conv"},
}
"""And their rows that change nothing, beside those that never do."""
UNCHANGED = {
    "checkpoints/K = 200", "depth/BN16-18", "type/bn", "noise/both", "input-noise/0.001", "latent-noise/0.1",
    "steps/T = 1000", "optimiser/adamw", "generator/p-diff",
}  # fmt: skip
TOY = """\
dataset: {kind: digits}
task: {kind: multi-class}
target: {kind: mlp3}
collect:
  kind: trajectory
  parameters: [linear:last]
  num_checkpoints: 12
  training: {epochs: 1}
  save: {epochs: 2, batch_size: 64, learning_rate: 1e-2, schedule: constant}
autoencoder:
  network: {kind: mlp, widths: [16], latent_dim: 4}
  training: {num_steps: 20, batch_size: 8, ema_decay: 0}
diffusion: {denoiser: {kind: mlp, width: 16, depth: 1}, training: {num_steps: 20, ema_decay: 0}}
generate: {num_steps: 4}
"""
SMALL = (
    Table("checkpoints", "Checkpoints", (Row("K = 1", ("collect.num_checkpoints=1",), "1/2/3"), Row("K = 12"))),
    Table("noise", "Noise", (Row("none", ("autoencoder.network.latent_noise=0",)), Row("both"))),
    Table("generator", "Generator", (Row("AE + KDE", draw="kde"), Row("prior", draw="prior"))),
)


@pytest.fixture
def bench(tmp_path):
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(TOY)
    return Bench(tmp_path / "out", str(recipe), networks=5)


def rows_of(chosen: Sequence[Table]) -> list[tuple[str, Row]]:
    return [(table.name, row) for table in chosen for row in table.rows]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_row_is_a_recipe_and_equal_recipes_share_a_cell(name, tmp_path):
    bench = Bench(tmp_path, name, networks=1)
    rows = rows_of(tables(bench.recipe()))
    cells = bench.cells(rows)
    assert len(cells) == len(rows), "no two rows have the same name"
    assert len({cell.name for cell in cells.values()}) == len(set(cells.values())) == 45 - 10
    whole = cells["checkpoints/K = 200"]
    assert bench.recipe(whole.settings) == load(name)
    assert {row for row, cell in cells.items() if cell == whole} == UNCHANGED | COMPOSITIONS[name]


def test_each_depth_has_the_layers_of_the_release():
    recipe = load("pdiff-fashion-resnet18")
    with torch.device("meta"):
        model = recipe.target.build(1, (28, 28), 10)
    (depth,) = (table for table in tables(recipe) if table.name == "depth")
    found = {}
    for row in depth.rows:
        collect = load("pdiff-fashion-resnet18", row.settings).collect
        assert collect.kind == "trajectory"
        found[row.name] = select_parameters(model, collect.patterns)

    def norms(*blocks: str) -> list[str]:
        return [f"{block}.bn{i}.{part}" for block in blocks for i in (1, 2) for part in ("weight", "bias")]

    assert found == {
        "BN10-14": norms("layer3.0", "layer3.1"), "BN14-16": norms("layer4.0"), "BN16-18": norms("layer4.1"),
    }  # fmt: skip


def test_the_tables_of_a_toy(bench, capsys):
    report = make_report(bench, SMALL, repeats=2)
    rows = {row["name"]: row for table in report["tables"] for row in table["rows"]}

    refused = rows.pop("K = 1")
    assert (refused["figures"], refused["num_refused"], refused["paper"]) == ({}, 2, "1/2/3")
    assert "nothing to learn" in refused["refused"]
    for row in rows.values():
        assert row["refused"] is None
        figures = {name: figure["mean"] for name, figure in row["figures"].items()}
        assert 0 <= figures["min"] <= figures["mean"] <= 1
        assert figures["min"] <= figures["median"]
        assert 0 < figures["iou_nearest"] <= 1 and 0 < figures["iou_within"] <= 1
        assert figures["seconds"] > 0 and figures["deviation_ratio"] >= 0
        assert len(set(row["figures"]["original_mean"]["values"])) == 2, "a repeat has a zoo of its own"
    assert rows["K = 12"]["figures"] == rows["both"]["figures"], "one cell"
    originals = [row["figures"]["original_mean"] for row in rows.values()]
    assert all(figure == originals[0] for figure in originals), "one zoo"

    kept = sorted(path.name for path in (bench.out / "noise" / "none" / "repeat-0").iterdir() if path.is_dir())
    assert kept == ["figures"], "nothing but numbers"
    assert len(list((bench.out / "zoos").glob("*/zoo"))) == 4, "two settings of the zoo, two repeats"
    bases = {artifact.read(path, "collect").section["collect"]["pretrained"] for path in bench.out.glob("zoos/*/zoo")}
    assert len(bases) == 1 and None not in bases, "all from one base network"

    capsys.readouterr()
    assert make_report(bench, SMALL, repeats=2) == report
    assert capsys.readouterr().err == "up to date\n"


def test_an_interrupted_cell_goes_on(bench, monkeypatch):
    whole = Bench(bench.out.with_name("whole"), bench.composition, bench.networks)
    expected = make_report(whole, SMALL[1:2], repeats=1)

    def stop(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tests.bench.ablations.run_train_diffusion", stop)
        with pytest.raises(KeyboardInterrupt):
            make_report(bench, SMALL[1:2], repeats=1)
    with monkeypatch.context() as patch:
        trained = []

        def train(run, recipe):
            trained.append(run_train_ae(run, recipe))
            return trained[-1]

        patch.setattr("tests.bench.ablations.run_train_ae", train)
        found = make_report(bench, SMALL[1:2], repeats=1)
    assert [one.made_now for one in trained] == [False, True], "that of the first cell was there"
    for report in (found, expected):
        for row in report["tables"][0]["rows"]:
            del row["figures"]["seconds"]
    assert found["tables"] == expected["tables"]


def test_another_composition_in_the_same_folder_is_refused(bench):
    make_report(bench, SMALL[1:2], repeats=1)
    with pytest.raises(OutputError, match="other settings"):
        make_report(Bench(bench.out, bench.composition, networks=6), SMALL[1:2], repeats=1)


def test_a_summary_is_mean_and_standard_error_of_what_ran():
    ran = [Measured({"mean": value}, None, False) for value in (0.5, 0.6, 0.8)]
    row = summary([*ran, Measured({}, "no", False)])
    figure = row["figures"]["mean"]
    assert (figure["mean"], figure["values"]) == (pytest.approx(1.9 / 3), [0.5, 0.6, 0.8])
    assert figure["se"] == pytest.approx(statistics.stdev([0.5, 0.6, 0.8]) / 3**0.5)
    assert (row["refused"], row["num_refused"]) == ("no", 1)
    assert summary(ran[:1])["figures"]["mean"]["se"] is None


def test_latents_of_a_density_lie_near_those_it_was_made_from():
    latents = 3 + draw(40, 2)
    drawn = drawn_latents(latents, "kde", 0, 400)
    assert float(torch.cdist(drawn, latents).amin(1).median()) < 1
    torch.testing.assert_close(drawn.mean(0), latents.mean(0), atol=0.3, rtol=0)  # 1.2 / sqrt(400), five times
    prior = drawn_latents(latents, "prior", 0, 400)
    torch.testing.assert_close(prior.mean(0), torch.zeros(2), atol=0.25, rtol=0)  # 1 / sqrt(400), five times
    assert drawn_latents(latents, "prior", 1, 400).ne(prior).all()


def test_folder_names_are_plain():
    assert folder_name("steps/T = 10, raw") == "steps/t-10-raw"
    assert folder_name("input-noise/0.0001") == "input-noise/0.0001"
