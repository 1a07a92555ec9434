"""Trivial generators against independent computations; none touches the checkpoints it learns from."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor

from rpgcli import rng
from rpgcli.methods import baselines
from rpgcli.methods.baselines import Known, MlpSetting, Predict, best, fit_all, nearest, perceptron, ridge, signs
from rpgcli.progress import Step, silent
from tests.helpers import draw, raw

ALL = ["".join(bits) for bits in itertools.product("01", repeat=5)]
SEEN, OTHER = ALL[3:25], ALL[:3] + ALL[25:]


def truth(tasks: Sequence[str]) -> Tensor:
    """Parameters that depend on the bits and their products: (n, 7)."""
    x = signs(tasks)
    i, j = torch.triu_indices(5, 5, 1)
    return x @ draw(5, 7) + 0.5 * (x[:, i] * x[:, j]) @ draw(10, 7) + 2


def known(noise: float = 0.1, num_snapshots: int = 3) -> Known:
    clean = truth(SEEN)[:, None].expand(-1, num_snapshots, -1)
    return Known(SEEN, clean + noise * draw(len(SEEN), num_snapshots, 7, seed=1))


@pytest.mark.parametrize("penalty", baselines.RIDGES)
@pytest.mark.parametrize("pairs", [False, True])
def test_ridge_is_scikit_learn_s(penalty, pairs):
    features = PolynomialFeatures(2 if pairs else 1, interaction_only=True)
    x = features.fit_transform(signs(SEEN).double().numpy())
    oracle = Ridge(alpha=penalty, fit_intercept=False).fit(x, known().mean.double().numpy())
    expected = oracle.predict(features.transform(signs(OTHER).double().numpy()))
    found = ridge(known(), penalty, pairs=pairs)(OTHER)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)  # solved in float64, given in float32


def test_ridge_on_pairs_finds_what_is_quadratic():
    error = {p: float((ridge(known(0.0), 0.01, pairs=p)(OTHER) - truth(OTHER)).abs().max()) for p in (False, True)}
    assert error[True] < 0.1 < error[False]


def test_nearest_is_the_network_with_the_fewest_different_bits_the_first_of_several():
    predict = nearest(known(), known().parameters[:, -1])
    for task, found in zip(ALL, predict(ALL)):
        distances = [sum(a != b for a, b in zip(task, other)) for other in SEEN]
        assert torch.equal(found, known().parameters[distances.index(min(distances)), -1])
    assert torch.equal(predict(SEEN), known().parameters[:, -1])


def test_the_perceptron_learns_and_is_the_same_every_time():
    setting = MlpSetting(width=64, num_steps=400, weight_decay=1e-2)
    steps: list[Step] = []
    before = torch.random.get_rng_state()
    first = perceptron(known(), setting, 0, steps.append)
    again = perceptron(known(), setting, 0, silent)
    other = perceptron(known(), setting, 1, silent)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first(OTHER), again(OTHER))
    assert not torch.equal(first(OTHER), other(OTHER))
    variance = float(truth(SEEN).var(0).mean())
    assert float((first(SEEN) - known().mean).square().mean()) < 0.01 * variance
    assert float((first(OTHER) - truth(OTHER)).square().mean()) < 0.5 * variance  # it generalises somewhat
    assert [s.done for s in steps] == list(range(1, 401))


def test_all_of_them_leave_the_checkpoints_alone_and_answer_any_number_of_tasks():
    given = known()
    before = raw(given.parameters)

    def score(predict: Predict) -> float:
        return -float((predict(OTHER) - truth(OTHER)).square().mean())

    fitted = fit_all(given, score, [MlpSetting(width=16, num_steps=20)], 0, silent)
    assert [f.name for f in fitted] == ["average", "nearest", "ridge", "ridge-pairs", "mlp"]
    assert raw(given.parameters) == before
    for baseline in fitted:
        assert baseline.predict(OTHER).shape == (len(OTHER), 7)
        assert baseline.predict(OTHER[:1]).shape == (1, 7)
        assert baseline.seconds >= 0
        assert baseline.validation == pytest.approx(score(baseline.predict))
    average = fitted[0].predict(OTHER)
    torch.testing.assert_close(average[3], given.parameters.flatten(0, 1).mean(0))
    assert raw(given.parameters) == before
    assert [f.name for f in fit_all(given, score, [], 0, silent)] == ["average", "nearest", "ridge", "ridge-pairs"]


def test_the_setting_with_the_best_validation_score_is_kept_the_first_of_equals():
    scores = {"a": 0.1, "b": 0.9, "c": 0.9}
    guesses = {name: draw(1, seed=i) for i, name in enumerate(scores)}
    table = [({"name": name}, lambda name=name: lambda tasks: guesses[name]) for name in scores]
    found = best("x", table, lambda predict: next(scores[n] for n, g in guesses.items() if g is predict([])))
    assert (found.settings, found.validation) == ({"name": "b"}, 0.9)


def test_ridge_uses_the_mean_of_all_snapshots():
    one = Known(SEEN, known().mean[:, None])
    torch.testing.assert_close(ridge(known(), 1.0, pairs=True)(OTHER), ridge(one, 1.0, pairs=True)(OTHER))
    assert rng.derive(0) != rng.derive(1)
