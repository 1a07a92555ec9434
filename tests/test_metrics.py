"""The audit's metrics against definitions written out, scipy, and properties that hold for any networks."""

import math
import statistics
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.metrics import log_loss
from torch import Tensor

from rpgcli import rng
from rpgcli.evaluation import distance, similarity
from rpgcli.evaluation.accuracy import at_chance, best, guess, percentiles, vote, vote_gain
from rpgcli.evaluation.calibration import expected_calibration_error, negative_log_likelihood
from rpgcli.evaluation.novelty import Novelty, alpha, as_novel, profile
from rpgcli.evaluation.similarity import (
    disagreement,
    error_iou,
    functional_novelty,
    minimal_similarity,
    pairs,
    spread,
    within,
)
from tests.helpers import draw, raw


def integers(*shape: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=rng.stream(seed, "test", *shape))


def flags(*shape: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=rng.stream(seed, "test", *shape)) < share


# --- similarity -------------------------------------------------------------------------------------------------------


@st.composite
def answers(draw: Callable[..., int]) -> tuple[Tensor, Tensor]:
    """Classes that two groups of networks predict: (A, N) and (B, N)."""
    a, b, n, classes, seed = (draw(st.integers(1, k)) for k in (6, 5, 40, 12, 10**6))
    return integers(a, n, below=classes, seed=seed), integers(b, n, below=classes, seed=seed + 1)


@pytest.fixture(params=[similarity.BLOCK_COLUMNS, 7])
def any_block(request, monkeypatch):
    """In one block, and in many that do not divide what they cut."""
    monkeypatch.setattr(similarity, "BLOCK_COLUMNS", request.param)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_error_iou_is_that_of_sets_and_1_where_neither_errs(any_block, share):
    a, b = flags(9, 50, share=share), flags(6, 50, share=share, seed=1)
    a[0], b[0] = False, False
    for i, row in enumerate(error_iou(a, b)):
        for j, found in enumerate(row):
            one, other = ({k for k in range(50) if wrong[k]} for wrong in (a[i], b[j]))
            expected = len(one & other) / len(one | other) if one | other else 1.0
            assert float(found) == pytest.approx(expected, abs=1e-7)  # a float32 quotient
    assert error_iou(a, b)[0, 0] == 1


def test_disagreement_counts_different_answers(any_block):
    a, b = integers(9, 50, below=5), integers(6, 50, below=12, seed=1)
    expected = (a[:, None] != b).float().mean(2)
    torch.testing.assert_close(disagreement(a, b), expected, rtol=0, atol=1e-7)


@settings(deadline=None)
@given(answers())
def test_similarities_are_symmetric_bounded_and_blind_to_the_order_of_images(found):
    a, b = found
    order = torch.randperm(a.shape[1], generator=rng.stream(0, "order"))
    for measure in (disagreement, lambda x, y: error_iou(x == 0, y == 0)):
        matrix = measure(a, b)
        assert matrix.shape == (len(a), len(b))
        assert 0 <= float(matrix.min()) <= float(matrix.max()) <= 1
        torch.testing.assert_close(measure(b, a).T, matrix, rtol=0, atol=0)
        torch.testing.assert_close(measure(a[:, order], b[:, order]), matrix, rtol=0, atol=0)
    assert disagreement(a, a).diagonal().tolist() == [0] * len(a)
    assert error_iou(a == 0, a == 0).diagonal().tolist() == [1] * len(a)


def test_within_leaves_out_the_diagonal():
    matrix = torch.tensor([[1.0, 0.2, 0.3], [0.2, 1.0, 0.7], [0.3, 0.7, 1.0]])
    assert sorted(pairs(matrix).tolist()) == pytest.approx([0.2, 0.3, 0.7])
    assert within(matrix) == pytest.approx(0.4)
    assert within(matrix[:1, :1]) is None


def test_nearest_leaves_out_the_network_itself_only_where_the_sets_are_the_same():
    matrix = torch.tensor([[1.0, 0.2, 0.3], [0.2, 1.0, 0.7], [0.3, 0.7, 1.0]])
    before = raw(matrix)
    torch.testing.assert_close(similarity.nearest(matrix), torch.ones(3))
    torch.testing.assert_close(similarity.nearest(matrix, same=True), torch.tensor([0.3, 0.7, 0.7]))
    assert raw(matrix) == before
    copies = flags(1, 50, share=0.5).expand(2, -1)
    assert similarity.nearest(error_iou(copies, copies), same=True).tolist() == [1, 1]  # a twin is a neighbour


