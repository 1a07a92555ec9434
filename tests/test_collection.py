"""Collections: training side by side is training one by one, and an interrupted one goes on where it was."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call, vmap

from rpgcli import collection, rng
from rpgcli.artifact import Artifact, Draft, read_tensors
from rpgcli.collection import (
    START,
    Feed,
    OptimiserConfig,
    SeedsConfig,
    Single,
    Stacked,
    TasksConfig,
    TrajectoryConfig,
    bring_in,
    collect,
    make_plan,
    shared_start,
    train,
)
from rpgcli.errors import ArtifactError, Interrupted, LayoutError, RpgError, UsageError
from rpgcli.problem import Problem
from rpgcli.progress import OnStep, Step, silent
from rpgcli.targets import CnnConfig, ConvNet3Config, Mlp3Config, TimmConfig
from rpgcli.tasks import complement
from rpgcli.zoo import SHARED, Network, Zoo
from tests.helpers import State, make, same_bits, stop_after, tiny_problem

TARGETS = [CnnConfig(), ConvNet3Config(width=4), Mlp3Config(hidden=(6,))]
TASKS = ["0110000001", "1001111110", "1000000000"]
SHORT = OptimiserConfig(epochs=2, batch_size=16)
EACH_TARGET = pytest.mark.parametrize("target", TARGETS, ids=lambda t: str(t.kind))


def collect_to(
    folder: Path, problem: Problem, config: Any, *, seed: int = 0, on_step: OnStep = silent, resume: bool = True
) -> Artifact:
    def body(draft: Draft) -> Mapping[str, Any]:
        networks = collect(problem, config, seed, draft, download=False, on_step=on_step)
        return {"networks": [n.to_json() for n in networks]}

    return make(folder, body, section={"collect": config.model_dump(mode="json")}, resume=resume)


def close(a: State, b: State, tolerance: float) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


# --- side by side and one by one --------------------------------------------------------------------------------------


class Double(Problem):
    """The same in float64, where only a wrong computation can make a difference."""

    def images(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().images(*args, **kwargs).double()

    def build(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return super().build(*args, **kwargs).double()


def double(problem: Problem) -> Problem:
    problem.__class__ = Double
    return problem


@EACH_TARGET
@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
def test_tasks_trained_side_by_side_are_those_trained_one_by_one(target, optimiser):
    problem = double(tiny_problem(target, num=40))
    config = OptimiserConfig(epochs=2, batch_size=16, optimiser=optimiser, weight_decay=0.01, learning_rate=1e-3)
    start = problem.build("start").state_dict()
    feed = Feed(problem, 0, [0])
    labels = problem.labels("train", TASKS)
    options: Any = {"save_at": [3, 6], "on_step": silent}
    together = train(Stacked(problem, [start] * 3), labels, feed, config, **options)
    assert [s.step for s in together] == [3, 6]
    for i in range(3):
        alone = train(Single(problem, start), labels[i : i + 1], feed, config, **options)
        for s in range(2):
            # six float64 steps; Adam divides by small gradients' own size, so their rounding shows most there
            close(together[s].states[i], alone[s].states[0], 1e-8)


@EACH_TARGET
def test_seeds_trained_side_by_side_are_those_trained_one_by_one_in_their_own_orders(target):
    problem = double(tiny_problem(target, bits=False, num=40, augment="crop-flip"))
    starts = [problem.build("seed", i).state_dict() for i in range(3)]
    labels = problem.labels("train", [None] * 3)
    options: Any = {"save_at": [6], "on_step": silent}
    together = train(Stacked(problem, starts), labels, Feed(problem, 0, [0, 1, 2]), SHORT, **options)[0]
    for i in range(3):
        alone = train(Single(problem, starts[i]), labels[i : i + 1], Feed(problem, 0, [i]), SHORT, **options)[0]
        close(together.states[i], alone.states[0], 1e-8)
    assert not torch.equal(*(next(iter(s.values())) for s in together.states[:2]))


def test_training_is_adam_on_the_cross_entropy_of_each_batch():
    """The oracle: a plain loop."""
    problem = tiny_problem(num=40, bits=False)
    model = problem.build("start")
    feed = Feed(problem, 3, [0])
    labels = problem.labels("train", [None])
    found = train(Single(problem, model.state_dict()), labels, feed, SHORT, save_at=[6], on_step=silent)[0].states[0]
    adam, step = torch.optim.Adam(model.parameters()), 0
    for epoch in range(2):
        order = torch.randperm(40, generator=rng.stream(3, "order", 0, epoch))
        for index in order.split(16):
            adam.param_groups[0]["lr"] = SHORT.rate(step, 6)
            adam.zero_grad()
            torch.nn.functional.cross_entropy(model(problem.images("train", index)), labels[0, index]).backward()
            adam.step()
            step += 1
    close(found, model.state_dict(), 1e-6)


def test_a_network_sees_the_same_images_whatever_else_is_in_its_block():
    problem = tiny_problem(num=40, augment="crop-flip")
    alone, together, shared = (Feed(problem, 0, names) for names in ([2], [0, 1, 2], [2, 2, 2]))
    assert torch.equal(alone.order(1), together.order(1)[2:])
    assert torch.equal(alone.order(1), shared.order(1))
    index = together.order(0)[:, :8]
    assert torch.equal(alone.images(index[2:], 5), together.images(index, 5)[2:])
    assert not torch.equal(alone.images(index[2:], 5), alone.images(index[2:], 6))
    first = together.images(index[:1].expand(3, -1), 5)
    assert not torch.equal(first[0], first[1])  # each network has its own shifts


@pytest.mark.parametrize("block", [1, 2, 64])
def test_the_size_of_a_block_does_not_change_a_network(tmp_path, block):
    problem = double(tiny_problem(Mlp3Config(hidden=(6,)), num=40, augment="crop"))
    config = TasksConfig(num_seen=4, num_validation=2, num_unseen=2, runs=2, snapshots=2, block=64, training=SHORT)
    config = config.model_copy(update={"pretrain": SHORT})
    whole = Zoo(collect_to(tmp_path / "whole", problem, config))
    other = Zoo(collect_to(tmp_path / "other", problem, config.model_copy(update={"block": block})))
    assert whole.networks == other.networks
    for network in whole.networks:
        close(whole.state(network), other.state(network), 1e-8)


# --- zoos -------------------------------------------------------------------------------------------------------------

TASKS_CONFIG = TasksConfig(
    num_seen=4, num_validation=2, num_unseen=4, runs=2, snapshots=2, block=3, training=SHORT, pretrain=SHORT
)
SEEDS_CONFIG = SeedsConfig(num_networks=5, snapshots=2, block=2, training=SHORT)
TRAJECTORY_CONFIG = TrajectoryConfig(
    runs=2, num_checkpoints=5, block=1, training=SHORT, save=OptimiserConfig(epochs=1, batch_size=3)
)
SUBSET_CONFIG = TRAJECTORY_CONFIG.model_copy(update={"parameters": "linear:last"})


def test_a_zoo_of_tasks_holds_both_of_every_complement_pair_on_one_side(tmp_path):
    problem = tiny_problem()
    zoo = Zoo(collect_to(tmp_path / "zoo", problem, TASKS_CONFIG))
    sides = {split: {n.task_bits for n in zoo.select(split)} for split in ("seen", "validation", "unseen")}
    assert [len(s) for s in sides.values()] == [4, 2, 4]
    for side in sides.values():
        assert {complement(str(bits)) for bits in side} == side
    assert not sides["seen"] & sides["unseen"]
    seen = zoo.select("seen")
    assert len(seen) == 4 * 2 * 2  # tasks, runs, snapshots
    assert {(n.step, n.last) for n in seen} == {(4, False), (8, True)}  # after each of the last epochs
    assert {n.run for n in seen} == {0, 1}
    assert {(n.step, n.last, n.run) for n in zoo.select("unseen")} == {(8, True, 0)}
    assert [n.file for n in zoo.networks] == [f"{i:05d}.safetensors" for i in range(len(zoo.networks))]
    for network in zoo.networks:
        state = zoo.state(network)
        measured = {s: float(problem.accuracy([state], [network.task_bits], s)) for s in ("validation", "test")}
        assert measured == network.accuracy


def test_every_task_starts_from_one_trunk_and_one_fresh_head(tmp_path):
    problem = tiny_problem()
    starts = []

    def body(draft: Draft) -> Mapping[str, Any]:
        for _ in range(2):  # the second time it is read from the draft
            starts.append(shared_start(problem, TASKS_CONFIG, 0, draft, download=False, on_step=silent))
        return {}

    make(tmp_path / "zoo", body)
    first, again = starts
    assert first is not None
    assert again is not None
    assert first.keys() == again.keys() == problem.reference.keys()
    assert all(torch.equal(first[n], again[n]) for n in first)
    fresh = problem.build("start", seed=0).state_dict()
    assert all(torch.equal(first[n], fresh[n]) == n.startswith("head.") for n in first)
    # The trunk is the one of the multi-class network trained by hand.
    whole = Problem.multi_class(problem)
    trunk = Stacked(whole, [whole.build("trunk", seed=0).state_dict()])
    train(trunk, whole.labels("train", [None]), Feed(whole, 0, ["pretrain"]), SHORT, save_at=(), on_step=silent)
    expected = trunk.snapshot()[0]
    assert all(torch.equal(first[n], expected[n]) for n in first if not n.startswith("head."))


def test_seeds_start_apart_and_trajectories_are_evenly_spaced(tmp_path):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    seeds = Zoo(collect_to(tmp_path / "seeds", problem, SEEDS_CONFIG))
    assert [(n.run, n.step, n.last, n.split) for n in seeds.networks] == [
        (run, step, step == 8, "seen") for run in range(5) for step in (4, 8)
    ]
    trajectory = Zoo(collect_to(tmp_path / "trajectory", problem, TRAJECTORY_CONFIG))
    assert [(n.run, n.step) for n in trajectory.networks] == [(r, s) for r in range(2) for s in (4, 8, 12, 16, 20)]
    densest = TRAJECTORY_CONFIG.model_copy(update={"num_checkpoints": 20, "runs": 1})
    dense = Zoo(collect_to(tmp_path / "dense", problem, densest))
    assert [n.step for n in dense.networks] == list(range(1, 21))
    values = [torch.cat([v.flatten() for v in dense.state(n).values()]) for n in dense.networks]
    assert all(not torch.equal(a, b) for a, b in pairwise(values))


def test_more_snapshots_than_steps_are_refused_before_anything_is_trained():
    problem = tiny_problem(bits=False)
    config = TRAJECTORY_CONFIG.model_copy(update={"num_checkpoints": 21})
    with pytest.raises(UsageError, match=r"num_checkpoints is 21, but collect\.save takes only 20 steps") as error:
        make_plan(problem, config, 0)
    assert "collect.save.batch_size" in str(error.value)
    for kind, field in ((TasksConfig, "training"), (SeedsConfig, "training")):
        with pytest.raises(ValueError, match="snapshots"):
            kind(snapshots=3, **{field: SHORT})  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [SEEDS_CONFIG, TRAJECTORY_CONFIG], ids=lambda c: str(c.kind))
def test_the_kind_of_zoo_has_to_fit_the_task(config):
    with pytest.raises(UsageError, match=r"does not fit task\.kind 'binary-subset'"):
        make_plan(tiny_problem(), config, 0)
    with pytest.raises(UsageError, match=r"does not fit task\.kind 'multi-class'"):
        make_plan(tiny_problem(bits=False), TASKS_CONFIG, 0)


def test_every_nth_network_of_a_smaller_zoo_is_in_the_larger_one():
    problem = tiny_problem()
    small, large = (make_plan(problem, TASKS_CONFIG.model_copy(update={"num_seen": n}), 0) for n in (4, 10))
    tasks = [[p.task_bits for p in plan if p.split == "seen" and p.run == 0] for plan in (small, large)]
    assert tasks[1][:4] == tasks[0]


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [TASKS_CONFIG, SEEDS_CONFIG, TRAJECTORY_CONFIG, SUBSET_CONFIG],
    ids=["tasks", "seeds", "trajectory", "subset"],
)
def test_an_interrupted_collection_goes_on_at_the_next_block_with_the_same_bytes(tmp_path, config):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=config.kind == "tasks")
    steps: list[Step] = []
    whole = collect_to(tmp_path / "whole", problem, config, on_step=steps.append)
    assert [s.done for s in steps if not s.phase] == sorted(s.done for s in steps if not s.phase)
    for stop in range(3, len(steps) + 1, max(1, len(steps) // 5)):
        folder = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            collect_to(folder, problem, config, on_step=stop_after(stop))
        partial = folder.with_name(f"{stop}.partial")
        started, finished = partial.exists(), len(list(partial.glob("block-*")))
        rest: list[Step] = []
        assert collect_to(folder, problem, config, on_step=rest.append).id == whole.id
        num_blocks = len(collection.blocks(problem, config, make_plan(problem, config, 0)))
        num_steps, num_left = (len([s for s in some if not s.phase]) for some in (steps, rest))
        assert num_left == num_steps * (num_blocks - finished) / num_blocks
        assert not started or not any(s.phase for s in rest)  # the shared start is not trained again


def test_the_shared_start_is_not_trained_twice(tmp_path):
    problem = tiny_problem(Mlp3Config(hidden=(6,)))
    num_steps = SHORT.num_steps(60)
    with pytest.raises(Interrupted):
        collect_to(tmp_path / "zoo", problem, TASKS_CONFIG, on_step=stop_after(num_steps + 1))
    assert (tmp_path / "zoo.partial" / START).exists()
    rest: list[Step] = []
    collect_to(tmp_path / "zoo", problem, TASKS_CONFIG, on_step=rest.append)
    assert not any(step.phase for step in rest)


def test_the_base_of_a_subset_is_not_trained_twice(tmp_path):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    with pytest.raises(Interrupted):
        collect_to(tmp_path / "zoo", problem, SUBSET_CONFIG, on_step=stop_after(SHORT.num_steps(60) + 1))
    assert (tmp_path / "zoo.partial" / START).exists()
    rest: list[Step] = []
    collect_to(tmp_path / "zoo", problem, SUBSET_CONFIG, on_step=rest.append)
    assert not any(step.phase for step in rest)


def test_a_damaged_network_of_a_finished_block_is_trained_again(tmp_path):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    whole = collect_to(tmp_path / "whole", problem, SEEDS_CONFIG)
    with pytest.raises(Interrupted):
        collect_to(tmp_path / "zoo", problem, SEEDS_CONFIG, on_step=stop_after(20))
    broken = tmp_path / "zoo.partial" / "00001.safetensors"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    (tmp_path / "zoo.partial" / "00004.safetensors").unlink()
    assert collect_to(tmp_path / "zoo", problem, SEEDS_CONFIG).id == whole.id


def test_a_training_that_diverges_is_an_error_and_not_a_network(tmp_path):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    wild = OptimiserConfig(epochs=1, batch_size=16, learning_rate=1e38, optimiser="sgd", schedule="constant")
    with pytest.raises(RpgError, match="network 0 of the zoo is no longer finite after 4 steps"):
        collect_to(tmp_path / "zoo", problem, SeedsConfig(num_networks=2, training=wild))
    assert not (tmp_path / "zoo.partial").exists()


def test_a_target_of_timm_is_collected_one_by_one_with_its_buffers(tmp_path):
    target = TimmConfig(name="mobilenetv3_small_050")
    problem = tiny_problem(target, bits=False, num=17)  # a last batch of one image, which batch norm cannot train on
    config = SeedsConfig(num_networks=2, training=OptimiserConfig(epochs=1, batch_size=8))
    zoo = Zoo(collect_to(tmp_path / "zoo", problem, config))
    state = zoo.state(zoo.networks[0])
    problem.build("any").load_state_dict(state, strict=True)
    counts = {int(v) for n, v in state.items() if n.endswith("num_batches_tracked")}
    assert counts == {2}
    assert [n.step for n in zoo.networks] == [3, 3]


# --- subsets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "patterns"),
    [(CnnConfig(), "linear:last"), (TimmConfig(name="mobilenetv3_small_050"), ["norm:last2", "classifier.bias"])],
    ids=["cnn", "timm"],
)
def test_the_networks_of_a_subset_differ_in_it_alone_and_their_rest_is_stored_once(tmp_path, target, patterns):
    problem = tiny_problem(target, bits=False, num=20)
    config = TrajectoryConfig.model_validate({
        "kind": "trajectory", "parameters": patterns, "runs": 2, "num_checkpoints": 3, "training": SHORT,
        "save": OptimiserConfig(epochs=1, batch_size=3, learning_rate=1e-2),
    })  # fmt: skip
    found = collect_to(tmp_path / "zoo", problem, config)
    zoo, subset = Zoo(found), collection.subset(problem.skeleton, config)
    assert [(n.run, n.step, n.last) for n in zoo.networks] == [(r, s, s == 7) for r in range(2) for s in (2, 5, 7)]
    assert set(found.manifest.files) == {SHARED, *(n.file for n in zoo.networks)}  # the base itself is gone
    assert zoo.shared.keys() | set(subset) == problem.reference.keys()
    assert not zoo.shared.keys() & set(subset)
    for network in zoo.networks:
        assert set(found.tensors(network.file)) == set(subset)
        state = zoo.state(network)
        problem.build("any").load_state_dict(state, strict=True)
        assert network.accuracy == {s: float(problem.accuracy([state], [None], s)) for s in ("validation", "test")}
    values = [torch.cat([zoo.state(n)[name].flatten() for name in subset]) for n in zoo.networks]
    assert all(not torch.equal(values[i], values[j]) for i in range(6) for j in range(i))


def test_the_runs_of_a_subset_leave_one_base_that_is_the_first_whole_training(tmp_path):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    zoo = Zoo(collect_to(tmp_path / "zoo", problem, SUBSET_CONFIG))
    whole = Single(problem, problem.build("seed", 0, seed=0).state_dict())
    train(whole, problem.labels("train", [None]), Feed(problem, 0, [0]), SHORT, save_at=(), on_step=silent)
    base = whole.snapshot()[0]
    assert all(torch.equal(value, base[name]) for name, value in zoo.shared.items())
    still = SUBSET_CONFIG.model_copy(update={
        "num_checkpoints": 1, "save": OptimiserConfig(epochs=1, batch_size=60, learning_rate=1e-12)
    })  # fmt: skip
    for network in (zoo := Zoo(collect_to(tmp_path / "still", problem, still))).networks:
        close({name: zoo.state(network)[name] for name in base}, base, 1e-10)  # one step that moves nothing


def test_every_parameter_may_be_named_and_all_means_whole_trainings(tmp_path):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    every = Zoo(collect_to(tmp_path / "every", problem, SUBSET_CONFIG.model_copy(update={"parameters": ("*",)})))
    assert every.shared == {}
    assert every.state(every.networks[0]).keys() == problem.reference.keys()
    listed = collect_to(tmp_path / "all", problem, SUBSET_CONFIG.model_copy(update={"parameters": ("all",)}))
    whole = collect_to(tmp_path / "whole", problem, TRAJECTORY_CONFIG)
    assert listed.manifest.files == whole.manifest.files


def test_a_whole_network_that_is_given_is_the_base_and_one_without_its_head_is_trained_first(tmp_path):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    given = problem.build("other").state_dict()
    steps: list[Step] = []
    config = SUBSET_CONFIG.model_copy(update={"pretrained": str(tmp_path / "given.safetensors")})
    save_file(given, tmp_path / "given.safetensors")
    zoo = Zoo(collect_to(tmp_path / "zoo", problem, config, on_step=steps.append))
    assert zoo.shared
    assert all(torch.equal(value, given[name]) for name, value in zoo.shared.items())
    assert not any(step.phase for step in steps)
    save_file({n: v for n, v in given.items() if n != "layers.2.bias"}, tmp_path / "given.safetensors")
    zoo = Zoo(collect_to(tmp_path / "zoo2", problem, config, on_step=steps.append))
    assert any(step.phase == "base network" for step in steps)
    assert not torch.equal(zoo.shared["layers.0.weight"], given["layers.0.weight"])


@pytest.mark.parametrize("parameters", ["head", "norm:last2", ("linear:last", "*.running_mean")])
def test_a_subset_that_means_nothing_is_refused_before_anything_is_trained(tmp_path, parameters):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    steps: list[Step] = []
    with pytest.raises(UsageError, match=r"collect\.parameters: "):
        collect_to(
            tmp_path / "zoo",
            problem,
            SUBSET_CONFIG.model_copy(update={"parameters": parameters}),
            on_step=steps.append,
        )
    assert not steps
    assert not (tmp_path / "zoo.partial").exists()


# --- networks from elsewhere ------------------------------------------------------------------------------------------


def test_given_weights_are_the_start_and_only_the_head_is_fresh(tmp_path):
    problem = tiny_problem()
    other = Problem.multi_class(problem).build("other").state_dict()
    save_file(other, tmp_path / "given.safetensors")
    config = TASKS_CONFIG.model_copy(update={"pretrained": str(tmp_path / "given.safetensors")})
    start = read_tensors(collect_to(tmp_path / "zoo", problem, config).file(START))
    fresh = problem.build("start", seed=0).state_dict()
    for name, value in start.items():
        assert torch.equal(value, (fresh if name.startswith("head.") else other)[name])
    # Two outputs fit, but a zoo of tasks starts every task from a head that knows none of them.
    save_file(problem.build("other").state_dict(), tmp_path / "given.safetensors")
    again = read_tensors(collect_to(tmp_path / "zoo2", problem, config).file(START))
    assert torch.equal(again["head.weight"], fresh["head.weight"])
    assert not torch.equal(again["fc.weight"], fresh["fc.weight"])


def test_an_interrupted_collection_goes_on_from_the_weights_it_began_with(tmp_path):
    problem = tiny_problem(Mlp3Config(hidden=(6,)), bits=False)
    given = tmp_path / "given.safetensors"
    save_file(problem.build("other").state_dict(), given)
    config = SEEDS_CONFIG.model_copy(update={"pretrained": str(given)})
    whole = collect_to(tmp_path / "whole", problem, config)
    with pytest.raises(Interrupted):
        collect_to(tmp_path / "zoo", problem, config, on_step=stop_after(20))
    given.unlink()
    assert collect_to(tmp_path / "zoo", problem, config).id == whole.id


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_file(tiny_problem(Mlp3Config()).build("other").state_dict(), tmp_path / "given.safetensors")
    config = TASKS_CONFIG.model_copy(update={"pretrained": str(tmp_path / "given.safetensors")})
    with pytest.raises(ArtifactError, match="another architecture"):
        collect_to(tmp_path / "zoo", tiny_problem(), config)
    assert not (tmp_path / "zoo.partial").exists()


def test_published_weights_need_a_network_of_timm_and_permission(monkeypatch):
    with pytest.raises(UsageError, match="needs a target of timm"):
        collection.published(tiny_problem(), 0, download=True)
    target = TimmConfig(name="mobilenetv3_small_050")
    problem = tiny_problem(target, bits=False, num=4)
    with pytest.raises(UsageError, match="--download"):
        collection.published(problem, 0, download=False)
    monkeypatch.setattr(TimmConfig, "published", lambda self, *args: {"head": torch.rand(3)})
    before = torch.random.get_rng_state()
    one, two = (collection.published(problem, 0, download=True) for _ in range(2))
    assert torch.equal(one["head"], two["head"])  # what timm draws for a new head is the same every time
    assert torch.equal(before, torch.random.get_rng_state())


def import_from(folder: Path, problem: Problem, target: Path) -> Zoo:
    def body(draft: Draft) -> Mapping[str, Any]:
        return {"networks": [n.to_json() for n in bring_in(problem, folder, draft, on_step=silent)]}

    return Zoo(make(target, body))


def test_networks_that_exist_become_a_zoo_in_natural_order(tmp_path):
    problem = tiny_problem(bits=False)
    states = {f"net{i}": problem.build("other", i).state_dict() for i in (2, 10, 1)}
    (tmp_path / "given").mkdir()
    for name, state in states.items():
        save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "given" / f"{name}.safetensors")
    zoo = import_from(tmp_path / "given", problem, tmp_path / "zoo")
    assert [n.run for n in zoo.networks] == [0, 1, 2]
    for network, name in zip(zoo.networks, ["net1", "net2", "net10"]):
        found = zoo.state(network)
        assert same_bits({k: found[k] for k in states[name]}, states[name])
        assert network.accuracy == {
            s: float(problem.accuracy([states[name]], [None], s)) for s in ("validation", "test")
        }


def test_networks_in_sub_folders_are_labelled_by_them(tmp_path):
    problem = tiny_problem(bits=False)
    for name in ("b/net2", "b/net10", "a/net1", "top", ".hidden/net"):
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(problem.build("other").state_dict(), tmp_path / "given" / f"{name}.safetensors")
    zoo = import_from(tmp_path / "given", problem, tmp_path / "zoo")
    assert [(n.run, n.label) for n in zoo.networks] == [(0, "a"), (1, "b"), (2, "b"), (3, None)]


def test_networks_that_do_not_fit_or_have_no_task_are_refused(tmp_path):
    (tmp_path / "given").mkdir()
    save_file(tiny_problem(Mlp3Config(), bits=False).reference, tmp_path / "given" / "a.safetensors")
    with pytest.raises(LayoutError, match="does not fit the target"):
        import_from(tmp_path / "given", tiny_problem(bits=False), tmp_path / "zoo")
    with pytest.raises(UsageError, match="without task bits"):
        import_from(tmp_path / "given", tiny_problem(), tmp_path / "zoo")


def test_a_zoo_that_lists_its_networks_otherwise_is_refused(tmp_path):
    good = Network("a.safetensors", "seen").to_json()
    listings: list[Any] = [[], [{"file": "a"}], [{**good, "more": 1}], [1], None]
    for i, records in enumerate(listings):
        facts = {"networks": records}
        with pytest.raises(ArtifactError):
            Zoo(make(tmp_path / str(i), lambda _, facts=facts: facts))  # type: ignore[misc]


def test_rates_fall_along_a_cosine_to_the_last_fraction():
    config = OptimiserConfig(learning_rate=2.0, last_fraction=0.05)
    rates = [config.rate(step, 100) for step in range(100)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] < 2.0
    assert rates[-1] == pytest.approx(0.1)
    assert OptimiserConfig(schedule="constant").rate(7, 100) == 2e-3
    assert OptimiserConfig(epochs=3, batch_size=16).num_steps(33) == 9


def test_stacked_gradients_are_those_of_each_network():
    """vmap over a plain backward pass, as torch.func has it: grad of each network alone."""
    problem = double(tiny_problem(num=8))
    states = [problem.build("n", i).state_dict() for i in range(2)]
    stacked = Stacked(problem, states)
    x = problem.images("train", torch.arange(8))
    y = problem.labels("train", TASKS[:2])
    loss = torch.nn.functional.cross_entropy(stacked.outputs(x[None]).flatten(0, 1), y.flatten(), reduction="none")
    (loss.sum() / 8).backward()

    def one(state: State, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(functional_call(problem.skeleton, state, (x,)), y)

    values = {n: v.detach() for n, v in stacked.values.items()}
    expected = vmap(torch.func.grad(one))(values, y)
    for name, value in stacked.values.items():
        torch.testing.assert_close(value.grad, expected[name], rtol=1e-10, atol=1e-12)
