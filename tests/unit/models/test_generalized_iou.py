"""GIoU against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_convert

from models.matcher import generalized_iou

coordinates = st.floats(-100, 100)
sizes = st.floats(1e-3, 100)
boxes = st.tuples(coordinates, coordinates, sizes, sizes).map(
    lambda b: box_convert(torch.tensor(b, dtype=torch.float64), "cxcywh", "xyxy")
)


def grid_boxes() -> st.SearchStrategy[Tensor]:
    """Return xyxy boxes with corners on whole cells of a 6 x 6 grid, some without area."""
    side = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted)
    return st.tuples(side, side).map(
        lambda s: torch.tensor([s[0][0], s[1][0], s[0][1], s[1][1]], dtype=torch.float64)
    )


def cells_of(box: Tensor) -> set[tuple[int, int]]:
    """Return the grid cells an integer box covers."""
    x0, y0, x1, y1 = (int(v) for v in box)
    return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}


@given(grid_boxes(), grid_boxes())
def test_giou_equals_counting_cells(a: Tensor, b: Tensor) -> None:
    in_a, in_b = cells_of(a), cells_of(b)
    hull = torch.cat([torch.minimum(a[:2], b[:2]), torch.maximum(a[2:], b[2:])])
    union, around = len(in_a | in_b), len(cells_of(hull))
    iou = len(in_a & in_b) / union if union else 0.0
    expected = iou - ((around - union) / around if around else 0.0)
    assert generalized_iou(a, b).item() == pytest.approx(expected, abs=1e-12)


@given(boxes, boxes)
def test_giou_is_bounded_symmetric_and_one_for_equal_boxes(a: Tensor, b: Tensor) -> None:
    value = generalized_iou(a, b)
    assert -1 <= value <= 1 + 1e-9
    assert value == generalized_iou(b, a)
    assert generalized_iou(a, a).item() == pytest.approx(1)


@given(boxes, boxes, st.floats(0.01, 100), coordinates)
def test_giou_does_not_depend_on_unit_or_origin(
    a: Tensor, b: Tensor, scale: float, shift: float
) -> None:
    moved = generalized_iou(a * scale + shift, b * scale + shift)
    torch.testing.assert_close(moved, generalized_iou(a, b), rtol=0, atol=1e-5)


def test_giou_broadcasts_to_pairs() -> None:
    a = box_convert(torch.rand(3, 4), "cxcywh", "xyxy")
    b = box_convert(torch.rand(5, 4), "cxcywh", "xyxy")
    pairs = generalized_iou(a[:, None], b[None])
    assert pairs.shape == (3, 5)
    torch.testing.assert_close(pairs[2, 4], generalized_iou(a[2], b[4]))
    assert generalized_iou(a[:, None], b[None, :0]).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_without_area_give_finite_values_and_gradients(dtype: torch.dtype) -> None:
    point = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=dtype)
    box = torch.tensor([0.2, 0.2, 0.4, 0.6], dtype=dtype, requires_grad=True)
    assert generalized_iou(point, point) == 0
    (gradient,) = torch.autograd.grad(generalized_iou(box, point), box)
    assert gradient.isfinite().all()
