"""Trivial generators against independent computations; none touches the checkpoints it learns from."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde, ks_2samp, kstest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor, nn

from rpgcli import rng
from rpgcli.methods import baselines, resampling
from rpgcli.methods.baselines import (
    Known,
    MlpSetting,
    Predict,
    average_trunk,
    best,
    known_of,
    nearest,
    perceptron,
    ridge,
    signs,
)
from rpgcli.methods.resampling import GENERATORS, Draw, Originals, from_store, last_layer, latent_generators, network
from rpgcli.progress import Step, silent
from rpgcli.tokens import detokenize
from tests.helpers import draw, raw, token_store

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

    def fit_all(mlp: Sequence[MlpSetting]) -> list[baselines.Fitted]:
        table = {name: candidates(given, mlp, 0, silent) for name, candidates in baselines.GENERATORS.items()}
        return [best(name, found, score) for name, found in table.items() if found]

    fitted = fit_all([MlpSetting(width=16, num_steps=20)])
    assert [f.name for f in fitted] == ["average", "average-trunk", "nearest", "ridge", "ridge-pairs", "mlp"]
    assert raw(given.parameters) == before
    for baseline in fitted:
        assert baseline.predict(OTHER).shape == (len(OTHER), 7)
        assert baseline.predict(OTHER[:1]).shape == (1, 7)
        assert baseline.seconds >= 0
        assert baseline.validation == pytest.approx(score(baseline.predict))
    average = fitted[0].predict(OTHER)
    torch.testing.assert_close(average[3], given.parameters.flatten(0, 1).mean(0))
    assert raw(given.parameters) == before
    assert [f.name for f in fit_all([])] == [f.name for f in fitted[:-1]]


def test_average_trunk_is_the_average_with_another_last_layer_for_each_network():
    given = Known(SEEN, known().parameters, lambda generator: torch.rand(2, generator=generator))
    predict, expected = average_trunk(given, 0), given.parameters.flatten(0, 1).mean(0)
    first, again, second = predict(OTHER), predict(OTHER), predict(OTHER, 1)
    assert torch.equal(first, again)
    assert torch.equal(predict(OTHER[3:4], 1)[0], second[3])
    for found in (first, second):
        torch.testing.assert_close(found[:, :5], expected[:5].expand(len(OTHER), -1))
    layers = torch.cat([first[:, 5:], second[:, 5:], average_trunk(given, 1)(OTHER)[:, 5:]])
    assert len(layers.unique(dim=0)) == 3 * len(OTHER)
    torch.testing.assert_close(average_trunk(known(), 0)(OTHER[:1])[0], expected)  # nobody knows its last layer


def test_the_checkpoints_of_a_store_are_known_task_by_task(tmp_path):
    states = [{"a.weight": draw(4, 5, seed=i)} for i in range(6)]
    facts = [{"task_bits": ["01", "10", "11"][i % 3], "run": i // 3, "step": 0} for i in range(6)]
    store = token_store(tmp_path / "store", states, facts, token_dim=8)
    found = known_of(store)
    assert found.tasks == ["01", "10", "11"]
    assert found.parameters.shape == (3, 2, 20)
    for i in range(6):
        assert torch.equal(found.parameters[i % 3, i // 3], store.vector(i))


def test_the_setting_with_the_best_validation_score_is_kept_the_first_of_equals():
    scores = {"a": 0.1, "b": 0.9, "c": 0.9}
    guesses = {name: draw(1, seed=i) for i, name in enumerate(scores)}
    table = [({"name": name}, lambda name=name: lambda tasks, i=0: guesses[name]) for name in scores]
    found = best("x", table, lambda predict: next(scores[n] for n, g in guesses.items() if g is predict([])))
    assert (found.settings, found.validation) == ({"name": "b"}, 0.9)


def test_ridge_uses_the_mean_of_all_snapshots():
    one = Known(SEEN, known().mean[:, None])
    torch.testing.assert_close(ridge(known(), 1.0, pairs=True)(OTHER), ridge(one, 1.0, pairs=True)(OTHER))
    assert rng.derive(0) != rng.derive(1)


# --- zoos without tasks -----------------------------------------------------------------------------------------------

MANY = 3000
"""Draws from which moments are estimated: a variance to 2.6 %, so that tolerances of 10 % are four of its errors."""


class Stored:
    """Rows that are loaded one at a time, and never changed."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int, /) -> Tensor:
        return self.rows[i]


