"""Post-processing against a sort in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from models.postprocess import PostProcess
from models.queries import DetectorOutput


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**32))
def test_the_best_pairs_are_in_pixels_of_the_original_image(
    q: int, classes: int, limit: int, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(2, q, classes, dtype=torch.float64) * 3
    boxes = torch.rand(2, q, 4, dtype=torch.float64)
    sizes = [(480, 640), (33, 7)]
    outputs = DetectorOutput(pred_logits=logits, pred_boxes=boxes)
    results = PostProcess(max_detections=limit)(outputs, torch.tensor(sizes))
    for image, (height, width) in enumerate(sizes):
        ranked = sorted(
            ((float(logits[image, i, k]), i, k) for i in range(q) for k in range(classes)),
            reverse=True,
        )[:limit]
        found = results[image]
        assert found["labels"].tolist() == [k for _, _, k in ranked]
        assert found["queries"].tolist() == [i for _, i, _ in ranked]
        for row, (logit, i, _) in enumerate(ranked):
            cx, cy, w, h = boxes[image, i].tolist()
            corners = [(cx - w / 2) * width, (cy - h / 2) * height,
                       (cx + w / 2) * width, (cy + h / 2) * height]  # fmt: skip
            assert found["boxes"][row].tolist() == pytest.approx(corners, abs=1e-9)
            assert float(found["scores"][row]) == pytest.approx(
                1 / (1 + math.exp(-logit)), abs=1e-15
            )


def test_boxes_are_not_clipped_and_carry_no_gradient() -> None:
    outputs = DetectorOutput(
        pred_logits=torch.zeros(1, 1, 1, requires_grad=True),
        pred_boxes=torch.tensor([[[0.0, 1.0, 0.5, 0.5]]], requires_grad=True),
    )
    (result,) = PostProcess()(outputs, torch.tensor([[100, 200]]))
    assert result["boxes"].tolist() == [[-50.0, 75.0, 50.0, 125.0]]
    assert not result["boxes"].requires_grad


def test_half_precision_scores_and_boxes_come_out_in_float32() -> None:
    outputs = DetectorOutput(
        pred_logits=torch.randn(1, 3, 2).bfloat16(), pred_boxes=torch.rand(1, 3, 4).bfloat16()
    )
    (result,) = PostProcess()(outputs, torch.tensor([[1333, 800]]))
    assert result["scores"].dtype == result["boxes"].dtype == torch.float32


@pytest.mark.long
@given(st.integers(0, 2**16), st.sampled_from([0.3, 0.5, 0.8, 0.999]))
def test_suppression_keeps_the_better_of_boxes_that_overlap(seed: int, limit: float) -> None:
    torch.manual_seed(seed)
    outputs = DetectorOutput(
        pred_logits=torch.randn(1, 20, 3, dtype=torch.float64),
        pred_boxes=torch.rand(1, 20, 4, dtype=torch.float64) * 0.2 + 0.4,  # crowded
    )
    size = torch.tensor([[100, 200]])
    (every,) = PostProcess(max_detections=60)(outputs, size)
    (found,) = PostProcess(max_detections=15, nms_iou=limit)(outputs, size)
    kept: list[int] = []
    for i in range(45):  # best first, three candidates for each detection
        overlaps = [
            float(box_iou(every["boxes"][i][None], every["boxes"][j][None]))
            for j in kept
            if every["labels"][i] == every["labels"][j]
        ]
        if all(overlap <= limit for overlap in overlaps):
            kept.append(i)
    for name, values in found.items():
        assert torch.equal(values, every[name][kept[:15]])