def test_minimal_similarity_is_that_of_the_generated_network_that_is_furthest_from_all_originals():
    assert minimal_similarity(torch.tensor([[0.9, 0.1], [0.2, 0.5], [0.0, 0.8]])) == pytest.approx(0.5)


def test_spread_shows_the_tail():
    values = draw(101).abs()
    assert spread(values)["p10"] == pytest.approx(float(values.sort().values[10]))
    assert spread(values)["mean"] == pytest.approx(float(values.mean()))


def test_functional_novelty_is_0_for_copies_and_1_for_a_further_training():
    everyone = integers(60, 400, below=10)
    zoo, other = everyone[:40], everyone[40:]
    inside = disagreement(zoo, zoo)
    copies = functional_novelty(disagreement(zoo[:5], zoo), inside)
    assert copies == {"mean": 0, "p10": 0}
    fresh = functional_novelty(disagreement(other, zoo), inside)
    assert fresh is not None
    assert fresh["mean"] == pytest.approx(1, abs=0.02)
    assert functional_novelty(disagreement(other, zoo[:1]), inside[:1, :1]) is None
    assert functional_novelty(disagreement(other, zoo[:1]).expand(-1, 2), torch.zeros(2, 2)) is None


# --- distance ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[distance.BLOCK_VALUES, 500])
def any_columns(request, monkeypatch):
    """In one block of coordinates, and in many that do not divide their number."""
    monkeypatch.setattr(distance, "BLOCK_VALUES", request.param)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest_distance_is_scipy_s_also_for_copies_and_near_copies(any_columns, offset):
    zoo = draw(30, 101) + offset
    made = torch.cat([zoo[:3], zoo[3:6] * (1 + 1e-7), zoo[6:9] + 1e-3, draw(20, 101, seed=1) + offset])
    before = raw(zoo), raw(made)
    expected = cdist(made.double(), zoo.double())
    found = distance.nearest(made, zoo)
    np.testing.assert_allclose(found.distance, expected.min(1), rtol=1e-12)
    np.testing.assert_array_equal(found.index, expected.argmin(1))
    assert found.distance[:3].tolist() == [0, 0, 0]
    assert (raw(zoo), raw(made)) == before


def test_copies_are_found_among_thousands_of_near_copies():
    step = 1e-7 * draw(2000, 50).double()
    zoo = 100 + step.cumsum(0)
    found = distance.nearest(zoo[::7], zoo)
    assert found.distance.max() == 0
    np.testing.assert_array_equal(found.index, np.arange(0, 2000, 7))


def test_a_network_is_not_its_own_neighbour_but_its_twin_is(any_columns):
    zoo = draw(30, 101)
    expected = cdist(zoo.double(), zoo.double())
    np.fill_diagonal(expected, np.inf)
    found = distance.nearest(zoo)
    np.testing.assert_allclose(found.distance, expected.min(1), rtol=1e-12)
    np.testing.assert_array_equal(found.index, expected.argmin(1))
    twins = distance.nearest(torch.cat([zoo[:3], zoo[:3]]))
    assert twins.distance.tolist() == [0] * 6
    assert twins.index.tolist() == [3, 4, 5, 0, 1, 2]
    assert distance.nearest(zoo[:2]).index.tolist() == [1, 0]


@pytest.mark.parametrize("sizes", [[3, 1, 5, 2], [10, 1], [1, 1]])
def test_networks_of_one_run_are_no_neighbours(any_columns, sizes):
    runs = torch.cat([torch.full((n,), 7 * i) for i, n in enumerate(sizes)])
    runs = runs[torch.randperm(len(runs), generator=rng.stream(0, "order"))]
    zoo = draw(1000, 101)[runs] + 1e-3 * draw(len(runs), 101)
    expected = cdist(zoo.double(), zoo.double())
    expected[(runs[:, None] == runs).numpy()] = np.inf
    found = distance.nearest(zoo, runs=runs)
    np.testing.assert_allclose(found.distance, expected.min(1), rtol=1e-12)
    np.testing.assert_array_equal(found.index, expected.argmin(1))


