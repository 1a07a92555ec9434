"""The bench: its repeats, its table, its memory, its random models; that figures are right is up to who runs it."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

from rpgcli.artifact import read, read_tensors
from tests.bench import bench
from tests.bench.bench import Measurement, chosen, main, make_report
from tests.bench.measuring import (
    WIDTH,
    BenchError,
    Figure,
    Row,
    Setting,
    at_least,
    at_most,
    in_turn,
    peak_of,
    shown,
    text,
    watch,
)
from tests.bench.released import released
from tests.bench.sampling import extrapolated
from tests.bench.tokenizing import copy_file, hash_file
from tests.bench.untrained import of_size, random_model, write_random
from tests.conftest import Rpg

ROWS = [
    Row("a ratio", Figure((210.0, 190.0, 200.0)), "x", {"slow": Figure((2.1, 1.9, 2.0)), "fast": Figure((0.01,) * 3)},
        goal=at_least(150), note="Said of both."),
    Row("  memory", Figure((3000.0,)), "MiB", goal=at_most(2560), note="Said of both."),
    Row("not here", None, note="No such device."),
]  # fmt: skip


def allocate(num_mib: int) -> None:
    """Hold so much for a moment, in a process of its own."""
    held = b"x" * (num_mib * 2**20)
    time.sleep(0.2)
    assert held


def measurement(name: str, rows: list[Row] | Exception | type[BaseException]) -> Measurement:
    def measure(setting: Setting) -> list[Row]:
        (setting.scratch / "file").write_text(name)
        if isinstance(rows, list):
            return rows
        raise rows

    return Measurement(name, f"Title of {name}", measure)


# --- repeats and figures ----------------------------------------------------------------------------------------------


def test_sides_run_in_turn_after_a_round_that_does_not_count():
    order: list[str] = []

    def side(name: str):
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    found = in_turn({"a": side("a"), "b": side("b")}, 3)
    assert order == ["a", "b"] * 4
    assert {name: figure.values for name, figure in found.items()} == {"a": (3, 5, 7), "b": (4, 6, 8)}
    assert in_turn({"a": side("a")}, 2, warm_up=False)["a"].values == (9, 10)


def test_a_ratio_is_taken_repeat_by_repeat():
    slow, fast = Figure((10.0, 40.0, 12.0)), Figure((1.0, 4.0, 1.0))
    ratio = slow.over(fast)
    assert [*ratio.values] == [10, 10, 12]
    assert [ratio.median, *ratio.quartiles] == [10, 10, 11]
    assert [*slow.times(2).plus(fast).values] == [21, 84, 25]
    assert [*Figure((3.0,)).quartiles] == [3, 3]
    assert [*Figure((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles] == [2, 4]
    with pytest.raises(ValueError, match="shorter"):
        slow.over(Figure((1.0,)))


def test_a_goal_is_met_from_its_own_side():
    assert [row.met for row in ROWS] == [True, False, None]
    assert Row("", Figure((1.0,)), goal=at_least(1)).met
    assert Row("", Figure((1.0,)), goal=at_most(1)).met
    assert Row("", Figure((1.0,))).met is None


def test_a_thousand_steps_lie_on_the_line_of_the_few():
    few, many = (Figure((2 + 0.5 * n, 1 + 0.25 * n)) for n in (5, 25))
    assert extrapolated(few, many).values == pytest.approx((502, 251))


def test_numbers_have_three_digits_and_no_exponent():
    assert [shown(v) for v in (0, 1234567, 911.4, 99.96, 1, 0.117, 0.00004567, -2.5)] == [
        "0", "1234567", "911", "100.0", "1.00", "0.117", "0.0000457", "-2.50",
    ]  # fmt: skip


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_measurement_that_fails_takes_no_other_with_it(tmp_path, capsys, monkeypatch):
    parts = (measurement("one", ROWS), measurement("two", OSError("no disk")), measurement("three", ROWS[:1]))
    monkeypatch.setattr(bench, "MEASUREMENTS", parts)
    assert main(["--out", str(tmp_path / "out"), "--only", "one,two,three"]) == 1
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if "failed" in line] == ["two: failed: OSError: no disk, 0 s"]
    assert "Failed: OSError: no disk" in said.out and said.out.count("| a ratio") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md"]
    assert main(["--out", str(tmp_path / "out"), "--only", "three"]) == 0


def test_the_files_say_what_was_measured(tmp_path):
    results = make_report(tmp_path, [measurement("one", ROWS)], quick=False, reference=None)
    report = json.loads((tmp_path / "bench.json").read_text())
    table = (tmp_path / "bench.md").read_text()
    assert text(report) == table
    assert report["schema"] == 1 and report["machine"]["torch"] == torch.__version__
    assert {"cores", "threads", "device", "memory_mib"} <= report["machine"].keys()
    (one,) = report["measurements"]
    assert one["rows"] == [row.to_json() for row in results[0].rows]
    assert one["rows"][0]["figure"]["values"] == [210, 190, 200] and one["rows"][0]["sides"][0]["median"] == 2
    assert [row["met"] for row in one["rows"]] == [True, False, None]

    lines = table.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1, "columns are aligned"
    assert [cell.strip() for cell in rows[2].split("|")[1:-1]] == [
        "a ratio", "200 x", "195 - 205", "2.00 : 0.0100 s", ">= 150, met",
    ]  # fmt: skip
    assert rows[3].split("|")[-2].strip() == "<= 2560, MISSED"
    assert lines.count("Said of both.") == 1 and "No such device." in lines
    assert "MISSED" not in text(report | {"quick": True})


def test_an_interrupted_bench_keeps_what_it_has(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_report(
            tmp_path, [measurement("one", ROWS), measurement("two", KeyboardInterrupt)], quick=True, reference=None
        )
    assert [one["name"] for one in json.loads((tmp_path / "bench.json").read_text())["measurements"]] == ["one"]
    assert not (tmp_path / "scratch").exists()


def test_what_takes_long_or_needs_a_checkout_is_named():
    usual = [one.name for one in chosen(None, has_reference=False)]
    assert [one.name for one in chosen(None, has_reference=True)] == [*usual, "released"]
    assert "full-size" not in usual and len(usual) == len(bench.MEASUREMENTS) - 2
    assert [one.name for one in chosen("full-size,scan", has_reference=False)] == ["full-size", "scan"]
    for names, said in (("scam", "known: tokenize"), ("released", "--reference")):
        with pytest.raises(ValueError, match=said):
            chosen(names, has_reference=False)


def test_a_measurement_runs_and_fits_the_page(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--quick", "--only", "lengths"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "bench.md").read_text()
    assert max(map(len, printed.splitlines())) <= WIDTH
    (one,) = json.loads((tmp_path / "bench.json").read_text())["measurements"]
    assert one["error"] is None and len(one["rows"]) == 2
    for row in one["rows"]:
        ratios = [a / b for a, b in zip(*(side["values"] for side in row["sides"]))]
        assert row["figure"]["values"] == pytest.approx(ratios) and min(ratios) > 0


# --- processes and files ----------------------------------------------------------------------------------------------


def test_the_memory_of_a_process_is_seen():
    assert peak_of(allocate, 700) >= 700


def test_a_command_is_watched_and_its_failure_told(tmp_path):
    watched = watch("--help")
    assert 0 < watched.anonymous <= watched.resident < 4000
    assert watched.seconds > 0
    with pytest.raises(BenchError, match=r"rpg verify ended with 3: .*holds no artifact"):
        watch("verify", tmp_path / "nothing")


def test_a_copy_is_the_file(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes(range(256)) * 999)
    assert copy_file(source, target) == hash_file(source) == hash_file(target)
    assert target.read_bytes() == source.read_bytes()


def test_random_tensors_are_a_safetensors_file_of_the_right_scale(tmp_path):
    with torch.device("meta"):
        shapes = {"w": torch.empty(300, 400), "conv": torch.empty(64, 10, 5, 5), "b": torch.empty(5000)}
    write_random(tmp_path / "model.safetensors", shapes, 0)
    found = read_tensors(tmp_path / "model.safetensors")
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in shapes.items()}
    for name, fan_in, mean in (("w", 400, 0), ("conv", 250, 0), ("b", 1, 1)):
        deviation = 1 / math.sqrt(fan_in)
        assert float(found[name].std()) == pytest.approx(deviation, rel=0.05)
        assert float(found[name].mean()) == pytest.approx(mean, abs=0.05 * deviation)


def test_a_model_that_nobody_trained_generates_whole_networks(tmp_path, rpg: Rpg):
    model = random_model(tmp_path / "run", of_size(100_000))
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["rpg"]
    assert 0.9e5 < model.facts["num_parameters"] < 1.2e5
    outcome = rpg("generate", "--run", tmp_path / "run", "--count", 1, "--steps", 2, "--state", "none")
    assert outcome.code == 0, outcome.err
    (written,) = (tmp_path / "run" / "generated").glob("[!.]*")
    generated = read(written, "generate")
    (network,) = generated.facts["networks"]
    state = generated.tensors(network["file"])
    assert sum(value.numel() for value in state.values()) == model.facts["num_parameters"]
    assert min(float(value.std()) for value in state.values()) > 0


# --- the released code ------------------------------------------------------------------------------------------------

THEIR_DIFFUSION = """\
import torch
from torch import nn

