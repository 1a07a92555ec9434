"""The audit through its real code: sets of networks whose kind is known are called what they are."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import log_loss
from torch import Tensor
from torch.func import functional_call

from rpgcli import rng
from rpgcli.alignment import Aligner
from rpgcli.artifact import Draft
from rpgcli.collection import OptimiserConfig, SeedsConfig, TasksConfig, TrajectoryConfig
from rpgcli.errors import ArtifactError, GateError, LayoutError
from rpgcli.evaluation import EvaluateConfig
from rpgcli.evaluation.audit import Auditor, Candidate, OneQuestion, answering_store
from rpgcli.evaluation.report import check_gate, make_report
from rpgcli.methods import resampling
from rpgcli.methods.baselines import MlpSetting
from rpgcli.pipeline import Run, run_collect, run_tokenize
from rpgcli.problem import Problem, Split
from rpgcli.progress import silent
from rpgcli.recipe import Recipe
from rpgcli.subsets import Tail
from rpgcli.targets import CnnConfig, Mlp3Config
from rpgcli.tasks import MultiClassConfig
from rpgcli.tokens import TokenStore
from rpgcli.zoo import Network, Zoo
from tests.helpers import State, make

NUM = 8
"""Networks of a planted set."""
FEW = ("average", "interpolation", "noise-0.05")
"""Trivial generators that are looked at, to save time."""
BRIEFLY = OptimiserConfig(epochs=5, batch_size=64, learning_rate=2e-2)
CONFIG = EvaluateConfig(
    mlp=(MlpSetting(width=8, num_steps=4),), finetune=OptimiserConfig(epochs=1, batch_size=256, learning_rate=1e-4)
)


@dataclass(frozen=True)
class Trained:
    """A zoo with its tokens and data."""

    problem: Problem
    zoo: Zoo
    store: TokenStore

    def states(self, num: int | None = None) -> list[State]:
        """As they stand in the files."""
        return [self.zoo.state(network) for network in self.zoo.select("seen")[:num]]


def trained(folder: Path, **sections: Any) -> Trained:
    recipe = Recipe(**sections)
    run = Run(folder)
    zoo = run_collect(run, recipe)
    return Trained(recipe.problem().open(data_root=None, download=False, device=run.device), Zoo(zoo), TokenStore(
        run_tokenize(run, recipe)
    ))  # fmt: skip


@pytest.fixture(autouse=True)
def few_generators(monkeypatch):
    monkeypatch.setattr(resampling, "GENERATORS", {name: resampling.GENERATORS[name] for name in FEW})


SEEDS: dict[str, Any] = {"task": MultiClassConfig(), "target": Mlp3Config(hidden=(12, 12))}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Independent starts, hidden units aligned."""
    return trained(tmp_path_factory.mktemp("seeds"), collect=SeedsConfig(num_networks=20, training=BRIEFLY), **SEEDS)


@pytest.fixture(scope="module")
def further(tmp_path_factory):
    """The same from other starts: networks that the zoo does not know."""
    collect = SeedsConfig(num_networks=NUM, training=BRIEFLY)
    return trained(tmp_path_factory.mktemp("further"), collect=collect, seed=1, **SEEDS).states()


@pytest.fixture(scope="module")
def subset(tmp_path_factory):
    """One training of the last layer alone."""
    brief = OptimiserConfig(epochs=1, batch_size=64)
    collect = TrajectoryConfig(parameters="linear:last", num_checkpoints=12, training=brief, save=brief)
    return trained(tmp_path_factory.mktemp("subset"), collect=collect, task=MultiClassConfig(), target=CnnConfig())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    collect = TasksConfig(
        num_seen=8, num_validation=4, num_unseen=4, snapshots=1, pretrain=OptimiserConfig(epochs=2), training=BRIEFLY
    )
    return trained(tmp_path_factory.mktemp("tasks"), collect=collect, target=Mlp3Config(hidden=(12,)))


def generated(folder: Path, states: Sequence[State], networks: Sequence[Network] = ()) -> Zoo:
    """A folder of networks that some generator wrote."""

    def body(draft: Draft) -> Mapping[str, Any]:
        facts = networks or [Network(f"{i:03d}.safetensors", "all", sample=i) for i in range(len(states))]
        for network, state in zip(facts, states):
            draft.save_tensors(network.file, state)
        return {
            "networks": [network.to_json() for network in facts], "method": "planted", "seed": None, "sampling": None,
            "condition": None,
        }  # fmt: skip

    return Zoo(make(folder, body, stage="generate", section={"request": "planted"}))


