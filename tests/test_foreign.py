"""`rpg evaluate --generated DIR`: networks of others, judged like ours; and what happens to a user who errs.

Wherever a command is refused, every byte of what was there must be as it was.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpgcli import artifact, recipe, rng
from rpgcli.collection import are_neighbours
from rpgcli.foreign import bring, plain
from rpgcli.pipeline import Run
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.targets import CnnConfig, Mlp3Config
from rpgcli.tasks import DigitsConfig, MultiClassConfig
from rpgcli.zoo import Zoo
from tests.conftest import Outcome, run_rpg, settings
from tests.helpers import same_bits
from tests.test_cli import refused, tree

State = dict[str, Tensor]
NUM_TRAINED, NUM_GENERATED = 6, 3
QUICK = settings(["evaluate.finetune={epochs: 1, batch_size: 512}"])
DESCRIBED = ["--arch", "mlp3", "--dataset", "digits"]
SUBSET = settings([
    "collect={kind: trajectory, parameters: [linear:last], num_checkpoints: 6, training: {epochs: 1}, "
    "save: {epochs: 1, batch_size: 64}}", "task.kind=multi-class", "target.kind=mlp3",
])  # fmt: skip
"""A zoo of ours in which only the last layer varies."""


def network(i: int, **target: Any) -> State:
    with rng.initialising(i, "foreign"):
        return Mlp3Config(**target).build(1, (8, 8), 10).state_dict()


def save_all(folder: Path, states: Sequence[State], *, pth: bool = False) -> Path:
    folder.mkdir(parents=True)
    for i, state in enumerate(states):
        if pth and i % 2:
            torch.save({"state_dict": state}, folder / f"net {i}.pth")  # noqa: TID251 - what other programs write
        else:
            save_file(state, folder / f"net {i}.safetensors")
    return folder


def relocated(state: State) -> State:
    """The same function, its hidden units in another order."""
    order = torch.randperm(50, generator=rng.stream(0, "relocated"))
    return {
        "layers.0.weight": state["layers.0.weight"][order].contiguous(),
        "layers.0.bias": state["layers.0.bias"][order].contiguous(),
        "layers.2.weight": state["layers.2.weight"][:, order].contiguous(),
        "layers.2.bias": state["layers.2.bias"],
    }


def row(report: Any, name: str) -> Any:
    (found,) = (g for g in report["groups"] if g["name"] == name and g["count"])
    return found


def figures(report: Any) -> dict[str, Any]:
    """What a report says of each group, seconds apart."""
    return {
        g["name"]: {k: v for k, v in g.items() if not k.startswith("seconds")} for g in report["groups"] if g["count"]
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`zoo/` and `made/`, as another program may have left them. Do not change it."""
    folder = tmp_path_factory.mktemp("foreign")
    save_all(folder / "zoo", [network(i) for i in range(NUM_TRAINED)])
    save_all(folder / "made", [network(100 + i) for i in range(NUM_GENERATED)])
    return folder


@pytest.fixture(scope="module")
def audited(folders: Path) -> tuple[Path, Outcome]:
    """The run that judged them, and how it ended. Do not change it: copy `run`."""
    run = folders / "run"
    starts = settings(["evaluate.initialisation={num_seeds: 2, training: {epochs: 1, batch_size: 256}}"])
    return run, audit(folders, "--run", run, "--json", *starts)


def audit(folders: Path, *more: object) -> Outcome:
    return run_rpg("evaluate", "--generated", folders / "made", "--zoo", folders / "zoo", *DESCRIBED, *QUICK, *more)


def brought(folders: Path, run: Path, made: Path | None = None, **options: Any) -> Zoo:
    """The generated networks as they are in the run, nothing measured yet."""
    found = recipe.load(None, ["task.kind=multi-class", "name=foreign"], target=Mlp3Config(), dataset=DigitsConfig())
    _, at = bring(Run(run, zoo=folders / "zoo", **options), found, made or folders / "made")
    return Zoo.read(at, "generate")


# --- two folders ------------------------------------------------------------------------------------------------------