def matrix(num_rows: int = 6, num_parameters: int = 4) -> Tensor:
    """Checkpoints with correlated coordinates of different deviations, not around 0."""
    return draw(num_rows, num_parameters) @ draw(num_parameters, num_parameters) + draw(num_parameters)


def many(name: str, given: Originals, draw: Draw | None = None) -> Tensor:
    """(MANY, P)."""
    return torch.stack([network(name, draw or GENERATORS[name], given, 0, i) for i in range(MANY)])


def autoencoder(given: Originals) -> tuple[Tensor, dict[str, Draw]]:
    """Two orthonormal directions as a linear autoencoder, and the generators on their latents."""
    basis = torch.linalg.qr(draw(given.rows[0].numel(), 2)).Q
    return basis, latent_generators(given, lambda x: x @ basis, lambda z: z @ basis.T)


@pytest.mark.parametrize("name", [*GENERATORS, *resampling.LATENT_GENERATORS])
def test_a_draw_depends_on_seed_name_and_number_only_and_leaves_the_checkpoints_alone(name):
    x = matrix(6, 5)
    given = Originals(x)
    draws = {**GENERATORS, **autoencoder(given)[1]}
    before, state = raw(x), torch.random.get_rng_state()
    first = [network(name, draws[name], given, 0, i) for i in range(5)]
    again = [network(name, draws[name], given, 0, i) for i in (4, 1)]
    stored = Originals(Stored(x))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert raw(x) == before
    assert all(f.shape == (5,) and f.dtype == torch.float32 and f.isfinite().all() for f in first)
    assert torch.equal(again[0], first[4])
    assert torch.equal(again[1], first[1])
    torch.testing.assert_close(network(name, draws[name], stored, 0, 1), first[1], rtol=1e-4, atol=1e-4)
    other = network(name, draws[name], given, 1, 0)
    is_mean = name in {"average", "average-trunk", "soup-16"}  # of all six, and nobody knows their last layer
    assert torch.equal(other, first[0]) == torch.equal(first[1], first[0]) == is_mean
    for found in first:  # What comes out is nobody's row.
        found.zero_()
    assert raw(x) == before


@pytest.mark.parametrize("name", ["average", "soup-16"])
def test_the_average_is_that_of_all_and_so_is_a_soup_of_more_than_there_are(name):
    x = matrix()
    given = Originals(x)
    torch.testing.assert_close(network(name, GENERATORS[name], given, 0, 3), x.mean(0))


@pytest.mark.parametrize("standardise", ["parameter", "layer", "none"])
def test_average_trunk_has_a_last_layer_as_torch_initialises_it(tmp_path, standardise):
    with rng.initialising(0):
        states = [nn.Sequential(nn.Conv2d(1, 3, 2), nn.Linear(16, 5)).state_dict() for _ in range(6)]
        oracles = [nn.Linear(16, 5).state_dict() for _ in range(200)]
    store = token_store(tmp_path / "store", states, token_dim=8, standardise=standardise)
    given, trunk = from_store(store), GENERATORS["average-trunk"]
    found = [store.rebuilt(network("average-trunk", trunk, given, 0, i)) for i in range(200)]
    for name in ("0.weight", "0.bias"):
        expected = torch.stack([state[name] for state in states]).mean(0)
        for one in found:
            torch.testing.assert_close(one[name], expected, rtol=1e-4, atol=1e-5)
    for name in ("1.weight", "1.bias"):  # uniform within 1 / sqrt(16), which is also what the oracle draws
        values = torch.stack([one[name] for one in found]).flatten()
        oracle = torch.stack([state[name.removeprefix("1.")] for state in oracles]).flatten()
        assert float(values.abs().max()) <= 0.25 + 1e-5
        assert ks_2samp(values, oracle).pvalue > 1e-3
        assert not torch.equal(found[0][name], found[1][name])


