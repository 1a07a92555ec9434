"""Subsets: what a pattern means, and that the tail of a network computes what the whole network does."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpgcli import rng, subsets
from rpgcli.collection import Feed, Numbers, OptimiserConfig, train
from rpgcli.errors import UsageError
from rpgcli.problem import Problem
from rpgcli.progress import silent
from rpgcli.subsets import StackedTail, Tail, select_parameters
from rpgcli.targets import CnnConfig, ConvNet3Config, Mlp3Config, TimmConfig
from tests.helpers import State, tiny_problem

# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    with torch.device("meta"):
        return TimmConfig(name="resnet18").build(1, (28, 28), 10)


LAST2 = ["layer4.1.bn1.weight", "layer4.1.bn1.bias", "layer4.1.bn2.weight", "layer4.1.bn2.bias"]
MEANINGS: dict[str, list[str]] = {
    "norm:last2": LAST2,
    "norm:19-20": LAST2,
    "norm:last": LAST2[2:],
    "norm:first": ["bn1.weight", "bn1.bias"],
    "norm:1": ["bn1.weight", "bn1.bias"],
    "conv:first": ["conv1.weight"],
    "conv:last": ["layer4.1.conv2.weight"],
    "linear": ["fc.weight", "fc.bias"],
    "linear:last": ["fc.weight", "fc.bias"],
    "shortcut": [
        f"layer{i}.0.downsample.{n}" for i in (2, 3, 4) for n in ("0.weight", "1.weight", "1.bias")
    ],
    "shortcut:last": [f"layer4.0.downsample.{n}" for n in ("0.weight", "1.weight", "1.bias")],
    "layer4.1.bn1": LAST2[:2],
    "layer4.1.bn1.bias": LAST2[1:2],
    "layer4.1.bn?.*": LAST2,
    "layer4.1.bn?": LAST2,
    "*.1.bn2.bias": [f"layer{i}.1.bn2.bias" for i in (1, 2, 3, 4)],
}  # fmt: skip


@pytest.mark.parametrize("pattern", MEANINGS)
def test_a_pattern_means_these_parameters(resnet18, pattern):
    assert select_parameters(resnet18, [pattern]) == MEANINGS[pattern]


def test_several_patterns_mean_all_of_theirs_in_the_network_s_order(resnet18):
    assert select_parameters(resnet18, ["fc.bias", "norm:last2", "conv1", "layer4.1.bn2"]) == [
        "conv1.weight", *LAST2, "fc.bias",
    ]  # fmt: skip
    assert select_parameters(resnet18, ["all"]) == [name for name, _ in resnet18.named_parameters()]
    assert sum(resnet18.get_parameter(name).numel() for name in select_parameters(resnet18, ["norm:last2"])) == 2048


@pytest.mark.parametrize(
    ("target", "pattern", "names"),
    [
        (TimmConfig(name="vit_tiny_patch16_224"), "norm:last", ["norm.weight", "norm.bias"]),
        (TimmConfig(name="convnext_atto"), "norm:last", ["head.norm.weight", "head.norm.bias"]),
        (ConvNet3Config(), "norm:last2", [f"blocks.{i}.1.{n}" for i in (1, 2) for n in ("weight", "bias")]),
        (Mlp3Config(), "linear:first", ["layers.0.weight", "layers.0.bias"]),
        (CnnConfig(), "conv:2-3", ["c2.weight", "c2.bias", "c3.weight", "c3.bias"]),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "kind", None)) if not isinstance(value, str) else value,
)
def test_roles_of_other_networks(target, pattern, names):
    with torch.device("meta"):
        assert select_parameters(target.build(1, (28, 28), 10), [pattern]) == names


def test_a_role_is_not_a_module_of_the_same_name():
    model = torch.nn.Sequential()
    model.add_module("norm", torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)))
    assert select_parameters(model, ["norm"]) == ["norm.1.weight", "norm.1.bias"]
    assert select_parameters(model, ["norm.0"]) == ["norm.0.weight", "norm.0.bias"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "layer4.1.bn3.weight",
            "no parameter of the network is named 'layer4.1.bn3.weight'; did you mean 'layer4.1.bn",
        ),
        ("layer5.*", "did you mean 'layer"),
        ("layer4.1.bn", "did you mean 'layer4.1.bn"),
        ("nrom:last2", "unknown role 'nrom'; did you mean 'norm'"),
        ("norm:lats2", "'norm:lats2' has an unknown range 'lats2'"),
        ("norm:", "unknown range ''"),
        ("norm:0", "unknown range '0'"),
        ("norm:last21", "does not fit the 20 layers"),
        ("norm:21", "does not fit the 20 layers"),
        ("norm:5-3", "does not fit the 20 layers"),
        ("*.running_mean", "only statistics and constants, so nothing would be trained"),
        ("bn1.num_batches_tracked", "only statistics and constants"),
        ("", "no parameter of the network is named ''"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused_with_what_is_near(resnet18, pattern, message):
    with pytest.raises(UsageError) as error:
        select_parameters(resnet18, ["norm:last2", pattern])
    assert message in str(error.value)
    assert "norm" in str(error.value.advice)


def test_a_role_that_the_network_does_not_have_and_no_pattern_at_all_are_refused(resnet18):
    with torch.device("meta"):
        mlp = Mlp3Config().build(1, (8, 8), 10)
    with pytest.raises(UsageError, match="'conv:last': the network has no layer of this role"):
        select_parameters(mlp, ["conv:last"])
    with pytest.raises(UsageError, match="nothing would be trained"):
        select_parameters(resnet18, [])


# --- the tail ---------------------------------------------------------------------------------------------------------

CUT: list[tuple[Any, str]] = [
    (CnnConfig(), "linear:last"),
    (CnnConfig(), "conv:last"),
    (ConvNet3Config(width=4), "norm:last2"),
    (Mlp3Config(hidden=(6,)), "linear:last"),
    (TimmConfig(name="resnet18"), "norm:last2"),
    (TimmConfig(name="resnet18"), "shortcut"),
    (TimmConfig(name="vit_tiny_patch16_224"), "norm:last2"),
    (TimmConfig(name="convnext_atto"), "norm:last2"),
    (TimmConfig(name="mobilenetv3_small_050"), "norm:last2"),
]
WHOLE: list[tuple[Any, str]] = [(CnnConfig(), "conv:first"), (Mlp3Config(hidden=(6,)), "*")]


def label(value: object) -> str | None:
    return getattr(value, "name", None) or getattr(value, "kind", None)


def open_tail(target: Any, pattern: str, num: int = 9, **dataset: Any) -> tuple[Problem, State, Tail]:
    problem = tiny_problem(target, bits=False, num=num, **dataset)
    base = problem.build("base").state_dict()
    for name, value in base.items():  # Statistics that are not 0 and 1.
        if name.endswith(("running_mean", "running_var")):
            base[name] = value + 0.1 * torch.rand(value.shape, generator=rng.stream(0, name))
    return problem, base, Tail(problem, base, select_parameters(problem.skeleton, [pattern]))


def changed(tail: Tail, seed: int) -> State:
    """Another value of the subset."""
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=rng.stream(seed, name))
        for name, value in tail.snapshot()[0].items()
    }


def whole_logits(problem: Problem, state: State, index: Tensor) -> Tensor:
    """The oracle: the network itself, with a whole state dict."""
    model = problem.build("any")
    model.load_state_dict(state, strict=True)
    return model.eval()(problem.images("validation", index))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("target", "pattern"), CUT + WHOLE, ids=label)
@torch.no_grad()
def test_the_tail_computes_what_the_whole_network_does(target, pattern):
    problem, base, tail = open_tail(target, pattern)
    assert tail.is_cut == ((target, pattern) in CUT)
    index = torch.tensor([3, 0, 8, 3])
    for seed in range(2):
        state = changed(tail, seed)
        tail.load(state)
        expected = whole_logits(problem, {**base, **state}, index)
        # float32 sums in another order
        torch.testing.assert_close(tail.logits("validation", index), expected, rtol=1e-4, atol=1e-5)
    tail.reset()
    expected = whole_logits(problem, base, index)
    torch.testing.assert_close(tail.logits("validation", index), expected, rtol=1e-4, atol=1e-5)


def test_accuracies_are_those_of_whole_networks_and_leave_the_subset_as_it_was():
    problem, base, tail = open_tail(CnnConfig(), "linear:last", num=60)
    states = [changed(tail, seed) for seed in range(4)]
    tail.load(changed(tail, 4))
    before = tail.snapshot()[0]
    for split in ("validation", "test"):
        found = tail.accuracy(states, [None] * 4, split)
        assert found.tolist() == problem.accuracy([{**base, **s} for s in states], [None] * 4, split).tolist()
    assert len(set(found.tolist())) > 1
    assert all(torch.equal(value, before[name]) for name, value in tail.snapshot()[0].items())


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.parametrize(("target", "pattern"), [CUT[1], CUT[2], CUT[8], WHOLE[0]], ids=label)
def test_a_subset_is_trained_as_by_a_plain_loop_over_the_frozen_network(target, pattern, augment):
    problem, base, tail = open_tail(target, pattern, num=20, augment=augment)
    config = OptimiserConfig(epochs=2, batch_size=8, learning_rate=1e-2, optimiser="sgd", schedule="constant")
    kind = Numbers if augment == "none" else Feed
    labels = problem.labels("train", [None])
    found = train(tail, labels, kind(problem, 0, ["a"]), config, save_at=[2, 6], on_step=silent)
    assert [s.step for s in found] == [2, 6]

    model = problem.build("any")
    model.load_state_dict(base)
    model.eval()
    values = {name: value for name, value in model.named_parameters() if name in tail.values}
    optimiser, step = torch.optim.SGD(values.values(), 1e-2, momentum=0.9), 0
    for epoch in range(2):
        for index in torch.randperm(20, generator=rng.stream(0, "order", "a", epoch)).split(8):
            x = problem.images("train", index, rng.stream(0, "augment", "a", step))
            optimiser.zero_grad()
            F.cross_entropy(model(x), labels[0, index]).backward()
            optimiser.step()
            step += 1
            for snapshot in found:
                if snapshot.step == step:
                    assert snapshot.states[0].keys() == values.keys()
                    for name, value in snapshot.states[0].items():
                        torch.testing.assert_close(value, values[name].detach(), rtol=1e-4, atol=1e-5)  # rounding
    assert any(not torch.equal(values[name], base[name]) for name in values)
    rest = tail.model.state_dict()
    assert all(torch.equal(rest[name], base[name]) for name in base if name not in values)  # statistics as well


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a"] * 3], ids=["each its own images", "the same images"])
@pytest.mark.parametrize(("target", "pattern"), CUT, ids=label)
def test_subsets_side_by_side_are_trained_as_each_alone(target, pattern, names):
    problem, _, tail = open_tail(target, pattern, num=20)
    assert tail.num_at_once(8, 3) == 3
    config = OptimiserConfig(epochs=1, batch_size=8, learning_rate=1e-2, optimiser="sgd", schedule="constant")
    labels, starts = problem.labels("train", [None]), [changed(tail, seed) for seed in range(3)]
    feed = Numbers(problem, 0, names)
    (found,) = train(StackedTail(tail, starts), labels.expand(3, -1), feed, config, save_at=[3], on_step=silent)
    for name, start, state in zip(names, starts, found.states):
        tail.load(start)
        (alone,) = train(tail, labels, Numbers(problem, 0, [name]), config, save_at=[3], on_step=silent)
        for key, value in alone.states[0].items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)  # float32 sums in another order
        assert any(not torch.equal(value, start[key]) for key, value in alone.states[0].items())


def test_subsets_that_cannot_be_vectorised_or_need_much_memory_are_trained_one_after_another(monkeypatch, caplog):
    tail = open_tail(CnnConfig(), "linear:last")[2]
    assert tail.num_at_once(8, 64) == 64
    monkeypatch.setattr(subsets, "VALUES_AT_ONCE", 8 * 24 * 5)  # images, units before the head, subsets
    assert tail.num_at_once(8, 64) == 5
    assert open_tail(*WHOLE[0])[2].num_at_once(8, 64) == 1

    branching = open_tail(Mlp3Config(hidden=(6,)), "linear:last")[2]
    last = [module for module in branching.model.modules() if isinstance(module, nn.Linear)][-1]
    compute = last.forward

    def choose(x: Tensor) -> Tensor:
        y: Tensor = compute(x)
        return y if bool(y.sum() > 0) else -y

    last.forward = choose  # type: ignore[method-assign, assignment]
    with caplog.at_level(logging.INFO, "rpgcli.subsets"):
        assert branching.num_at_once(8, 64) == 1
    assert "one after another: " in caplog.text


def test_activations_that_need_too_much_memory_are_not_kept_and_nothing_else_changes(monkeypatch, caplog):
    cut = open_tail(CnnConfig(), "linear:last")[2]
    num_bytes = 4 * 24 * 27  # float32, units before the head, images of three splits
    monkeypatch.setattr(subsets, "MAX_KEPT_BYTES", num_bytes)
    assert open_tail(CnnConfig(), "linear:last")[2].is_cut
    monkeypatch.setattr(subsets, "MAX_KEPT_BYTES", num_bytes - 1)
    with caplog.at_level(logging.INFO, "rpgcli.subsets"):
        whole = open_tail(CnnConfig(), "linear:last")[2]
    assert not whole.is_cut
    assert "not kept: they would take" in caplog.text
    index = torch.arange(9)
    torch.testing.assert_close(whole.logits("test", index), cut.logits("test", index), rtol=1e-5, atol=1e-6)


class Detached(nn.Module):
    """Its second layer depends on the first one in a way that autograd does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.zeroth, self.first = nn.Linear(64, 5), nn.Linear(5, 5)
        self.second, self.third = nn.Linear(5, 10), nn.Linear(5, 10)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.zeroth(x.flatten(1)))
        return self.second(y.detach()) + self.third(y)  # type: ignore[no-any-return]