def test_two_folders_are_judged_and_accuracies_are_those_of_the_networks(folders, audited):
    run, outcome = audited
    assert outcome.code == 0, outcome.err
    assert outcome.last == f"next: rpg verify {run}"
    report = outcome.json
    problem = ProblemConfig(dataset=DigitsConfig(), task=MultiClassConfig(), target=Mlp3Config())
    images = problem.open(data_root=None, download=False, device=torch.device("cpu")).dataset
    x, labels = images.normalise(images.test.pixels).flatten(1), images.test.labels
    for name, folder in (("trained", "zoo"), ("foreign", "made")):
        accuracies = []
        for path in sorted((folders / folder).iterdir()):
            state = load_file(path)
            hidden = (x @ state["layers.0.weight"].T + state["layers.0.bias"]).relu()
            answers = (hidden @ state["layers.2.weight"].T + state["layers.2.bias"]).argmax(1)
            accuracies.append((answers == labels).double().mean().item())
        found = row(report, name)
        assert found["count"] == len(accuracies)
        assert found["accuracy"]["mean"] == pytest.approx(sum(accuracies) / len(accuracies))
    assert report["verdict"].startswith("foreign reaches")
    assert report["seed"] is None and report["sampling"] is None
    assert run_rpg("verify", run).code == 0


def test_files_of_pytorch_and_sub_folders_hold_the_same_networks(folders, tmp_path):
    save_all(tmp_path / "zoo", [network(i) for i in range(NUM_TRAINED)], pth=True)
    save_all(tmp_path / "made", [network(100)])
    save_all(tmp_path / "made/sub", [network(100 + i) for i in (1, 2)], pth=True)
    found = brought(tmp_path, tmp_path / "run")
    for i, one in enumerate(found.networks):
        assert same_bits(found.state(one), dict(sorted(network(100 + i).items())))
    assert [one.label for one in found.networks] == [None, "sub", "sub"]
    assert found.networks[0].file == "00000-net-0.safetensors"
    facts = [artifact.read(run / "zoo", "collect").manifest for run in (tmp_path / "run", folders / "run")]
    assert facts[0].files == facts[1].files


def test_a_copy_of_our_zoo_is_judged_as_our_zoo_is(folders, tmp_path):
    ours = tmp_path / "ours"
    made = settings(["collect={kind: seeds, num_networks: 5, training: {epochs: 1}}", "task.kind=multi-class"])
    assert run_rpg("collect", "--run", ours, "--arch", "mlp3", *made).code == 0
    (tmp_path / "copy").mkdir()
    for path in (ours / "zoo").glob("*.safetensors"):
        shutil.copy(path, tmp_path / "copy")
    generated = ["--generated", folders / "made", *QUICK, "--json"]
    mixed = run_rpg("evaluate", "--zoo", ours / "zoo", "--run", tmp_path / "mixed", *generated)
    foreign = run_rpg("evaluate", "--zoo", tmp_path / "copy", "--run", tmp_path / "foreign", *DESCRIBED, *generated)
    for outcome in (mixed, foreign):
        assert outcome.code == 0, outcome.err
    assert figures(mixed.json) == figures(foreign.json)
    assert not (tmp_path / "mixed/zoo").exists()
    theirs, kept = (recipe.read_stored(run / "recipe.json") for run in (ours, tmp_path / "mixed"))
    assert kept.model_copy(update={"evaluate": theirs.evaluate}) == theirs


def test_what_rpg_generated_is_read_where_it_lies(folders, audited, tmp_path):
    (at,) = (path.parent for path in (audited[0] / "generated").glob("*/manifest.json"))
    found = brought(folders, tmp_path / "run", made=at)
    assert found.artifact.path == at and not (tmp_path / "run/generated").exists()