def test_a_last_norm_layer_is_initialised_to_change_nothing(tmp_path):
    states = [{"n1.weight": draw(3, seed=i), "n2.weight": draw(4, seed=i), "n2.bias": draw(4)} for i in range(4)]
    states[0]["n2.bias"] += 1  # else it never varies, and would be generated as it is
    store = token_store(tmp_path / "store", states, token_dim=8)
    layer = last_layer(store)(rng.stream(0, "test"))
    found = store.rebuilt(torch.cat([torch.zeros(3), layer]))
    torch.testing.assert_close(found["n2.weight"], torch.ones(4))
    torch.testing.assert_close(found["n2.bias"], torch.zeros(4))


def test_a_soup_is_the_mean_of_different_checkpoints_each_as_often():
    given = Originals(torch.eye(6))  # A network is its own weights.
    drawn = many("soup-4", given)
    assert drawn.unique().tolist() == [0, 0.25]
    assert set((drawn > 0).sum(1).tolist()) == {4}
    torch.testing.assert_close((drawn > 0).float().mean(0), torch.full((6,), 4 / 6), rtol=0.06, atol=0)


def test_interpolation_is_uniform_between_two_different_checkpoints():
    drawn = many("interpolation", Originals(torch.eye(6)))
    assert set((drawn > 0).sum(1).tolist()) == {2}
    torch.testing.assert_close(drawn.sum(1), torch.ones(MANY))
    assert kstest(drawn.amax(1), "uniform", args=(0.5, 0.5)).pvalue > 1e-3
    torch.testing.assert_close((drawn > 0).float().mean(0), torch.full((6,), 2 / 6), rtol=0.1, atol=0)


@pytest.mark.parametrize("num_rows", [12, 3])
def test_the_full_gaussian_has_the_sample_covariance(num_rows):
    x = matrix(num_rows)
    given = Originals(x)
    drawn, expected = many("gaussian-full", given), x.T.cov()
    unit = float(expected.diagonal().max())
    torch.testing.assert_close(drawn.mean(0), x.mean(0), rtol=0, atol=0.1 * unit**0.5)
    torch.testing.assert_close(drawn.T.cov(), expected, rtol=0, atol=0.1 * unit)


def test_the_full_gaussian_is_linear_in_what_is_drawn():
    x = matrix(12)
    given = Originals(x)
    w = torch.randn(12, generator=rng.stream(0, "baseline", "gaussian-full", 0))
    centred = x - x.mean(0)
    torch.testing.assert_close(
        network("gaussian-full", GENERATORS["gaussian-full"], given, 0, 0),
        x.mean(0) + centred.T @ w / math.sqrt(11),
    )


@pytest.mark.parametrize("block", [resampling.BLOCK_VALUES, 12])
def test_the_gaussian_on_principal_components_has_their_covariance(block, monkeypatch):
    monkeypatch.setattr(resampling, "BLOCK_VALUES", block)
    x = matrix(12)
    given = Originals(x)
    pca = PCA(2).fit(x.double().numpy())
    expected = (pca.components_.T * pca.explained_variance_) @ pca.components_
    drawn = many("", given, lambda o, g: resampling.gaussian_pca(o, g, num_components=2))
    unit = float(pca.explained_variance_[0])
    np.testing.assert_allclose(drawn.T.cov(), expected, atol=0.1 * unit)
    beside = torch.from_numpy(np.eye(4) - pca.components_.T @ pca.components_).float()  # the other two components
    assert float(((drawn - x.mean(0)) @ beside).abs().max()) < 1e-4 * unit**0.5


def test_the_gaussian_has_deviations_but_no_correlations():
    x = matrix(12)
    given = Originals(x)
    drawn = many("gaussian", given)
    torch.testing.assert_close(drawn.mean(0), x.mean(0), rtol=0, atol=0.25)
    torch.testing.assert_close(drawn.std(0), x.std(0), rtol=0.06, atol=0)
    assert float((drawn.T.corrcoef() - torch.eye(4)).abs().max()) < 0.08