def test_distances_of_a_memory_mapped_zoo(tmp_path, any_columns):
    zoo = draw(30, 101)
    np.save(tmp_path / "zoo.npy", zoo.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "zoo.npy", mmap_mode="r+"))
    torch.testing.assert_close(distance.nearest(mapped).distance, distance.nearest(zoo).distance, rtol=0, atol=0)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 8), st.integers(1, 20), st.integers(0, 10**6))
def test_distances_do_not_depend_on_the_order_of_coordinates_or_others(num_others, num_networks, size, seed):
    x, y = draw(num_networks, size, seed=seed), draw(num_others, size, seed=seed + 1)
    coordinates = torch.randperm(size, generator=rng.stream(seed, "order"))
    torch.testing.assert_close(
        distance.nearest(x[:, coordinates], y.flip(0)[:, coordinates]).distance, distance.nearest(x, y).distance
    )


def test_the_extent_is_the_root_mean_square_distance_from_the_mean():
    zoo = draw(30, 101) + 5
    expected = (zoo.double() - zoo.double().mean(0)).square().sum(1).mean().sqrt()
    assert distance.extent(zoo) == pytest.approx(float(expected), rel=1e-6)
    assert distance.extent(zoo[:1]) == 0


@pytest.mark.parametrize("distances", [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0, 8.0], [3.0]])
def test_tau_is_the_median(distances):
    assert distance.tau(torch.tensor(distances)) == pytest.approx(statistics.median(distances))


@pytest.mark.parametrize("distances", [[], [0.0, 0.0, 1.0]])
def test_a_zoo_of_one_network_or_of_copies_has_no_tau(distances):
    assert distance.tau(torch.tensor(distances, dtype=torch.float64)) is None


# --- novelty ----------------------------------------------------------------------------------------------------------


def test_profile_counts_networks_that_are_both_good_and_far():
    accuracies = torch.tensor([0.9, 0.9, 0.8, 0.5])
    distances = torch.tensor([2.0, 5.9, 12.0, 100.0])
    found = profile(accuracies, distances, alpha=0.8 - 1e-6, tau=2.0)
    assert [p.m for p in found] == [1, 2, 3, 4, 6]
    assert [p.share for p in found] == [0.75, 0.5, 0.25, 0.25, 0.25]
    assert [p.se for p in found] == pytest.approx([math.sqrt(p.share * (1 - p.share) / 4) for p in found])
    assert found[0].to_json() == {"m": 1, "share": 0.75, "se": pytest.approx(0.2165, abs=1e-4)}


def test_alpha_is_a_fraction_of_the_zoo_s_median():
    assert alpha(torch.tensor([0.1, 0.8, 0.9, 1.0])) == pytest.approx(0.918 * 0.85)
    assert alpha(torch.tensor([0.5]), fraction=0.5) == 0.25


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 50)), min_size=1), st.floats(0, 1), st.floats(0.1, 10))
def test_profiles_fall_with_the_distance_and_stay_in_bounds(networks, alpha, tau):
    accuracies, distances = torch.tensor(networks).T
    shares = [p.share for p in profile(accuracies, distances, alpha=alpha, tau=tau)]
    assert shares == sorted(shares, reverse=True)
    assert 0 <= min(shares) <= max(shares) <= float((accuracies >= alpha).double().mean())


def novelty(iou: list[float], distance: list[float] | None = None) -> Novelty:
    return Novelty(iou, distance)


def test_as_novel_is_judged_by_distance_where_tau_means_something_else_by_error_iou():
    generated = novelty([0.5, 0.6], [1.0, 1.2])
    near, far = novelty([0.1, 0.1], [0.5, 0.7]), novelty([0.9, 0.9], [1.4, 1.4])
    assert as_novel(far, generated)[0]
    is_so, why = as_novel(near, generated)
    assert not is_so
    assert why == "less novel: 0.600 tau from the nearest training network, generated networks 1.100"
    assert as_novel(novelty([0.1, 0.1]), novelty([0.5, 0.6]))[0]
    is_so, why = as_novel(novelty([0.9, 0.9], [9.0, 9.0]), novelty([0.5, 0.6]))  # no tau
    assert not is_so
    assert why == "less novel: 0.900 error IoU with the nearest training network, generated networks 0.550"


