"""Positional encodings against their formulas, element by element."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.learned_positions import PositionEmbeddingLearned
from models.levels import PositionEmbeddingSine
from tests.unit.models.small import small_model


def padded_mask(height: int, width: int, valid: tuple[int, int]) -> Tensor:
    """Return [1,H,W], True beyond the valid (height, width)."""
    mask = torch.ones(1, height, width, dtype=torch.bool)
    mask[:, : valid[0], : valid[1]] = False
    return mask


def feature(position: float, index: int, features: int) -> float:
    """Return entry `index` of the encoding of a scalar."""
    angle = position / 10000 ** (2 * (index // 2) / features)
    return math.cos(angle) if index % 2 else math.sin(angle)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 3))
def test_sine_encodes_half_cell_positions_of_the_unpadded_area(
    height: int, width: int, below: int, right: int
) -> None:
    mask = padded_mask(height + below, width + right, (height, width))
    encoding = PositionEmbeddingSine(4)(mask, torch.float64)
    assert encoding.shape == (1, 8, height + below, width + right)
    for row in range(height):
        for column in range(width):
            y = (row + 0.5) / (height + 1e-6) * 2 * math.pi
            x = (column + 0.5) / (width + 1e-6) * 2 * math.pi
            expected = [feature(y, i, 4) for i in range(4)] + [feature(x, i, 4) for i in range(4)]
            assert encoding[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-12)


def test_padding_does_not_change_valid_cells() -> None:
    encode = PositionEmbeddingSine(8)
    alone = encode(padded_mask(5, 6, (5, 6)), torch.float64)
    padded = encode(padded_mask(9, 11, (5, 6)), torch.float64)
    torch.testing.assert_close(padded[..., :5, :6], alone, rtol=0, atol=1e-14)


def test_half_precision_is_computed_in_float32() -> None:
    mask = padded_mask(3, 400, (3, 390))
    encode = PositionEmbeddingSine(8)
    half = encode(mask, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, encode(mask, torch.float32).bfloat16())


def test_learned_tables_are_read_as_they_are_up_to_their_size() -> None:
    encode = PositionEmbeddingLearned(4)
    encoding = encode(torch.zeros(2, 50, 3, dtype=torch.bool), torch.float32)
    assert encoding.shape == (2, 8, 50, 3)
    assert torch.equal(encoding[1, :4, 17, 2], encode.col_embed.weight[2])
    assert torch.equal(encoding[1, 4:, 17, 2], encode.row_embed.weight[17])


def test_learned_tables_stretch_over_larger_maps() -> None:
    encode = PositionEmbeddingLearned(2)
    with torch.no_grad():
        encode.col_embed.weight.copy_(torch.arange(50.0)[:, None].expand(-1, 2))
    encoding = encode(torch.zeros(1, 2, 101, dtype=torch.bool), torch.float32)
    columns = encoding[0, 0, 0]
    assert columns.shape == (101,)
    assert (columns.diff() >= 0).all()
    assert (columns[0], columns[-1]) == (0, 49)
    centre = (torch.arange(101) + 0.5) * 50 / 101 - 0.5
    torch.testing.assert_close(columns, centre.clamp(0, 49))


def test_the_option_names_the_encoding() -> None:
    for name, kind in (("sine", PositionEmbeddingSine), ("learned", PositionEmbeddingLearned)):
        encoding = small_model(position_embedding=name).backbone[1]
        assert isinstance(encoding, kind)
        mask = torch.zeros(1, 2, 2, dtype=torch.bool)
        assert encoding(mask, torch.float32).shape == (1, 64, 2, 2)
