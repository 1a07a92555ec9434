import math

import pytest
import torch

from rpgcli.errors import UsageError
from rpgcli.positions import PositionKind, position_embedding, sincos

TENSOR_INDEX = torch.tensor([0, 0, 0, 1, 2, 2])
TOKEN_INDEX = torch.tensor([0, 1, 2, 0, 0, 1])


def test_sincos_interleaves_sines_and_cosines_of_falling_frequency() -> None:
    embedded = sincos(torch.tensor([3.0]), 6)
    expected = [f(3 * 10000 ** (-i / 3)) for i in range(3) for f in (math.sin, math.cos)]
    torch.testing.assert_close(embedded[0], torch.tensor(expected))


def test_sincos_keeps_its_phase_far_along_a_sequence() -> None:
    # float32 angles would be off by up to 1e-3 there
    assert sincos(torch.tensor(16_383), 4)[0].item() == pytest.approx(math.sin(16_383), abs=1e-6)


def test_2d_positions_embed_token_and_tensor_index_in_separate_halves() -> None:
    embedded = position_embedding("2d", TENSOR_INDEX, TOKEN_INDEX, 16)
    torch.testing.assert_close(embedded, torch.cat([sincos(TOKEN_INDEX, 8), sincos(TENSOR_INDEX, 8)], dim=1))
    assert len(embedded.unique(dim=0)) == len(embedded)


def test_1d_positions_read_only_the_running_index() -> None:
    embedded = position_embedding("1d", TENSOR_INDEX, TOKEN_INDEX, 16)
    assert embedded.equal(position_embedding("1d", TENSOR_INDEX.flip(0), TOKEN_INDEX.flip(0), 16))
    torch.testing.assert_close(embedded, sincos(torch.arange(6), 16))


def test_learned_positions_start_as_2d_ones() -> None:
    learned = position_embedding("learned", TENSOR_INDEX, TOKEN_INDEX, 16)
    assert learned.equal(position_embedding("2d", TENSOR_INDEX, TOKEN_INDEX, 16))


@pytest.mark.parametrize("kind", ["2d", "1d", "learned", "none"])
def test_positions_have_the_width_that_was_asked_for(kind: PositionKind) -> None:
    embedded = position_embedding(kind, TENSOR_INDEX, TOKEN_INDEX, 12)
    assert embedded.shape == (6, 12)
    assert embedded.dtype == torch.float32
    assert bool(embedded.any()) == (kind != "none")


def test_a_width_not_divisible_by_4_is_refused_with_one_that_works() -> None:
    with pytest.raises(UsageError, match=r"d_model is 10(.|\n)*Set d_model to 12"):
        position_embedding("2d", TENSOR_INDEX, TOKEN_INDEX, 10)
