"""The problem: networks judged side by side as they are one by one, and what does not fit is refused."""

from typing import Any

import pytest
import torch
from torch.func import functional_call

from rpgcli import rng
from rpgcli.errors import LayoutError
from rpgcli.problem import Problem, ProblemConfig
from rpgcli.targets import CnnConfig, ConvNet3Config, Mlp3Config, TimmConfig
from rpgcli.tasks import MultiClassConfig
from tests.helpers import State, draw, tiny_problem

SMALL = [CnnConfig(), ConvNet3Config(width=4), Mlp3Config()]
TASKS = ["0110000001", "1001111110", "1000000000"]


def networks(problem: Problem, num: int) -> list[State]:
    return [dict(problem.build("network", i).state_dict()) for i in range(num)]


@pytest.mark.parametrize("target", SMALL, ids=lambda t: str(t.kind))
@pytest.mark.parametrize("values_at_once", [1, 2**12, 2**25])
def test_many_networks_predict_as_each_does_alone(monkeypatch, target, values_at_once):
    monkeypatch.setattr("rpgcli.problem.VALUES_AT_ONCE", values_at_once)
    problem = tiny_problem(target, bits=False, num=20)
    states = networks(problem, 3)
    x = problem.images("test", torch.arange(20))
    model = problem.build("any")
    alone = torch.stack([functional_call(model, s, (x,)) for s in states]).detach()
    clear = alone.sort(-1).values.diff(dim=-1)[..., -1] > 1e-5  # ties may turn with rounding
    assert clear.float().mean() > 0.9
    assert torch.equal(problem.predictions(states, "test")[clear], alone.argmax(-1)[clear])
    stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    # vmap turns convolutions into grouped ones, which sum in another order
    torch.testing.assert_close(problem.outputs(stacked, x), alone, rtol=1e-4, atol=1e-5)
    own = x.expand(3, *x.shape)
    torch.testing.assert_close(problem.outputs(stacked, own), alone, rtol=1e-4, atol=1e-5)


def test_more_networks_than_a_chunk_holds():
    problem = tiny_problem(Mlp3Config(hidden=(3,)), num=10)
    states = networks(problem, 130)
    whole = problem.predictions(states, "test")
    assert torch.equal(whole, torch.cat([problem.predictions(states[i : i + 1], "test") for i in range(130)]))


def test_accuracy_counts_right_answers():
    problem = tiny_problem(num=50)
    labels = problem.labels("test", TASKS)
    y = problem.dataset.test.labels
    assert labels.tolist() == [[int(bits[c]) for c in y.tolist()] for bits in TASKS]
    state = {name: torch.zeros_like(value) for name, value in problem.reference.items()}
    always = {**state, "head.bias": torch.tensor([0.0, 1.0])}
    expected = labels.double().mean(1)
    assert torch.equal(problem.accuracy([always] * 3, TASKS, "test"), expected)
    assert problem.accuracy([], [], "test").tolist() == []


def test_batch_norm_is_in_evaluation_mode_when_networks_are_judged():
    problem = tiny_problem(TimmConfig(name="mobilenetv3_small_050"), bits=False, num=4)
    state = networks(problem, 1)[0]
    torch.testing.assert_close(
        problem.predictions([state], "test"),
        problem.predictions([state], "test").clone(),
    )
    model = problem.build("any").eval()
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model(problem.images("test", torch.arange(4))).argmax(-1)
    assert torch.equal(problem.predictions([state], "test")[0], expected)


@pytest.mark.parametrize("target", [CnnConfig(), TimmConfig(name="mobilenetv3_small_050")], ids=["stacked", "single"])
def test_networks_that_do_not_fit_are_refused(target):
    problem = tiny_problem(target, num=4)
    good = networks(problem, 1)[0]
    first = next(iter(good))
    bad: list[State] = [
        {k: v for k, v in good.items() if k != first},
        {**good, "more": torch.ones(1)},
        {**good, first: torch.ones(2, 2)},
        {**good, first: good[first].half()},
    ]
    for state in bad:
        with pytest.raises(LayoutError, match="does not fit the target"):
            problem.predictions([good, state], "test")
    assert problem.predictions([dict(reversed(good.items()))], "test").shape == (1, 4)


def test_the_multi_class_twin_shares_images_and_asks_for_the_class():
    problem = tiny_problem()
    _ = problem.reference, problem.skeleton
    whole = Problem.multi_class(problem)
    assert whole.dataset is problem.dataset
    assert (problem.num_outputs, whole.num_outputs) == (2, 10)
    assert problem.has_bits
    assert not whole.has_bits
    assert whole.reference["head.bias"].shape == (10,)
    assert problem.reference["head.bias"].shape == (2,)
    assert torch.equal(whole.labels("test", [None])[0], problem.dataset.test.labels)


def test_images_are_augmented_only_where_a_generator_is_given():
    problem = tiny_problem(num=30, augment="crop-flip")
    index = torch.arange(30)
    plain = problem.images("train", index)
    assert torch.equal(plain, problem.images("train", index))
    one, two, other = (problem.images("train", index, rng.stream(s)) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one, plain)


def test_a_network_is_built_from_its_names_alone():
    problem = tiny_problem()
    before = torch.random.get_rng_state()
    a, b, c = (problem.build("seed", i).state_dict()["fc.weight"] for i in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_problem_opens_its_data_set():
    config: Any = ProblemConfig(task=MultiClassConfig())
    problem = config.open(data_root=None, download=False, device=torch.device("cpu"))
    assert problem.num_outputs == 10
    assert draw(1).shape == (1,)
