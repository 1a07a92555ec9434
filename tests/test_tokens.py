"""Tokens: exact round trips, statistics against numpy, floors, and memory that does not grow."""

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from rpgcli import artifact, tokens
from rpgcli.alignment import units
from rpgcli.artifact import Draft
from rpgcli.errors import ArtifactError, LayoutError, RecipeError
from rpgcli.layout import Layout, make_layout
from rpgcli.progress import silent
from rpgcli.tokens import TokensConfig, TokenStore, detokenize, tokenize, transform, variance_references, write_store
from tests.helpers import State, draw, make, raw, same_bits, token_store

SPECIAL = torch.tensor([-0.0, 0.0, 1e-45, -1e-40, 3.4e38, -3.4e38, 1 / 3])
"""Values that a careless computation changes: signed zeros, denormals, the ends of float32."""


def network(seed: int) -> State:
    """A state dict with everything that occurs: mixed dtypes, buffers, constants."""
    return {
        "conv.weight": draw(6, 3, 3, 3, seed=seed),
        "special": SPECIAL * (1 if seed % 2 else -1),
        "half": draw(5, 3, seed=seed).half(),
        "half.tiny": torch.tensor([6e-8, -6e-8, -0.0, 65504.0]).half(),
        "brain": draw(9, seed=seed).bfloat16(),
        "bn.weight": torch.ones(6),
        "bn.running_mean": draw(6, seed=seed),
        "bn.running_var": draw(6, seed=seed).square() + 0.01,
        "bn.num_batches_tracked": torch.tensor(100 + seed),
        "temperature": torch.tensor(1.5 + seed),
        "position_ids": torch.arange(4) + seed,
    }


@pytest.mark.parametrize("granularity", ["flat", "layer", "channel"])
@pytest.mark.parametrize("per_shard", [1, 2, 100])
def test_detokenize_inverts_tokenize_bit_for_bit_without_standardisation(tmp_path, monkeypatch, granularity, per_shard):
    monkeypatch.setattr(tokens, "SHARD_BYTES", 1 if per_shard == 1 else 4 * 16 * 20 * per_shard)
    states = [network(seed) for seed in range(5)]
    store = token_store(tmp_path / "t", states, token_dim=16, granularity=granularity, standardise="none")
    assert len(store) == 5
    for i, state in enumerate(states):
        assert same_bits(store.state(i), state)


@pytest.mark.parametrize("granularity", ["flat", "layer", "channel"])
@pytest.mark.parametrize("standardise", ["parameter", "layer"])
def test_detokenize_inverts_tokenize_to_rounding_with_standardisation(tmp_path, granularity, standardise):
    states = [network(seed) for seed in range(5)]
    for state in states:
        state["special"] = draw(7, seed=3) + 0.1 * draw(7, seed=int(state["bn.num_batches_tracked"]))
    store = token_store(tmp_path / "t", states, token_dim=16, granularity=granularity, standardise=standardise)
    for i, state in enumerate(states):
        found = store.state(i)
        for name, value in state.items():
            assert found[name].dtype == value.dtype
            if not value.is_floating_point() or value.dim() == 0:
                assert torch.equal(found[name], value)
                continue
            # a float32 subtraction, division, product and sum of values up to a few units: some ulps of the largest;
            # half types then round once more, by at most one of their own steps
            atol = 4e-6 * max(1.0, float(value.double().abs().max()))
            rtol = torch.finfo(value.dtype).eps if value.dtype != torch.float32 else 0
            torch.testing.assert_close(found[name].double(), value.double(), atol=atol, rtol=rtol)


def test_running_variances_that_no_network_computes_still_give_finite_tokens(tmp_path):
    """A file may hold them: below zero, and so large that their ratio overflows."""
    low, high = torch.tensor([-0.5, 1, 2]), torch.tensor([1e30, 1, 2])
    for i, odd in enumerate((low, high)):
        states: list[State] = [{"running_var": torch.full((3,), float(1 - i))}, {"running_var": odd}]
        store = token_store(tmp_path / str(i), states, token_dim=4)
        assert all(bool(value.isfinite().all()) for value in store.statistics.tensors().values())
        assert bool(store.network(1).isfinite().all())
        assert torch.equal(store.state(1)["running_var"][1:].isfinite(), torch.tensor([True, True]))


def test_raw_tokens_of_one_checkpoint_are_the_store_s(tmp_path):
    states = [network(seed) for seed in range(3)]
    store = token_store(tmp_path / "t", states, token_dim=16)
    references = store.statistics.references
    for i, state in enumerate(states):
        expected = store.statistics.standardise(tokenize(state, store.layout, references))
        assert torch.equal(store.network(i), expected)
        assert same_bits(
            detokenize(expected, store.layout, store.statistics, store.constants(i)),
            store.state(i),
        )