class ConditionalUNet(nn.Module):
    def __init__(self, layer_channels, model_dim, condition_dim, kernel_size):
        super().__init__()
        self.x, self.c = nn.Linear(model_dim, model_dim), nn.Linear(condition_dim, model_dim)

    def forward(self, x, t, c):
        return self.x(x) + self.c(c)

class GaussianDiffusionTrainer(nn.Module):
    def __init__(self, model, beta, T):
        super().__init__()
        self.model = model

    def forward(self, x_0, z):
        return (self.model(x_0, None, z) - x_0).square().mean()

class DDPMSampler(GaussianDiffusionTrainer):
    @torch.no_grad()
    def sample_one_step(self, x_t, time_step, c):
        return self.model(x_t, time_step, c)
"""


def test_what_cannot_be_imported_of_the_released_code_is_said(tmp_path: Path) -> None:
    setting = Setting(tmp_path / "scratch", quick=True, reference=tmp_path)
    with pytest.raises(BenchError, match="no checkout"):
        released(setting)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").write_text("import no_such_kernels\n")
    (tmp_path / "model" / "diffusion.py").write_text(THEIR_DIFFUSION)
    *alone, whole = released(setting)
    assert all(row.figure is not None and row.figure.median > 0 for row in alone) and len(alone) == 2
    assert whole.figure is None and "No module named 'no_such_kernels'" in whole.note
