"""Alignment: symmetries against forward passes, recovery of permuted copies, assignments against all permutations."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rpgcli import rng
from rpgcli.alignment import (
    Aligner,
    Group,
    Neighbours,
    State,
    aligned,
    assign,
    fits,
    free,
    invariants,
    units,
)
from rpgcli.collection import OptimiserConfig, SeedsConfig, collect
from rpgcli.errors import LayoutError
from rpgcli.problem import ProblemConfig
from rpgcli.progress import silent
from rpgcli.targets import CnnConfig, ConvNet3Config, Mlp3Config, Target, TimmConfig
from rpgcli.tasks import MultiClassConfig
from tests.helpers import draw, make, raw, same_bits

SMALL: list[Target] = [Mlp3Config(), Mlp3Config(hidden=(20, 12), first_bias=False), CnnConfig(), ConvNet3Config()]
LARGE: list[Target] = [TimmConfig(name="resnet18"), TimmConfig(name="vit_tiny_patch16_224")]
RGB = 3, (16, 16), 10
"""Images large enough that every family flattens maps of several pixels."""


def name_of(config: Target) -> str:
    return getattr(config, "name", getattr(config, "kind", ""))


def network(config: Target, seed: int = 0) -> nn.Module:
    """A network in which no two units are alike, norms and running statistics included."""
    with rng.initialising(seed, "network"):
        built = config.build(*RGB).eval()
    generator = rng.stream(seed, "norms")
    with torch.no_grad():
        for name, value in built.state_dict().items():
            if value.dim() == 1 and value.is_floating_point():
                value.mul_(1 if name.endswith("weight") else 0).add_(
                    torch.rand(value.shape, generator=generator), alpha=0.5
                )
    return built


def groups_of(config: Target) -> tuple[Group, ...]:
    with torch.device("meta"):
        return config.symmetries(config.build(*RGB))


def random_orders(group: Group, generator: torch.Generator) -> list[Tensor]:
    """Whole blocks at random, the same in all tracks, and units inside them."""
    blocks = torch.randperm(group.num_blocks, generator=generator)
    orders = []
    for track in group.tracks:
        size = len(track[0].places) // group.num_blocks
        orders.append(torch.cat([b * size + torch.randperm(size, generator=generator) for b in blocks]))
    return orders


def relocate(
    state: State, groups: Sequence[Group], seed: int, *, scale: bool = True
) -> tuple[State, dict[str, list[Tensor]]]:
    """The network with its units in another order, and scaled where they can be."""
    tensors, generator, orders = dict(state), rng.stream(seed, "relocate"), {}
    for group in groups:
        orders[group.name] = random_orders(group, generator)
        group.permute(tensors, orders[group.name])
        if scale and any(axis.power for axis in group.axes):
            group.scale(tensors, torch.exp(torch.randn(group.num_units, generator=generator)))
    return tensors, orders


def share_recovered(permutations: dict[str, tuple[Tensor, ...]], orders: dict[str, list[Tensor]]) -> float:
    """Share of units that are where they were before `relocate`."""
    found = [o[p] == torch.arange(len(p)) for name in orders for p, o in zip(permutations[name], orders[name])]
    return float(torch.cat(found).double().mean())


def assert_close(a: State, b: State, rtol: float = 1e-4) -> None:
    assert list(a) == list(b)
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, rtol=rtol, atol=rtol * float(value.double().abs().max()))


def outputs(built: nn.Module, state: State) -> Tensor:
    built.load_state_dict(state, strict=True)
    with torch.no_grad():
        found: Tensor = built(draw(4, 3, *(32, 32) if hasattr(built, "num_classes") else RGB[1]))
    return found


# --- symmetries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*SMALL, *LARGE, TimmConfig(name="resnet50")], ids=name_of)
def test_a_relocated_network_computes_the_same(config):
    built = network(config)
    state = {name: value.clone() for name, value in built.state_dict().items()}
    groups = groups_of(config)
    assert groups
    assert fits(groups, state)
    there, _ = relocate(state, groups, 1)
    before = outputs(built, state)
    torch.testing.assert_close(outputs(built, there), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    still = [n for n, v in state.items() if v.numel() > 10 and v.is_floating_point() and torch.equal(there[n], v)]
    assert still == []
    for group in groups[:4]:  # one tensor alone is no symmetry
        axis, orders = group.axes[0], random_orders(group, rng.stream(2, "one"))
        alone = {**state, axis.name: axis.permute(state[axis.name], orders[0])}
        assert (outputs(built, alone) - before).abs().max() > 1e-4 * before.abs().max()


def test_permuting_never_changes_the_values_that_a_tensor_holds():
    for config in (*SMALL, *LARGE):
        state = network(config).state_dict()
        there, _ = relocate(state, groups_of(config), 1, scale=False)
        for name, value in state.items():
            assert raw(there[name].flatten().sort().values) == raw(value.flatten().sort().values)


def test_only_units_behind_relu_are_scaled():
    def scaled(config: Target) -> set[str]:
        return {axis.name for group in groups_of(config) for axis in group.axes if axis.power}

    assert scaled(TimmConfig(name="vit_tiny_patch16_224")) == set()
    assert "layer1.0.bn1.weight" in scaled(TimmConfig(name="resnet18"))
    assert "layer1.0.bn1.running_var" not in scaled(TimmConfig(name="resnet18"))
    assert "bn1.weight" not in scaled(TimmConfig(name="resnet18"))  # the residual stream
    assert scaled(ConvNet3Config()).isdisjoint({"blocks.0.0.weight", "blocks.0.0.bias"})  # before an instance norm


@pytest.mark.parametrize(
    "name", ["convnext_atto", "resnext50_32x4d", "resnet50d", "seresnet50", "mobilenetv3_small_050"]
)
def test_networks_of_other_families_have_no_known_symmetry(name):
    assert groups_of(TimmConfig(name=name)) == ()


def test_groups_that_touch_frozen_tensors_cannot_be_exchanged():
    groups = groups_of(CnnConfig())
    assert [group.name for group in groups] == ["c1", "c2", "c3", "fc"]
    assert [group.name for group in free(groups, {"c2.bias"})] == ["c1", "c3", "fc"]
    assert [group.name for group in free(groups, {"c2.weight"})] == ["c3", "fc"]
    assert free(groups, set()) == groups


def test_groups_that_leave_places_out_do_not_fit():
    state = {"w": torch.zeros(4, 3), "v": torch.zeros(2, 8)}
    assert fits([units("a", 4, ["w"], ["v"], repeat=2)], state)
    assert not fits([units("a", 4, ["w"], ["v"])], state)
    assert not fits([units("a", 4, ["w"], ["u"], repeat=2)], state)


# --- matching ---------------------------------------------------------------------------------------------------------


def test_assignments_are_the_best_of_all_permutations():
    for seed in range(20):
        gram = draw(4, 4, seed=seed)
        best = max(sum(float(gram[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(4)))
        order = assign([gram])[0]
        assert float(gram.gather(1, order[:, None]).sum()) == pytest.approx(best, rel=1e-5)


def test_blocks_are_assigned_like_the_best_of_all_permutations_that_keep_them_together():
    blocks, size = 3, 2
    inside = list(itertools.permutations(range(size)))
    for seed in range(10):
        grams = [draw(blocks * size, blocks * size, seed=seed), draw(blocks * size, blocks * size, seed=seed + 100)]
        best = -math.inf
        for order in itertools.permutations(range(blocks)):
            value = 0.0
            for gram in grams:
                for i, j in enumerate(order):
                    cell = gram[i * size : (i + 1) * size, j * size : (j + 1) * size]
                    value += max(sum(float(cell[a, b]) for a, b in enumerate(p)) for p in inside)
            best = max(best, value)
        found = assign(grams, blocks)
        assert sum(float(g.gather(1, o[:, None]).sum()) for g, o in zip(grams, found)) == pytest.approx(best, rel=1e-5)
        assert all(sorted(o.tolist()) == list(range(6)) for o in found)
        assert torch.equal(found[0][::size] // size, found[1][::size] // size)


@pytest.mark.parametrize("config", SMALL, ids=name_of)
def test_a_small_network_relocated_at_random_is_recovered_exactly_20_of_20(config):
    groups = groups_of(config)
    for seed in range(20):
        state = network(config, seed).state_dict()
        there, orders = relocate(state, groups, seed)
        found = Aligner(state, groups)(there)
        assert share_recovered(found.permutations, orders) == 1
        assert_close(found.state, state)


@pytest.mark.parametrize("config", LARGE, ids=name_of)
@pytest.mark.parametrize("trained", [False, True])
def test_a_large_network_relocated_at_random_is_recovered(config, trained):
    """Also a new one, whose norms say nothing of its units."""
    groups = groups_of(config)
    with rng.initialising(0, "new"):
        state = (network(config) if trained else config.build(*RGB)).state_dict()
    there, orders = relocate(state, groups, 1)
    found = Aligner(state, groups)(there)
    assert share_recovered(found.permutations, orders) == 1  # 0.95 asked for
    assert_close(found.state, state)
    assert found.state.keys() == state.keys()

    noisy = {n: v + 0.2 * v.std() * draw(*v.shape, seed=5) if v.dim() > 1 else v for n, v in there.items()}
    assert share_recovered(Aligner(state, groups)(noisy).permutations, orders) >= 0.95


@pytest.mark.parametrize("config", [*SMALL, *LARGE], ids=name_of)
def test_an_aligned_network_computes_the_same(config):
    groups, built = groups_of(config), network(config)
    reference, state = network(config, 1).state_dict(), network(config, 2).state_dict()
    found = Aligner(reference, groups)(state)
    before = outputs(built, state)
    torch.testing.assert_close(outputs(built, found.state), before, rtol=0, atol=1e-5 * float(before.abs().max()))

    there = dict(state)
    for group in groups:
        group.permute(there, found.permutations[group.name])
    scaled = {axis.name for group in groups for axis in group.axes if axis.power}
    assert same_bits(*({n: v for n, v in each.items() if n not in scaled} for each in (there, found.state)))


@pytest.mark.parametrize("config", SMALL, ids=name_of)
def test_alignment_is_idempotent_and_does_not_depend_on_the_order_or_scale_that_units_have(config):
    groups, reference, state = groups_of(config), network(config).state_dict(), network(config, 1).state_dict()
    aligner = Aligner(reference, groups)
    found = aligner(state).state
    assert any(not torch.equal(found[name], value) for name, value in state.items())
    assert_close(aligner(found).state, found)
    assert_close(aligner(relocate(state, groups, 3)[0]).state, found)
    assert_close(aligner(reference).state, reference)


def test_units_are_brought_to_the_norms_of_the_reference():
    groups = groups_of(Mlp3Config())
    reference, state = network(Mlp3Config()).state_dict(), network(Mlp3Config(), 1).state_dict()
    found = Aligner(reference, groups)(state).state

    def norms(state: State) -> Tensor:
        entering = torch.cat([state["layers.0.weight"], state["layers.0.bias"][:, None]], 1)
        return entering.square().sum(1).sqrt()

    torch.testing.assert_close(norms(found), norms(reference))


def cosine(a: State, b: State) -> float:
    x, y = (torch.cat([state[name].double().flatten() for name in a]) for state in (a, b))
    return float(torch.cosine_similarity(x, y, 0))


def test_no_round_of_matching_lowers_the_similarity(monkeypatch):
    config = CnnConfig()
    groups = groups_of(config)
    aligner = Aligner(network(config).state_dict(), groups)
    match, history = aligner._match, []

    def watched(group: Group, tensors: Any, orders: Any, matched: set[str]) -> bool:
        before, moved = cosine(aligner.reference, tensors), match(group, tensors, orders, matched)
        if len(matched) == len(groups):
            history.append(cosine(aligner.reference, tensors) - before)
            assert moved == (history[-1] != 0)
        return moved

    monkeypatch.setattr(aligner, "_match", watched)
    for seed in range(1, 6):
        aligner(network(config, seed).state_dict())
    assert min(history) >= 0
    assert max(history) > 0


def test_a_unit_that_nothing_enters_and_other_dtypes_are_kept():
    config = Mlp3Config()
    groups = groups_of(config)
    reference, state = network(config).state_dict(), network(config, 1).state_dict()
    for each in (reference, state):
        each["layers.0.weight"][7] = 0
        each["layers.0.bias"][7] = 0
    built = network(config)
    before = outputs(built, state)
    found = Aligner({name: value.clone() for name, value in reference.items()}, groups)(state)
    torch.testing.assert_close(outputs(built, found.state), before, rtol=1e-4, atol=1e-5)

    half = {name: value.half() for name, value in state.items()} | {"extra": torch.arange(3)}
    found = Aligner(half, groups)(half)
    assert {name: value.dtype for name, value in found.state.items()} == {n: v.dtype for n, v in half.items()}
    assert torch.equal(found.state["extra"], half["extra"])


def test_networks_that_are_not_finite_are_refused():
    groups, state = groups_of(Mlp3Config()), network(Mlp3Config()).state_dict()
    broken = {**state, "layers.0.bias": torch.full((50,), torch.nan)}
    with pytest.raises(LayoutError, match=r"layers\.0\.bias holds NaN"):
        Aligner(state, groups)(broken)
    with pytest.raises(LayoutError, match=r"layers\.0\.bias holds NaN"):
        Aligner(broken, groups)


def test_without_groups_networks_stay_as_they_are():
    states = [network(Mlp3Config(), seed).state_dict() for seed in range(2)]
    assert all(same_bits(a, b) for a, b in zip(aligned(states, states[0], ()), states, strict=True))


def test_the_average_of_independent_trainings_works_once_they_are_aligned(tmp_path):
    problem = ProblemConfig(target=Mlp3Config(), task=MultiClassConfig()).open(
        data_root=None, download=False, device=torch.device("cpu")
    )
    config = SeedsConfig(num_networks=12, training=OptimiserConfig(epochs=8, learning_rate=5e-3))

    def body(draft):
        return {"networks": [n.to_json() for n in collect(problem, config, 0, draft, download=False, on_step=silent)]}

    zoo = make(tmp_path / "zoo", body)
    states = [zoo.tensors(record["file"]) for record in zoo.facts["networks"]]
    together = list(aligned(states, states[0], problem.config.target.symmetries(problem.skeleton)))

    def accuracy_of(states: Sequence[State]) -> float:
        return float(problem.accuracy(states, [None] * len(states), "test").mean())

    def average(states: Sequence[Any]) -> State:
        return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}

    trained = accuracy_of(states)
    assert accuracy_of(together) == pytest.approx(trained, abs=0.002)  # rounding may flip an image or two
    assert accuracy_of([average(states)]) < 0.5
    assert accuracy_of([average(together)]) > trained - 0.1


# --- distances --------------------------------------------------------------------------------------------------------


def vector(state: Any) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()])


def plain(state: Any, zoo: Sequence[State]) -> Tensor:
    return torch.stack([(vector(state) - vector(each)).norm() for each in zoo])


@pytest.mark.parametrize("config", [Mlp3Config(hidden=(12,)), CnnConfig()], ids=name_of)
def test_copies_are_found_wherever_their_units_are(config):
    groups = groups_of(config)
    zoo = [network(config, seed).state_dict() for seed in range(12)]
    first = list(aligned(zoo, zoo[0], groups))
    noise = {name: 0.003 * draw(*value.shape, seed=1) for name, value in zoo[5].items()}
    near = {name: first[5][name] + noise[name] for name in noise}
    states = [zoo[3], relocate(zoo[7], groups, 1)[0], relocate(near, groups, 2)[0], network(config, 99).state_dict()]
    distance, index = Neighbours(zoo, groups, vector).nearest(states)
    assert index[:3].tolist() == [3, 7, 5]
    size = float(vector(zoo[0]).norm())
    assert distance[:2].max() < 1e-5 * size
    assert float(distance[2]) <= 1.05 * float(vector(noise).norm())  # its units have the norms of the original's
    held_out = Aligner(zoo[0], groups)(states[3]).state
    assert distance[2] < 0.5 * distance[3] <= 0.5 * plain(held_out, first).min() * (1 + 1e-5)

    raw_distance, _ = Neighbours(zoo, (), vector).nearest(states)
    expected = torch.stack([plain(s, zoo).min() for s in states]).double()
    torch.testing.assert_close(raw_distance, expected, rtol=1e-5, atol=1e-5)
    assert raw_distance[1] > 10 * distance[2]


def test_a_network_that_may_not_be_near_is_passed_over():
    config = Mlp3Config(hidden=(12,))
    groups = groups_of(config)
    zoo: list[State] = [network(config, seed).state_dict() for seed in range(4)]
    zoo += [relocate(state, groups, 1)[0] for state in zoo]  # two of each
    runs = torch.arange(8)
    distance, index = Neighbours(zoo, groups, vector).nearest(zoo, may_be_near=runs[:, None] != runs)
    assert index.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert distance.max() < 1e-4
    distance, index = Neighbours(zoo, groups, vector).nearest(zoo, may_be_near=(runs[:, None] - runs) % 4 != 0)
    assert ((index - runs) % 4 != 0).all()
    assert distance.min() > 1


@pytest.mark.parametrize("config", [*SMALL, LARGE[1]], ids=name_of)
def test_invariants_do_not_change_when_a_network_is_relocated(config):
    groups, state = groups_of(config), network(config).state_dict()
    own = invariants(state, groups)
    torch.testing.assert_close(invariants(relocate(state, groups, 1)[0], groups), own, rtol=1e-4, atol=1e-5)
    assert (invariants(network(config, 1).state_dict(), groups) - own).norm() > 0.01 * own.norm()


def test_distances_of_many_networks_take_few_alignments(monkeypatch):
    """Linear: one for each network of the zoo (two if it is a candidate), and six for each network looked at."""
    config, num_calls = Mlp3Config(hidden=(4,)), itertools.count()
    groups = groups_of(config)
    zoo = [network(config, seed).state_dict() for seed in range(30)]
    align = Aligner.__call__
    monkeypatch.setattr(Aligner, "__call__", lambda self, state: (next(num_calls), align(self, state))[1])
    Neighbours(zoo, groups, vector).nearest(zoo[:10])
    assert next(num_calls) <= 2 * 30 + 6 * 10