@settings(deadline=None)
@given(
    npst.arrays(np.float32, st.integers(2, 9), elements=st.floats(2**-10, 1e4, width=32)),
    st.floats(0.1, 10.0),
)
def test_the_logarithm_of_variances_is_inverted(variances, factor):
    """The smallest share that the map keeps is 0.001 * 0.95 of the reference mean; larger ones come back."""
    state = {"running_var": torch.from_numpy(variances)}
    layout = make_layout(state, token_dim=4, granularity="flat", log_variance=True)
    references = variance_references({"running_var": state["running_var"] * factor}, layout)
    logs = transform(layout.flatten(state), layout, references)
    back = transform(logs, layout, references, inverse=True)
    unit = 0.95 * float(references)
    np.testing.assert_allclose(logs.double(), np.log(variances.astype(np.float64) / unit + 0.05), rtol=1e-4, atol=1e-5)
    least = 0.001 * unit
    # exp(log(y)) has a relative error of |log y| ulps, which the subtraction of 0.05 turns into an absolute one
    expected = np.maximum(variances.astype(np.float64), least)
    tolerance = 4e-6 * (expected + 0.05 * unit)
    assert (np.abs(back.double().numpy() - expected) <= tolerance).all()


def test_a_generated_variance_is_never_negative_or_zero():
    state = {"running_var": torch.ones(3)}
    layout = make_layout(state, token_dim=4, granularity="flat", log_variance=True)
    back = transform(torch.tensor([-100.0, -5.0, 0.0]), layout, torch.ones(1), inverse=True)
    assert back.tolist() == pytest.approx([0.00095, 0.00095, 0.9025])


# --- statistics -------------------------------------------------------------------------------------------------------