def audit(there: Trained, made: Zoo) -> dict[str, Any]:
    return make_report(there.problem, CONFIG, there.zoo, there.store, made, silent)


def row(report: Mapping[str, Any], name: str = "planted", split: str | None = None) -> Any:
    return next(g for g in report["groups"] if g["name"] == name and split in (None, g["split"]))


# --- planted cases ----------------------------------------------------------------------------------------------------


def permuted(there: Trained, state: State, seed: int) -> State:
    """The same function: hidden units in another order, what enters scaled and what leaves scaled back."""
    moved = dict(state)
    for group in there.problem.config.target.symmetries(there.problem.skeleton):
        generator = rng.stream(seed, "permuted", group.name)
        group.permute(moved, [torch.randperm(len(order), generator=generator) for order in group.identity()])
        group.scale(moved, 0.5 + torch.rand(group.num_units, generator=generator))
    return moved


def average(there: Trained, seed: int) -> State:
    """The mean, hidden units aligned, and a thirtieth of the zoo's deviation."""
    vectors = torch.stack([there.store.vector(i) for i in range(len(there.store))])
    mean = vectors.mean(0)
    return there.store.rebuilt(mean + torch.randn(mean.shape, generator=rng.stream(seed, "average")) / 30)


def noise(state: State, seed: int) -> State:
    return {name: torch.randn(value.shape, generator=rng.stream(seed, name)) for name, value in state.items()}


Plant = Callable[[Trained, list[State]], list[State]]
PLANTED: dict[str, tuple[Plant, str]] = {
    "copies": (lambda there, _: there.states(NUM), "all copies of training networks"),
    "relocated": (
        lambda there, _: [permuted(there, state, i) for i, state in enumerate(there.states(NUM))],
        "all copies of training networks with hidden units exchanged",
    ),
    "chance": (lambda there, _: [noise(state, i) for i, state in enumerate(there.states(NUM))], "at chance"),
    "average": (lambda there, _: [average(there, i) for i in range(NUM)], "all the average of the training networks"),
    "new": (lambda _, further: further, "as new as a further training"),
}


