"""Named random streams: equal names, equal numbers; nothing global changes."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rpgcli import rng

NAMES = st.lists(st.one_of(st.integers(), st.text(st.characters(min_codepoint=32), max_size=5)), max_size=4)


@settings(deadline=None)
@given(st.integers(), NAMES)
def test_a_stream_is_its_seed_and_names(seed, names):
    a, b = rng.stream(seed, *names), rng.stream(seed, *names)
    assert torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))
    assert 0 <= rng.derive(seed, *names) < 2**63


@settings(deadline=None)
@given(st.tuples(st.integers(), NAMES), st.tuples(st.integers(), NAMES))
def test_other_names_are_other_streams(a, b):
    assert (rng.derive(a[0], *a[1]) == rng.derive(b[0], *b[1])) == (a == b)


def test_names_do_not_run_together_and_numbers_are_not_their_digits():
    streams = [("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), (1,), ("1",), (1, 1), (11,), ("",), ()]
    assert len({rng.derive(0, *names) for names in streams}) == len(streams)
    assert rng.derive(1, 2) != rng.derive(12)


def test_the_seed_is_the_sha256_of_the_names_on_every_machine():
    digest = hashlib.sha256(b"7\x1fstr:train\x1fint:3").hexdigest()
    assert rng.derive(7, "train", 3) == int(digest[:16], 16) // 2
    assert torch.randint(100, (4,), generator=rng.stream(7, "train", 3)).tolist() == [29, 48, 97, 60]  # frozen


def test_initialising_seeds_modules_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    with rng.initialising(0, "a"):
        first = nn.Linear(3, 3).weight
    with rng.initialising(0, "a"):
        again = nn.Linear(3, 3).weight
    with rng.initialising(0, "b"):
        other = nn.Linear(3, 3).weight
    with pytest.raises(KeyError), rng.initialising(1):
        torch.rand(1)
        raise KeyError
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)