def two_pass(store: TokenStore, states: list[State]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean and deviation of each coordinate over checkpoints, by numpy in float64: (P,) each."""
    layout, references = store.layout, store.statistics.references
    rows = np.stack([transform(layout.flatten(s), layout, references).double().numpy() for s in states])
    return rows.mean(0), rows.std(0)


def offset_networks(num: int) -> list[State]:
    """Values far from zero, where a one-pass variance without shift loses all digits."""
    return [
        {"a": 1e4 + 0.01 * draw(4, 5, seed=i), "b": 1e-3 * draw(11, seed=i), "c": torch.full((3,), 1e4 / 3)}
        for i in range(num)
    ]


@pytest.mark.parametrize("shard_bytes", [1, 4 * 8 * 6 * 3, 2**20])
def test_statistics_are_those_of_a_two_pass_computation_whatever_the_shards(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(tokens, "SHARD_BYTES", shard_bytes)
    states = offset_networks(7)
    store = token_store(tmp_path / "t", states, token_dim=8)
    mean, deviation = two_pass(store, states)
    found = store.layout.ungrid(store.statistics.mean), store.layout.ungrid(store.statistics.scale)
    varies = store.layout.ungrid(store.statistics.varies.float()).bool().numpy()
    np.testing.assert_array_equal(found[0].numpy(), mean.astype(np.float32))  # correctly rounded
    np.testing.assert_allclose(found[1].numpy()[varies], deviation[varies], rtol=1e-6)  # one float32 rounding
    assert varies.tolist() == [True] * 31 + [False] * 3


def test_statistics_do_not_depend_on_the_shards_in_any_bit(tmp_path, monkeypatch):
    states = [network(seed) for seed in range(6)]
    found = []
    for i, shard_bytes in enumerate([1, 4 * 16 * 20 * 2, 2**28]):
        monkeypatch.setattr(tokens, "SHARD_BYTES", shard_bytes)
        store = token_store(tmp_path / str(i), states, token_dim=16)
        found.append(store.statistics.tensors())
    assert len({len(list((tmp_path / str(i)).glob("tokens-*"))) for i in range(3)}) == 3
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_the_layer_mode_pools_over_elements_and_checkpoints(tmp_path):
    states = offset_networks(5)
    store = token_store(tmp_path / "t", states, token_dim=8, standardise="layer")
    everything = {name: np.stack([s[name].double().numpy() for s in states]) for name in ("a", "b")}
    mean = store.layout.pieces(store.layout.ungrid(store.statistics.mean))
    scale = store.layout.pieces(store.layout.ungrid(store.statistics.scale))
    for name, values in everything.items():
        np.testing.assert_allclose(mean[name], values.mean(), rtol=1e-6)
        np.testing.assert_allclose(scale[name], values.std(), rtol=1e-6)
    assert torch.equal(mean["c"], states[0]["c"])


def test_a_deviation_is_at_least_a_thousandth_of_its_tensor_s(tmp_path):
    quiet = torch.tensor([1.0, 1e-9, 0.0])  # deviations: loud, quieter than the floor, never varying
    states = [
        {"w": torch.tensor([5.0, 6.0, 7.0]) + quiet * sign, "still": torch.full((3,), 0.1)} for sign in (-1, 1, -1, 1)
    ]
    states[0]["w"][1] = 6.000001  # varies, by less than a thousandth of the pooled deviation
    store = token_store(tmp_path / "t", states, token_dim=8)
    rows = np.stack([s["w"].double().numpy() for s in states])
    scale = store.layout.pieces(store.layout.ungrid(store.statistics.scale))
    np.testing.assert_allclose(scale["w"][0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(scale["w"][1:], 1e-3 * rows.std(), rtol=1e-6)  # pooled over all twelve values
    np.testing.assert_allclose(scale["still"], 1e-6, rtol=1e-6)
    assert store.layout.ungrid(store.statistics.varies).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("standardise", ["parameter", "layer"])
@pytest.mark.parametrize("held", [0.0, 1e30, torch.inf, torch.nan])
def test_a_coordinate_that_never_varies_is_generated_as_its_mean_whatever_the_token_holds(tmp_path, standardise, held):
    fixed = torch.tensor([0.1, -3.7e-5, 1e20])
    states = [{"w": torch.cat([draw(4, seed=i), fixed]), "still": torch.tensor([1.0, 2.0])} for i in range(3)]
    store = token_store(tmp_path / "t", states, token_dim=4, standardise=standardise)
    found = detokenize(torch.full((store.layout.num_tokens, 4), held), store.layout, store.statistics, {})
    assert raw(found["w"][4:]) == raw(fixed)
    assert found["still"].tolist() == [1.0, 2.0]
    assert not store.network(0)[~store.statistics.varies].any()  # and its token holds zero


def test_checkpoints_that_are_all_the_same_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nothing to learn"):
        token_store(tmp_path / "t", [network(0), network(0)], token_dim=16)


@settings(max_examples=40, deadline=None)
@given(
    npst.arrays(np.float32, st.tuples(st.integers(2, 6), st.integers(2, 9)), elements=st.floats(-1e3, 1e3, width=32))
)
@example(np.array([[0.0, 1e-45], [1e-45, 1e-45]], np.float32))
def test_standardised_tokens_have_mean_0_and_deviation_1_wherever_they_vary(values):
    layout = make_layout({"w": torch.zeros(values.shape[1])}, token_dim=4, granularity="flat", log_variance=True)
    mean, variance = tokens.moments([torch.from_numpy(row) for row in values])
    exact = values.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(variance, exact.var(0), rtol=1e-9, atol=1e-9)
    mean, scale, varies = (layout.grid(part) for part in tokens.standardisation(mean, variance, "parameter"))
    statistics = tokens.Statistics(mean, scale + ~layout.mask(), varies, torch.zeros(0), torch.tensor(False))
    found = torch.stack([statistics.standardise(layout.grid(torch.from_numpy(row))) for row in values])
    assert bool(found.isfinite().all())
    assert not found[:, ~layout.mask()].any()
    constant = torch.from_numpy((values == values[0]).all(0))
    assert torch.equal(layout.ungrid(statistics.varies.float()) == 0, constant)


# --- the store --------------------------------------------------------------------------------------------------------


def shared_store(folder: Path, states: list[State], shared: set[str]) -> TokenStore:
    layout = make_layout(states[0], token_dim=16, granularity="layer", log_variance=False, shared=shared)

    def body(draft: Draft) -> Mapping[str, Any]:
        config = TokensConfig(token_dim=16, standardise="none")
        write_store(draft, iter(states), len(states), layout, config, silent)
        return {"checkpoints": [{}] * len(states)}

    return TokenStore(make(folder, body, stage="tokenize"))


FROZEN = {"conv.weight", "half", "bn.running_var", "temperature", "position_ids"}


def test_what_all_networks_share_is_stored_once_and_comes_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SHARD_BYTES", 1)
    states = [{n: (network(0) if n in FROZEN else network(seed))[n] for n in network(0)} for seed in range(4)]
    store = shared_store(tmp_path / "t", states, FROZEN)
    assert set(store.shared) == FROZEN
    kept = {name.removeprefix("constant.") for shard in store.shards for name in shard}
    assert kept == {"tokens", "bn.num_batches_tracked"}  # each shard, once for each network
    assert not {spec.name for spec in store.layout.generated} & FROZEN
    for i, state in enumerate(states):
        assert same_bits(store.state(i), state)


def test_a_frozen_tensor_that_differs_or_is_not_finite_is_refused(tmp_path):
    states = [network(seed) for seed in range(2)]
    with pytest.raises(LayoutError, match=r"conv\.weight is frozen but not the same in all networks"):
        shared_store(tmp_path / "t", states, {"conv.weight"})
    broken: list[State] = [{**state, "bn.weight": torch.full((6,), torch.nan)} for state in states]
    with pytest.raises(LayoutError, match=r"bn\.weight holds NaN"):
        shared_store(tmp_path / "t", broken, {"bn.weight"})


def test_rows_are_those_of_whole_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SHARD_BYTES", 4 * 16 * 20 * 2)
    states = [network(seed) for seed in range(5)]
    for standardise in ("parameter", "none"):
        store = token_store(tmp_path / standardise, states, token_dim=16, standardise=standardise)
        assert len(store.shards) > 1
        checkpoint, token = torch.meshgrid(torch.arange(5), torch.arange(store.layout.num_tokens), indexing="ij")
        shuffled = torch.randperm(checkpoint.numel(), generator=torch.Generator().manual_seed(0))
        checkpoint, token = checkpoint.flatten()[shuffled], token.flatten()[shuffled]
        whole = torch.stack([store.network(i) for i in range(5)])
        assert torch.equal(store.rows(checkpoint, token), whole[checkpoint, token])


def test_a_store_is_the_same_when_it_is_read_again(tmp_path):
    store = token_store(tmp_path / "t", [network(seed) for seed in range(3)], token_dim=16)
    again = TokenStore(artifact.read(tmp_path / "t", "tokenize"))
    assert again.layout == store.layout
    assert same_bits(again.statistics.tensors(), store.statistics.tensors())
    assert all(same_bits(again.state(i), store.state(i)) for i in range(3))


def test_no_more_checkpoints_live_than_one_shard_holds(tmp_path, monkeypatch):
    layout = make_layout(network(0), token_dim=16, granularity="layer", log_variance=True)
    monkeypatch.setattr(tokens, "SHARD_BYTES", 4 * layout.num_tokens * 16 * 3)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[State]:
        nonlocal most
        for seed in range(20):
            state = network(seed)
            alive.extend(weakref.ref(value) for value in state.values())
            most = max(most, sum(ref() is not None for ref in alive))
            yield state

    def body(draft: Draft) -> Mapping[str, Any]:
        write_store(draft, stream(), 20, layout, TokensConfig(token_dim=16), silent)
        return {"checkpoints": []}

    found = make(tmp_path / "t", body, stage="tokenize")
    assert len([name for name in found.manifest.files if name.startswith("tokens-")]) == 7
    assert most <= 2 * len(network(0))  # the one being counted, and the one before it


def test_a_checkpoint_that_does_not_fit_stops_tokenizing_by_name(tmp_path):
    states = [network(0), {**network(1), "brain": torch.full((9,), torch.nan).bfloat16()}]
    with pytest.raises(LayoutError, match="brain holds NaN"):
        token_store(tmp_path / "t", states, token_dim=16)
    assert not Path(tmp_path / "t").exists()


def test_tokens_of_another_shape_are_refused(tmp_path):
    store = token_store(tmp_path / "t", [network(0), network(1)], token_dim=16)
    other = Layout(store.layout.specs, 32, "layer")
    with pytest.raises(LayoutError, match="this layout needs"):
        other.ungrid(store.network(0))


# --- alignment --------------------------------------------------------------------------------------------------------


def test_independent_starts_are_aligned_unless_the_recipe_says_otherwise():
    groups = (units("a", 4, ["w"], ["v"]),)
    cases = {("auto", True): groups, ("auto", False): (), ("none", True): (), ("weight-matching", False): groups}
    for (align, independent), expected in cases.items():
        config = TokensConfig.model_validate({"align": align})
        assert config.exchanged(groups, independent=independent) == expected
    assert TokensConfig().exchanged((), independent=True) == ()


def test_weight_matching_without_anything_to_match_is_refused():
    with pytest.raises(RecipeError, match=r"no hidden units of these networks are known to be exchangeable"):
        TokensConfig(align="weight-matching").exchanged((), independent=True)