def test_copies_are_found_even_with_hidden_units_in_another_order_and_failures_are_named(folders, tmp_path):
    shutil.copytree(folders / "zoo", tmp_path / "zoo")
    failed = {**network(3), "layers.0.bias": torch.full((50,), torch.nan)}
    save_all(tmp_path / "made", [network(1), relocated(network(2)), failed])
    assert not torch.equal(relocated(network(2))["layers.0.bias"], network(2)["layers.0.bias"])
    outcome = audit(tmp_path, "--run", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    found = row(outcome.json, "foreign")
    assert found["failed"] == ["00002-net-2.safetensors"] and found["count"] == 2
    assert found["error_iou"]["nearest"] == pytest.approx(1)
    assert found["distance"]["mean"] < 1e-3 * outcome.json["scale"]["tau"]


def test_training_starts_from_networks_of_others(audited):
    starts = {start["name"]: start for start in audited[1].json["initialisation"]["starts"]}
    assert list(starts) == ["generated", "fresh", "average", "trained"]
    assert starts["generated"]["seconds_once"] is None and starts["average"]["seconds_once"] is None
    assert starts["generated"]["seconds_per_start"] is None


# --- again ------------------------------------------------------------------------------------------------------------


def test_the_same_again_is_up_to_date_also_without_saying_what_they_are(folders, audited):
    run, _ = audited
    before = tree(run)
    starts = settings(["evaluate.initialisation={num_seeds: 2, training: {epochs: 1, batch_size: 256}}"])
    for described in (DESCRIBED, []):
        folder = ["--generated", folders / "made", "--zoo", folders / "zoo"]
        outcome = run_rpg("evaluate", *folder, "--run", run, *QUICK, *starts, *described)
        assert outcome.code == 0 and "up to date" in outcome.err, outcome.err
        assert tree(run) == before


def test_a_changed_zoo_is_noticed_and_replaced_only_when_asked(folders, audited, tmp_path):
    for name in ("zoo", "made", "run"):
        shutil.copytree(folders / name, tmp_path / name)
    save_file(network(7), tmp_path / "zoo/net 0.safetensors")
    before = tree(tmp_path)
    refused(audit(tmp_path, "--run", tmp_path / "run"), 4, "from: ", "--force")
    assert tree(tmp_path) == before
    brought(tmp_path, tmp_path / "run", force=True)
    zoo = Zoo.read(tmp_path / "run/zoo")
    assert torch.equal(zoo.state(zoo.networks[0])["layers.0.weight"], network(7)["layers.0.weight"])
    assert artifact.read(tmp_path / "run/tokens", "tokenize").manifest.inputs["zoo"] == zoo.artifact.id


def test_other_generated_networks_lie_beside_the_first(folders, tmp_path):
    first = brought(folders, tmp_path / "run").artifact.path
    other = save_all(tmp_path / "more/made", [network(1)])
    second = brought(folders, tmp_path / "run", made=other).artifact.path
    assert first.parent == second.parent and first.name[:13] == second.name[:13] == "foreign-made-"
    assert first != second and Zoo.read(first, "generate").networks


def test_dry_run_counts_networks_and_writes_nothing(folders, tmp_path):
    outcome = audit(folders, "--run", tmp_path / "run", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    (plan,) = outcome.json["plans"]
    assert plan["trained, seen"] == NUM_TRAINED and plan["generated, all"] == NUM_GENERATED
    assert tree(tmp_path) == {}


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def damaged(folders: Path, to: Path, side: str, what: str) -> Path:
    """A copy of the two folders with something wrong in one of them."""
    for name in ("zoo", "made"):
        shutil.copytree(folders / name, to / name)
    bad = to / side / "net 1.safetensors"
    if what == "other architecture":
        with rng.initialising(0):
            save_file(CnnConfig().build(1, (8, 8), 10).state_dict(), bad)
    elif what == "other width":
        save_file(network(0, hidden=(20,)), bad)
    elif what == "other number of classes":
        save_file({**network(0), "layers.2.weight": torch.zeros(7, 50), "layers.2.bias": torch.zeros(7)}, bad)
    elif what == "nan":
        save_file({**network(0), "layers.0.bias": torch.full((50,), torch.nan)}, bad)
    elif what == "truncated":
        bad.write_bytes(bad.read_bytes()[:200])
    elif what == "code":
        torch.save({"w": torch.zeros(1), "f": os.getcwd}, to / side / "net 9.pth")  # noqa: TID251
    elif what == "single":
        for path in sorted((to / side).iterdir())[1:]:
            path.unlink()
    elif what == "empty":
        for path in (to / side).iterdir():
            path.unlink()
    elif what == "missing":
        shutil.rmtree(to / side)
    else:
        raise AssertionError(what)
    return to


DIFFERS = ["net 1.safetensors", "does not fit"]
WRONG: list[tuple[str, str, list[str]]] = [
    ("zoo", "other architecture", [*DIFFERS, "missing: layers.0.weight", "unexpected: "]),
    ("made", "other architecture", [*DIFFERS, "missing: layers.0.weight"]),
    ("made", "other width", [*DIFFERS, "layers.0.weight: (20, 64) float32 instead of (50, 64) float32"]),
    ("zoo", "other number of classes", [*DIFFERS, "layers.2.weight: (7, 50)", "data set"]),
    ("made", "other number of classes", [*DIFFERS, "layers.2.weight: (7, 50)", "data set"]),
    ("zoo", "nan", ["net 1.safetensors", "50 of 50 values of layers.0.bias are not finite", "leave it out"]),
    ("zoo", "truncated", ["net 1.safetensors", "not a safetensors file"]),
    ("made", "truncated", ["net 1.safetensors", "not a safetensors file"]),
    ("zoo", "code", ["net 9.pth", "cannot be read", "convert it to safetensors"]),
    ("made", "code", ["net 9.pth", "cannot be read", "convert it to safetensors"]),
    ("zoo", "single", ["zoo holds a single network"]),
    ("zoo", "empty", ["zoo holds no network"]),
    ("made", "empty", ["made holds no network"]),
    ("zoo", "missing", ["zoo is not a folder"]),
    ("made", "missing", ["made is not a folder"]),
]


@pytest.mark.parametrize("side, what, words", WRONG, ids=[f"{side}-{what}" for side, what, _ in WRONG])
def test_wrong_networks_are_refused_by_name_and_nothing_is_lost(folders, tmp_path, side, what, words):
    damaged(folders, tmp_path, side, what)
    before = tree(tmp_path)
    outcome = audit(tmp_path, "--run", tmp_path / "run")
    refused(outcome, 3, *words)
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("run/")} == before
    assert not list((tmp_path / "run").rglob("*.partial"))
    brought(folders, tmp_path / "run")  # The right folders, in the same run.


def test_a_json_error_is_one_object(folders, tmp_path):
    damaged(folders, tmp_path, "made", "empty")
    outcome = audit(tmp_path, "--run", tmp_path / "run", "--json")
    assert outcome.code == 3 and "holds no network" in str(outcome.json)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--arch", "mlp4", "--dataset", "digits"], ["unknown architecture 'mlp4'", "mlp3"]),
        (["--arch", "mlp3", "--dataset", "digit"], ["unknown data set 'digit'", "digits"]),
        (["--arch", "mlp3"], ["nothing says what", "--dataset"]),
        ([], ["nothing says what", "--arch NAME"]),
        ([*DESCRIBED, "--request", "x"], ["Leave out --request"]),
        ([*DESCRIBED, "--method", "rpg"], ["Leave out --request and --method"]),
        ([*DESCRIBED, "--set", "target.hidden=[0]"], ["target.hidden"]),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(folders, tmp_path, options, words):
    folder = ["--generated", folders / "made", "--zoo", folders / "zoo"]
    refused(run_rpg("evaluate", *folder, "--run", tmp_path / "run", *options), 2, *words)
    assert tree(tmp_path) == {}


def test_widths_are_settings(tmp_path):
    save_all(tmp_path / "zoo", [network(i, hidden=(5, 4)) for i in range(4)])
    save_all(tmp_path / "made", [network(9, hidden=(5, 4))])
    wide = settings(["target.hidden=[5, 4]"])
    assert audit(tmp_path, "--run", tmp_path / "run", "--dry-run", *wide).code == 0
    refused(audit(tmp_path, "--run", tmp_path / "run"), 3, "net 0.safetensors")


def test_described_networks_need_a_folder(folders, tmp_path):
    refused(run_rpg("evaluate", "--run", tmp_path / "run", *DESCRIBED), 2, "--generated DIR")


def test_a_zoo_of_ours_is_what_it_says_and_is_never_replaced(folders, run, rpg):
    before = tree(run)
    made = ["--generated", folders / "made", "--run", run]
    refused(rpg("evaluate", *made, "--arch", "mlp3"), 2, "--arch is mlp3", "made for cnn")
    refused(rpg("evaluate", *made), 2, "come without task bits")
    for force in ([], ["--force"]):
        refused(
            rpg("evaluate", *made, "--zoo", folders / "zoo", *DESCRIBED, *force), 4, "trained here", "another --run"
        )
    assert tree(run) == before


@pytest.fixture(scope="module")
def subset_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("subset") / "run"
    assert run_rpg("collect", "--run", run, *SUBSET).code == 0
    return run


def whole(run: Path) -> list[State]:
    zoo = Zoo.read(run / "zoo")
    return [zoo.state(n) for n in zoo.networks]


def test_whole_networks_are_judged_against_a_zoo_that_shares_a_frozen_part(subset_zoo, tmp_path):
    save_all(tmp_path / "made", whole(subset_zoo)[2:4])
    run = Path(shutil.copytree(subset_zoo, tmp_path / "run"))
    outcome = run_rpg("evaluate", "--generated", tmp_path / "made", "--run", run, *QUICK, "--json", "--finetune")
    assert outcome.code == 0, outcome.err
    assert row(outcome.json, "foreign")["distance"]["mean"] == pytest.approx(0, abs=1e-4)
    assert len(outcome.json["initialisation"]["starts"]) == 4


def test_what_is_the_same_in_all_files_of_a_zoo_is_kept_once(subset_zoo, tmp_path):
    save_all(tmp_path / "zoo", whole(subset_zoo))
    save_all(tmp_path / "made", whole(subset_zoo)[:1])
    brought(tmp_path, tmp_path / "run")
    ours, theirs = Zoo.read(subset_zoo / "zoo"), Zoo.read(tmp_path / "run/zoo")
    assert set(theirs.shared) == set(ours.shared) == {"layers.0.weight", "layers.0.bias"}
    assert theirs.artifact.facts["parameters"] == ours.artifact.facts["parameters"]
    for a, b in zip(ours.networks, theirs.networks):
        assert a.accuracy == b.accuracy
        assert same_bits(dict(sorted(ours.state(a).items())), dict(sorted(theirs.state(b).items())))
    assert artifact.read(tmp_path / "run/tokens", "tokenize").facts["num_parameters"] == 510


def test_networks_with_another_frozen_part_cannot_be_compared(subset_zoo, tmp_path):
    states = whole(subset_zoo)[:2]
    save_all(tmp_path / "made", [states[0], {**states[1], "layers.0.bias": states[1]["layers.0.bias"] + 1}])
    run = Path(shutil.copytree(subset_zoo, tmp_path / "run"))
    outcome = run_rpg("evaluate", "--generated", tmp_path / "made", "--run", run, *QUICK)
    refused(outcome, 3, "00001-net-1.safetensors", "layers.0.bias is not what all training networks share")


def test_snapshots_of_one_training_count_as_one_and_independent_networks_do_not(tmp_path, caplog):
    """One optimiser step is no measure of how far separate trainings lie apart."""
    steps = torch.randn(40, 50, 64, generator=rng.stream(0, "steps")).cumsum(0)
    save_all(tmp_path / "zoo", [{**network(0), "layers.0.weight": step} for step in steps])
    save_all(tmp_path / "made", [network(9)])
    save_all(tmp_path / "others/zoo", [network(i) for i in range(12)])
    save_all(tmp_path / "others/made", [network(9)])
    runs = {}
    for folder in (tmp_path, tmp_path / "others"):
        caplog.clear()
        brought(folder, folder / "run")
        runs[folder.name] = (
            [n.run for n in Zoo.read(folder / "run/zoo").networks],
            "snapshots of one training" in caplog.text,
        )
    assert runs["others"] == (list(range(12)), False)
    assert runs[tmp_path.name] == ([0] * 40, True)


def test_neighbours_along_a_training_are_far_nearer_than_others():
    independent = torch.randn(40, 300, generator=rng.stream(0, "neighbours"))
    walk = independent.cumsum(0)
    assert are_neighbours(walk) and not are_neighbours(independent)
    assert are_neighbours(torch.cat([walk, walk + 100 * independent[0]]))  # Two trainings in one folder.
    assert are_neighbours(walk * torch.logspace(-6, 6, 300))  # Whatever the units of the coordinates.
    assert not are_neighbours(independent[:1]) and not are_neighbours(torch.zeros(5, 3))


def test_names_that_an_artifact_may_have():
    assert plain("my nets (v2)!") == "my-nets-v2"
    assert plain("...") == "networks"
    assert artifact.FILE_NAME.fullmatch(plain("-é" * 60 + "x") + ".safetensors")


def test_problem_of_the_audit_is_multi_class(audited):
    problem = ProblemConfig.of(Zoo.read(audited[0] / "zoo").artifact.section)
    assert not Problem(problem, None, False, torch.device("cpu")).has_bits
