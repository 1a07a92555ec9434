"""The layout: every value has one slot, whatever the shapes and the granularity."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpgcli.errors import LayoutError
from rpgcli.layout import Layout, TensorSpec, make_layout
from tests.helpers import State

SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple), min_size=1, max_size=6)
GRANULARITIES = ["flat", "layer", "channel"]


def layout_of(shapes: list[tuple[int, ...]], token_dim: int, granularity: str) -> Layout:
    specs = tuple(TensorSpec(f"t{i}", shape, "float32", "generated") for i, shape in enumerate(shapes))
    return Layout(specs, token_dim, granularity)  # type: ignore[arg-type]


@settings(deadline=None)
@given(SHAPES, st.integers(1, 40), st.sampled_from(GRANULARITIES), st.integers(0, 2))
def test_ungrid_inverts_grid_and_the_mask_counts_every_value(shapes, token_dim, granularity, num_batch_dims):
    layout = layout_of(shapes, token_dim, granularity)
    flat = torch.arange(1.0, layout.num_parameters + 1).expand(*(2,) * num_batch_dims, -1)
    tokens = layout.grid(flat)
    assert tokens.shape == (*(2,) * num_batch_dims, layout.num_tokens, token_dim)
    assert torch.equal(layout.ungrid(tokens), flat)
    assert torch.equal(tokens != 0, layout.mask().expand_as(tokens))  # padding is zero, and only padding
    assert int(layout.mask().sum()) == layout.num_parameters == sum(map(math.prod, shapes))
    assert layout.mask().any(1).all()  # no token is empty
    poisoned = tokens.masked_fill(~layout.mask(), float("nan"))
    assert torch.equal(layout.ungrid(poisoned), flat)  # padding is ignored


@settings(deadline=None)
@given(SHAPES, st.integers(1, 40))
def test_the_number_of_tokens(shapes, token_dim):
    sizes = [math.prod(shape) for shape in shapes]
    assert layout_of(shapes, token_dim, "flat").num_tokens == math.ceil(sum(sizes) / token_dim)
    assert layout_of(shapes, token_dim, "layer").num_tokens == sum(math.ceil(n / token_dim) for n in sizes)


@settings(deadline=None)
@given(SHAPES, st.integers(1, 40), st.sampled_from(GRANULARITIES))
def test_indices_number_tensors_and_the_tokens_inside_each(shapes, token_dim, granularity):
    layout = layout_of(shapes, token_dim, granularity)
    tensor, token = (index.tolist() for index in layout.indices())
    assert len(tensor) == len(token) == layout.num_tokens
    expected = [(i, k) for i, s in enumerate(layout.segments) for k in range(s.num_tokens)]
    assert list(zip(tensor, token)) == expected
    if granularity != "flat":
        owner = torch.repeat_interleave(torch.arange(len(shapes)), torch.tensor([math.prod(s) for s in shapes]))
        rows = layout.grid(owner.float() + 1)
        assert all(set(row[row > 0].tolist()) == {i + 1} for row, i in zip(rows, tensor))  # a token has one tensor


@settings(deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple), st.integers(1, 60))
def test_channel_tokens_hold_whole_channels_or_whole_rows(shape, token_dim):
    """The oracle: a unit is the largest trailing block of dimensions that fits; no token holds a part of one."""
    layout = layout_of([shape], token_dim, "channel")
    unit = next(u for u in (math.prod(shape[i:]) for i in range(len(shape) + 1)) if u <= token_dim)
    owner = torch.arange(math.prod(shape)) // unit
    tokens = layout.grid(owner + 1)
    units_of_tokens = [set(row[row > 0].tolist()) for row in tokens]
    assert all(not a & b for i, a in enumerate(units_of_tokens) for b in units_of_tokens[:i])
    if math.prod(shape) > token_dim:
        widths = {int((row > 0).sum()) for row in tokens}
        assert len(widths) == 1  # equal shares


def test_channel_tokens_of_a_convolution():
    """(16, 8, 3, 3): at D = 80 an output channel (72 values) a token, at D = 160 two, at D = 40 half of one."""
    for token_dim, num_tokens, width in [(80, 16, 72), (160, 8, 144), (40, 32, 36), (5, 384, 3), (2000, 1, 1152)]:
        layout = layout_of([(16, 8, 3, 3)], token_dim, "channel")
        assert (layout.num_tokens, int(layout.mask()[0].sum())) == (num_tokens, width)


STATE: State = {
    "conv.weight": torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)),
    "bn.running_mean": torch.zeros(4),
    "bn.running_var": torch.ones(4),
    "bn.num_batches_tracked": torch.tensor(7),
    "scale": torch.tensor([2.0]),
    "mask": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.float16),
    "brain": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
}


def test_integers_flags_and_single_values_are_constants_and_variances_are_logged():
    layout = make_layout(STATE, token_dim=16, granularity="layer", log_variance=True, shared={"brain", "mask"})
    assert [s.name for s in layout.constants] == ["bn.num_batches_tracked", "scale", "empty"]
    assert [s.name for s in layout.shared] == ["mask", "brain"]
    assert [s.name for s in layout.generated if s.transform != "identity"] == ["bn.running_var"]
    raw = make_layout(STATE, token_dim=16, granularity="layer", log_variance=False)
    assert all(s.transform == "identity" for s in raw.specs)
    meta = {name: value.to("meta") for name, value in STATE.items()}
    assert make_layout(meta, token_dim=16, granularity="layer", log_variance=False) == raw
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_what_tokens_cannot_hold_is_refused():
    for bad in (torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(LayoutError, match=r"^odd is .*which tokens cannot hold"):
            make_layout({**STATE, "odd": bad}, token_dim=16, granularity="layer", log_variance=True)
    with pytest.raises(LayoutError, match="nothing is left to generate"):
        make_layout({"n": torch.tensor(3)}, token_dim=16, granularity="layer", log_variance=True)


def without(name: str) -> State:
    return {k: v for k, v in STATE.items() if k != name}


BAD: dict[str, tuple[State, str]] = {
    "missing": (without("scale"), "missing: scale"),
    "extra": ({**STATE, "more": torch.ones(1)}, "unexpected: more"),
    "shape": ({**STATE, "half": torch.ones(4, dtype=torch.float16)}, r"half is \(4,\) float16 .*needs \(3,\) float16"),
    "dtype": ({**STATE, "half": torch.ones(3)}, r"half is \(3,\) float32"),
    "NaN": ({**STATE, "brain": torch.full((3,), torch.nan).bfloat16()}, "brain holds NaN"),
    "infinity in a constant": ({**STATE, "scale": torch.tensor([torch.inf])}, "scale holds NaN or infinity"),
}


@pytest.mark.parametrize(("state", "message"), BAD.values(), ids=BAD)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(state, message):
    layout = make_layout(STATE, token_dim=16, granularity="layer", log_variance=True)
    layout.check(dict(reversed(STATE.items())))  # the order of a file does not matter
    with pytest.raises(LayoutError) as error:
        layout.flatten(state)
    assert re.search(message, str(error.value))


def test_tokens_and_values_of_another_layout_are_refused():
    layout = layout_of([(3, 4)], 5, "layer")
    with pytest.raises(LayoutError, match=r"tokens have shape \(3, 6\), this layout needs \(3, 5\)"):
        layout.ungrid(torch.zeros(3, 6))
    with pytest.raises(LayoutError, match="11 values do not fit a layout of 12"):
        layout.grid(torch.zeros(11))