def test_a_dependence_that_autograd_does_not_see_is_noticed(monkeypatch, caplog):
    problem = tiny_problem(bits=False, num=9)
    monkeypatch.setattr(CnnConfig, "build", lambda *_: Detached())
    base = problem.build("base").state_dict()
    with caplog.at_level(logging.INFO, "rpgcli.subsets"):
        assert not Tail(problem, base, ["first.weight"]).is_cut
    assert "does not pass them on" in caplog.text
    assert Tail(problem, base, ["third.weight"]).is_cut
    with pytest.raises(UsageError, match=r"do not depend on unused\.weight"):
        Tail(problem, base, ["unused.weight"])


class Shared(nn.Module):
    """One activation in two places, which changes its input in place; a residual connection around the subset."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 5), nn.Linear(5, 5), nn.Linear(5, 10)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x.flatten(1)))
        y = self.second(x)
        y += x
        return self.third(self.relu(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["second.weight", "third.bias"])
@torch.no_grad()
def test_what_is_changed_in_place_is_kept_as_it_was(monkeypatch, name):
    problem = tiny_problem(bits=False, num=9)
    monkeypatch.setattr(CnnConfig, "build", lambda *_: Shared())
    base = problem.build("base").state_dict()
    tail = Tail(problem, base, [name])
    assert tail.is_cut
    for seed in range(2):
        state = changed(tail, seed)
        tail.load(state)
        expected = whole_logits(problem, {**base, **state}, torch.arange(9))
        for index in (torch.arange(9), slice(0, 9), slice(0, 9)):
            torch.testing.assert_close(tail.logits("validation", index), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 1)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_convolution_of_one_pixel_reads_the_middle_of_its_kernel(kernel, size):
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv, plain = (nn.Conv2d(4, 6, kernel, padding=padding) for _ in range(2))
    plain.load_state_dict(conv.state_dict())
    subsets._quicken(conv)
    x = torch.rand(3, 4, size, size)
    torch.testing.assert_close(conv(x), plain(x))
    for module in (conv, plain):
        module(x).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad)