@pytest.fixture(scope="module")
def reports_of(seeds, further, tmp_path_factory):
    """The report of each planted set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "GENERATORS", {name: resampling.GENERATORS[name] for name in FEW})
        return {
            kind: audit(seeds, generated(tmp_path_factory.mktemp(kind) / "made", plant(seeds, further)))
            for kind, (plant, _) in PLANTED.items()
        }


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_set_is_called_what_it_is(reports_of, kind):
    report = reports_of[kind]
    most = max(report["findings"], key=lambda finding: finding["count"])
    assert most["kind"] == kind
    assert most["of"] == NUM
    assert 2 * most["count"] > NUM
    if kind not in ("chance", "new"):
        assert report["findings"] == [most]
        assert most["count"] == NUM
        assert most["sentence"].startswith(f"{NUM} of {NUM} generated networks are ")
    assert PLANTED[kind][1] in report["verdict"]
    assert report["verdict"].startswith("planted reaches 0.")


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("copies", "the training networks themselves."),
        ("relocated", "the training networks themselves."),
        ("chance", "guessing."),
        ("average", "the strongest trivial generator"),
    ],
)
def test_what_is_trivial_is_not_better(reports_of, kind, instead):
    assert not reports_of[kind]["beats_baselines"]
    assert f"no evidence that it is better than {instead}" in reports_of[kind]["verdict"]


def test_the_average_is_as_good_as_the_average(reports_of):
    report = reports_of["average"]
    (found,) = (c for c in report["comparisons"] if c["against"] == "average")
    assert found["comparable"]
    assert found["difference"] == pytest.approx(0, abs=0.02)  # 7 of 360 images


def test_networks_of_a_further_training_are_compared_with_what_is_as_new(reports_of):
    """Near-copies are nearly as good as trained networks, averages lie between them: neither is as far."""
    report = reports_of["new"]
    comparable = {c["against"]: c["comparable"] for c in report["comparisons"]}
    assert {name for name, is_so in comparable.items() if not is_so} >= {
        "average", "interpolation", "noise-0.05", "finetuned"
    }  # fmt: skip
    assert all(c["why"].startswith(("as novel: ", "less novel: ")) for c in report["comparisons"])
    assert row(report)["distance"]["in_tau"] == pytest.approx(1, abs=0.2)
    assert row(report)["distance"]["raw"]["in_tau"] == pytest.approx(1, abs=0.2)
    assert row(report)["functional_novelty"]["mean"] == pytest.approx(1, abs=0.6)


def test_copies_are_near_in_every_figure(reports_of):
    copies, relocated = row(reports_of["copies"]), row(reports_of["relocated"])
    for found in (copies, relocated):
        assert found["error_iou"]["nearest"] == pytest.approx(1, abs=1e-2)  # a rounding may turn an answer
        assert found["error_iou"]["minimal_similarity"] > 0.9
        assert found["distance"]["in_tau"] < 1e-3
        assert found["distance"]["raw"]["in_tau"] < 1e-3
        assert found["disagreement"]["nearest"]["mean"] < 1e-3
        assert {share["share"] for share in found["np"]} == {0}
    assert copies["error_iou"]["nearest_se"] == pytest.approx(0, abs=1e-2)


def test_networks_below_alpha_are_compared_with_all(reports_of):
    comparisons = reports_of["chance"]["comparisons"]
    assert all(c["comparable"] for c in comparisons)
    assert {c["why"][:37] for c in comparisons} == {"the generated networks are not good: "}


def test_a_permuted_network_computes_the_same(seeds):
    state = seeds.states(1)[0]
    moved = permuted(seeds, state, 0)
    x = seeds.problem.images("test", torch.arange(20))
    model = seeds.problem.build("any")
    torch.testing.assert_close(
        functional_call(model, moved, (x,)), functional_call(model, state, (x,)), atol=1e-4, rtol=1e-4
    )
    assert not torch.equal(moved["layers.0.weight"], state["layers.0.weight"])


# --- figures against independent ones ---------------------------------------------------------------------------------


def flat(states: Sequence[State], names: Sequence[str]) -> np.ndarray:
    return torch.stack([torch.cat([state[name].flatten() for name in names]) for state in states]).double().numpy()


@torch.no_grad()
def logits(there: Trained, state: State) -> Tensor:
    model = there.problem.build("any")
    model.load_state_dict(state)
    return model.eval()(there.problem.images("test", torch.arange(len(there.problem.dataset.test.labels))))  # type: ignore[no-any-return]


def test_calibration_is_scikit_learn_s(reports_of, seeds):
    labels = seeds.problem.dataset.test.labels.numpy()
    expected = [log_loss(labels, logits(seeds, s).double().softmax(1).numpy()) for s in seeds.states(NUM)]
    found = row(reports_of["copies"])["calibration"]
    assert found["nll"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert found["nll_se"] == pytest.approx(np.std(expected, ddof=1) / math.sqrt(NUM), rel=1e-4)
    assert 0 < found["ece"] < 1
    for group in reports_of["copies"]["groups"]:
        assert group["count"] == 0 or set(group["calibration"]) == {"nll", "nll_se", "ece", "ece_se"}


def test_calibration_of_tasks_takes_each_network_s_own_labels(tasks, tmp_path):
    networks = tasks.zoo.select("unseen")
    report = audit(tasks, generated(tmp_path / "made", [tasks.zoo.state(n) for n in networks], networks))
    y = tasks.problem.dataset.test.labels.tolist()
    expected = [
        log_loss([int(str(n.task_bits)[c]) for c in y], logits(tasks, tasks.zoo.state(n)).double().softmax(1).numpy())
        for n in networks
    ]
    found = row(report, split="unseen")
    assert found["calibration"]["nll"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert "calibration" in row(report, "ridge")
    assert [c["comparable"] for c in report["comparisons"]] == [True] * len(report["comparisons"])
    assert found["distance"]["in_tau"] > 0
    assert "error_iou" not in found  # they answer different questions


def test_disagreement_is_counted_pair_by_pair(reports_of, seeds):
    answers = torch.stack([logits(seeds, state).argmax(1) for state in seeds.states()])
    pairs = [float((answers[i] != answers[j]).double().mean()) for i in range(NUM) for j in range(i)]
    found = row(reports_of["copies"])["disagreement"]["within"]
    assert found["mean"] == pytest.approx(np.mean(pairs), abs=1e-4)
    assert found["p10"] == pytest.approx(np.percentile(pairs, 10), abs=3e-3)
    unlike = (answers[:, None] != answers).double().mean(2) + torch.eye(len(answers))
    own = row(reports_of["copies"], "trained")["disagreement"]["nearest"]
    assert own["mean"] == pytest.approx(float(unlike.amin(1).mean()), abs=1e-4)


def test_distances_are_scipy_s_raw_and_standardised(subset, tmp_path):
    names = [spec.name for spec in subset.store.layout.generated]
    zoo = subset.states()
    made = [{**s, **{n: s[n] + 0.01 * torch.randn(s[n].shape, generator=rng.stream(i, n)) for n in names}}
            for i, s in enumerate(zoo[:5])]  # fmt: skip
    report = audit(subset, generated(tmp_path / "made", made))
    raw = cdist(flat(made, names), flat(zoo, names)).min(1)
    standardised = cdist(*(torch.stack([subset.store.vector_of(s) for s in g]).double().numpy() for g in (made, zoo)))
    found = row(report)["distance"]
    assert found["raw"]["mean"] == pytest.approx(raw.mean(), rel=1e-5)
    assert found["raw"]["p10"] == pytest.approx(np.percentile(raw, 10), rel=1e-5)
    assert found["mean"] == pytest.approx(standardised.min(1).mean(), rel=1e-5)
    assert "in_tau" not in found  # one training
    assert report["scale"]["tau"] is None
    assert report["scale"]["tau_raw"] is None
    assert "distance" not in row(report, "trained")


def test_raw_distances_of_independent_starts_are_those_after_alignment(seeds, further):
    """Ten networks, each brought to the first of the zoo by hand."""
    groups = seeds.problem.config.target.symmetries(seeds.problem.skeleton)
    aligner = Aligner(seeds.states(1)[0], groups)
    names = list(seeds.problem.reference)
    zoo, made = (flat([aligner(s).state for s in states], names) for states in (seeds.states(), further))
    auditor = OneQuestion(seeds.problem, seeds.store, seeds.zoo)
    found = auditor.space.raw_distances(auditor.look(Candidate(state) for state in further).raw)
    np.testing.assert_allclose(found, cdist(made, zoo).min(1), rtol=1e-3)  # units of equal worth may change places


# --- bad input --------------------------------------------------------------------------------------------------------


def spoilt(state: State, value: float = math.nan) -> State:
    name = next(iter(state))
    return {**state, name: torch.full_like(state[name], value)}


def test_networks_that_are_not_finite_are_counted_named_and_left_out(seeds, further, tmp_path, caplog):
    few = further[:4]
    huge = {name: value * 1e30 for name, value in few[0].items()}  # finite, but its answers are not
    made = [few[0], spoilt(few[0]), few[1], spoilt(few[1], math.inf), few[2], huge, few[3]]
    with caplog.at_level(logging.WARNING):
        report = audit(seeds, generated(tmp_path / "made", made))
    files = ["001.safetensors", "003.safetensors", "005.safetensors"]
    clean = audit(seeds, generated(tmp_path / "clean", few))
    assert row(report)["failed"] == files
    assert row(report)["count"] == 4
    assert row(report)["accuracy"] == row(clean)["accuracy"]
    assert row(report)["distance"] == row(clean)["distance"]
    assert "3 more failed: NaN or infinity" in report["verdict"]
    assert [report["findings"][-1][key] for key in ("kind", "count", "files")] == ["failed", 3, files]
    assert "3 generated networks failed" in caplog.text
    assert "001.safetensors" in caplog.text


def test_a_folder_of_failed_networks_alone_gets_a_verdict(seeds, further, tmp_path):
    report = audit(seeds, generated(tmp_path / "made", [spoilt(state) for state in further[:3]]))
    assert report["verdict"] == "all 3 networks of planted failed (NaN or infinity): no evidence that it is better."
    assert not report["beats_baselines"]
    assert row(report)["accuracy"] is None
    with pytest.raises(GateError, match="no network"):
        check_gate(report, 0.1, tmp_path)


def test_failed_networks_of_tasks(tasks, tmp_path):
    networks = tasks.zoo.select("unseen")
    states = [tasks.zoo.state(n) for n in networks]
    report = audit(tasks, generated(tmp_path / "made", [spoilt(states[0]), *states[1:]], networks))
    assert row(report, split="unseen")["failed"] == [networks[0].file]
    assert row(report, split="unseen")["count"] == len(networks) - 1
    assert "on 3 unseen tasks" in report["verdict"]
    report = audit(tasks, generated(tmp_path / "all", [spoilt(state) for state in states], networks))
    assert report["verdict"].startswith("all 4 networks of planted failed")
    assert report["comparisons"] == []


def test_networks_of_tasks_that_are_copies_are_called_so(tasks, tmp_path):
    seen, unseen = tasks.zoo.select("seen"), tasks.zoo.select("unseen")
    copies = [tasks.zoo.state(network) for network in seen[: len(unseen)]]
    report = audit(tasks, generated(tmp_path / "made", copies, unseen))
    assert report["findings"][0]["kind"] == "copies"
    assert "no evidence that it is better than the training networks themselves" in report["verdict"]


def test_a_single_network_has_no_error_and_no_inside(seeds, further, tmp_path):
    report = audit(seeds, generated(tmp_path / "made", further[:1]))
    found = row(report)
    assert found["error_iou"]["within"] is None
    assert found["disagreement"]["within"] is None
    assert found["accuracy"]["se"] == 0
    assert not report["beats_baselines"]
    assert "planted reaches" in report["verdict"]
    assert "on 1 network" in report["verdict"]
    assert "no evidence that it is better" in report["verdict"]
    assert {c["has_error"] for c in report["comparisons"]} == {False}


def with_test(there: Trained, change: Callable[[Any], Any]) -> Trained:
    """With other test images."""
    problem = Problem(there.problem.config, None, False, there.problem.device)
    problem.dataset = replace(problem.dataset, test=change(problem.dataset.test))
    return replace(there, problem=problem)


def test_networks_that_make_no_error_are_all_alike(seeds, tmp_path):
    """Test labels are what the first network answers."""
    answers = logits(seeds, seeds.states(1)[0]).argmax(1)
    perfect = with_test(seeds, lambda test: replace(test, labels=answers))
    report = audit(perfect, generated(tmp_path / "made", seeds.states(1) * 3))
    found = row(report)
    assert found["accuracy"] == {"mean": 1, "se": 0, "min": 1, "max": 1}
    assert found["error_iou"] == {"within": 1, "nearest": 1, "nearest_se": 0, "minimal_similarity": 1}
    assert found["vote_gain"] == 0


def test_a_class_without_test_images_is_named(seeds, further, tmp_path, caplog):
    def without(test: Any) -> Any:
        return test.take((test.labels != 7).nonzero()[:, 0])

    there = with_test(seeds, without)
    with caplog.at_level(logging.WARNING):
        report = audit(there, generated(tmp_path / "made", further[:3]))
    sentence = "no test image shows 7: nothing says how networks do on it."
    assert report["findings"][-1] == {"kind": "missing-classes", "classes": ["7"], "sentence": sentence}
    assert sentence in caplog.text
    assert row(report)["accuracy"]["mean"] > 0.5


def test_another_architecture_is_refused_with_the_file_s_name(seeds, further, subset, tmp_path):
    made = generated(tmp_path / "made", [further[0], subset.states(1)[0]])
    with pytest.raises(LayoutError, match=r"001\.safetensors: .*does not fit the target"):
        audit(seeds, made)


def test_a_frozen_part_must_be_the_one_that_all_share(subset, tmp_path):
    good = subset.states(3)
    other = {**good[1], "c1.weight": good[1]["c1.weight"] + 0.1}
    with pytest.raises(LayoutError, match=r"001\.safetensors: c1\.weight is not what all training networks share"):
        audit(subset, generated(tmp_path / "other", [good[0], other]))
    broken = {**good[1], "c1.weight": good[1]["c1.weight"] * math.nan}
    report = audit(subset, generated(tmp_path / "broken", [good[0], broken, good[2]]))
    assert row(report)["failed"] == ["001.safetensors"]
    assert report["findings"][0]["kind"] == "copies"


def test_a_folder_without_networks_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no network"):
        generated(tmp_path / "made", [])


# --- cost -------------------------------------------------------------------------------------------------------------


def test_every_generated_file_is_read_once_and_the_frozen_part_computed_once(subset, tmp_path, monkeypatch):
    made = generated(tmp_path / "made", subset.states(6))
    reads: list[str] = []
    splits: list[str] = []
    state, activations = Zoo.state, Tail._activations

    def counted_state(self: Zoo, network: Network) -> State:
        reads.append(network.file)
        return state(self, network)

    def counted_activations(self: Tail, split: Split) -> list[Tensor]:
        splits.append(split)
        return activations(self, split)

    monkeypatch.setattr(Zoo, "state", counted_state)
    monkeypatch.setattr(Tail, "_activations", counted_activations)
    audit(subset, made)
    assert sorted(reads) == sorted(network.file for network in made.networks)
    assert sorted(splits) == ["test", "train", "validation"]


def test_networks_of_a_subset_are_measured_by_its_tail(subset):
    assert isinstance(answering_store(subset.problem, subset.store), Tail)
    auditor = Auditor(subset.problem, subset.store, subset.zoo)
    look = auditor.look([auditor.drawn(subset.store.vector(i), str(i)) for i in range(12)])
    expected = subset.problem.predictions(subset.states(), "test")
    assert torch.equal(look.answers, expected)