@pytest.mark.parametrize(("name", "sigma"), [("noise-0.1", 0.1), ("noise-abs-0.06", 0.06)])
def test_noise_lies_around_a_checkpoint_in_the_unit_that_is_asked_for(name, sigma):
    units = {"absolute": torch.tensor([1.0, 2.0, 0.0]), "relative": torch.tensor([0.0, 3.0, 0.5])}
    rows = 1000 * torch.arange(5.0)[:, None].expand(-1, 3)
    drawn = many(name, Originals(rows, units["absolute"], units["relative"]))
    origin = (drawn / 1000).round()
    assert torch.equal(origin.amin(1), origin.amax(1))
    assert origin[:, 0].unique().tolist() == [0, 1, 2, 3, 4]
    expected = sigma * units["absolute" if "abs" in name else "relative"]
    torch.testing.assert_close((drawn - 1000 * origin).std(0), expected, rtol=0.06, atol=1e-4)


def test_units_of_noise_are_those_of_raw_weights_and_of_each_tensor(tmp_path):
    states = [{"a.weight": 3 * draw(4, 5, seed=i) + 1, "a.bias": 0.01 * draw(4, seed=i)} for i in range(8)]
    for standardise in ("parameter", "layer", "none"):
        store = token_store(tmp_path / standardise, states, token_dim=8, standardise=standardise)
        given, scale = from_store(store), store.layout.ungrid(store.statistics.scale)
        assert isinstance(given.relative, Tensor)
        torch.testing.assert_close(given.absolute, 1 / scale)
        for name, part in zip(("a.weight", "a.bias"), (given.relative * scale).split([20, 4])):
            pooled = torch.stack([state[name] for state in states]).std(correction=0)
            torch.testing.assert_close(part, pooled.expand(len(part)), rtol=0.07, atol=0)  # 7/8 or 8/8 of its variance


@pytest.mark.parametrize("in_memory", [True, False])
def test_networks_drawn_from_a_token_store_can_be_written(tmp_path, in_memory, monkeypatch):
    monkeypatch.setattr(resampling, "IN_MEMORY", 10**6 * in_memory)
    states = [{"n.running_var": draw(4, seed=i).abs() + 1e-3, "n.weight": draw(4, seed=i)} for i in range(8)]
    store = token_store(tmp_path / "store", states, token_dim=8)
    given = from_store(store)
    assert isinstance(given.rows, Tensor) == in_memory
    for i, row in enumerate(states):
        flat = store.layout.grid(given.rows[i])
        again = detokenize(flat, store.layout, store.statistics, store.constants(i))
        torch.testing.assert_close(again, row, rtol=1e-3, atol=1e-4)
    for name, generator in GENERATORS.items():
        tokens = store.layout.grid(network(name, generator, given, 0, 0))
        state = detokenize(tokens, store.layout, store.statistics, store.constants(0))
        assert float(state["n.running_var"].min()) > 0
        if name == "average":
            torch.testing.assert_close(state["n.weight"], torch.stack([s["n.weight"] for s in states]).mean(0))


def test_latent_generators_draw_in_the_latent_space_and_decode():
    x = matrix(6, 5)
    given = Originals(x)
    basis, latent = autoencoder(given)
    z = x @ basis
    unit = float(z.var(0).max())
    gaussian = many("latent-gaussian", given, latent["latent-gaussian"])
    torch.testing.assert_close((gaussian @ basis).T.cov(), z.T.cov(), rtol=0, atol=0.1 * unit)
    kde = many("latent-kde", given, latent["latent-kde"])
    bandwidth = gaussian_kde(z.T.numpy()).factor  # Scott's rule
    mixture = z.T.cov(correction=0) + bandwidth**2 * z.var(0).diag()
    torch.testing.assert_close((kde @ basis).T.cov(), mixture, rtol=0, atol=0.1 * unit)
    torch.testing.assert_close((kde @ basis).mean(0), z.mean(0), rtol=0, atol=0.1 * unit**0.5)
    for drawn in (gaussian, kde):  # Nothing beside what the decoder can make.
        torch.testing.assert_close(drawn @ basis @ basis.T, drawn, rtol=0, atol=1e-4)