@pytest.mark.parametrize(
    ("iou", "expected"), [(0.55, True), (0.5 + 2 * 0.05 - 1e-9, True), (0.5 + 2 * 0.05 + 1e-9, False)]
)
def test_as_novel_leaves_two_standard_errors(iou, expected):
    generated = novelty([0.45, 0.55])  # a standard error of 0.05
    assert as_novel(novelty([iou]), generated)[0] == expected
    assert as_novel(generated, generated)[0]


# --- calibration ------------------------------------------------------------------------------------------------------


def written_out_ece(p: np.ndarray, labels: np.ndarray, num_bins: int) -> float:
    """Guo et al. 2017, Eq. 3, bin after bin."""
    confidence, right = p.max(1), p.argmax(1) == labels
    edges = np.linspace(0, 1, num_bins + 1)
    total = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("num_bins", [15, 4])
@pytest.mark.parametrize("own_labels", [False, True])
def test_calibration_is_that_written_out_and_scikit_learn_s(num_bins, own_labels):
    logits = 3 * draw(4, 300, 7)
    labels = integers(4, 300, below=7) if own_labels else integers(300, below=7)
    found = expected_calibration_error(logits, labels, num_bins=num_bins)
    nll = negative_log_likelihood(logits, labels)
    for i, p in enumerate(logits.double().softmax(-1).numpy()):
        y = labels.expand(4, -1)[i].numpy()
        assert float(found[i]) == pytest.approx(written_out_ece(p, y, num_bins))
        assert float(nll[i]) == pytest.approx(log_loss(y, p, labels=list(range(7))))
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(negative_log_likelihood(log_p, labels), nll)


def test_calibration_of_cases_known_by_hand():
    labels = torch.zeros(4, dtype=torch.long)
    half_right = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).log()[None]  # sure, right half the time
    assert expected_calibration_error(half_right, labels).tolist() == [0.5]
    assert negative_log_likelihood(half_right, labels).tolist() == [math.inf]
    surely_right = torch.tensor([[1.0, 0.0]]).log().expand(1, 4, 2)
    assert expected_calibration_error(surely_right, labels).tolist() == [0]
    assert negative_log_likelihood(surely_right, labels).tolist() == [0]


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_percentiles_are_numpy_s():
    values = draw(31).tolist()
    assert percentiles(values) == {f"p{q}": pytest.approx(np.percentile(values, q)) for q in (10, 25, 50, 75, 90)}
    assert set(percentiles([0.5]).values()) == {0.5}


def test_the_best_is_chosen_without_a_look_at_test_images():
    assert best([0.1, 0.9, 0.9], [1.0, 0.3, 0.8]) == (1, 0.3)


def test_equal_votes_go_to_the_lowest_class():
    answers = torch.tensor([[3, 0, 5], [1, 0, 5], [1, 2, 4], [3, 2, 4]])
    assert vote(answers).tolist() == [1, 0, 4]


def test_the_vote_is_that_counted_image_by_image():
    answers, labels = integers(11, 80, below=4), integers(80, below=4, seed=1)
    expected = [min(range(4), key=lambda c: (-column.count(c), c)) for column in answers.T.tolist()]
    assert vote(answers).tolist() == expected
    members = (answers == labels).double().mean()
    right = sum(a == b for a, b in zip(expected, labels.tolist())) / 80
    assert vote_gain(answers, labels) == pytest.approx(right - float(members))


def test_members_that_err_apart_gain_by_voting_and_copies_gain_nothing():
    labels = integers(99, below=10)
    apart = labels + torch.eye(3, dtype=torch.long).repeat(1, 33)  # each image is got wrong by one of three
    assert vote_gain(apart, labels) == pytest.approx(1 / 3)
    assert vote_gain(apart[:1].expand(5, -1), labels) == pytest.approx(0)


def test_the_best_guess_is_the_most_frequent_label_of_each_row():
    labels = torch.tensor([[0, 0, 1, 2], [2, 2, 2, 0]])
    assert guess(labels).tolist() == [0.5, 0.75]


def test_chance_ends_two_standard_errors_above_the_best_guess():
    labels = torch.arange(400)[None].expand(3, -1) % 4  # 0.25, with a standard error of 0.0217
    line = 0.25 + 2 * math.sqrt(0.25 * 0.75 / 400)
    found = at_chance(torch.tensor([0.1, line - 1e-6, line + 1e-6], dtype=torch.float64), labels)
    assert found.tolist() == [True, True, False]
