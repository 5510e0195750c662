"""Predictions beside the ground truth: which are drawn, and on which images."""

from typing import Any

import pytest
from PIL import Image, ImageChops

from engine.evaluation.gallery import draw_gallery, evenly_spaced
from tests.unit.engine.evaluation.test_matching import make_coco

FOUND = [
    {"image_id": 4, "category_id": 7, "bbox": [10, 10, 50, 30], "score": score}
    for score in (0.25, 0.75)
]


def drawn(detections: list[dict[str, Any]], threshold: float | None = 0.3) -> Image.Image:
    """Return the prediction half of image 4, without its title."""
    coco = make_coco(
        {
            "images": [{"id": 4}, {"id": 9}],
            "categories": [{"id": 7, "name": "dog"}],
            "annotations": [],
        }
    )
    images = draw_gallery(
        detections,
        coco,
        [9, 4],
        lambda i: Image.new("RGB", (80, 60), "white") if i == 4 else None,
        score_threshold=threshold,
    )
    assert list(images) == ["image_4"], "an image that cannot be read is left out"
    whole = images["image_4"]
    return whole.crop((0, whole.height - 60, 80, whole.height))


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


@pytest.mark.parametrize(
    ("threshold", "seen"), [(0.3, [1]), (0.75, [1]), (0.76, []), (0.25, [0, 1]), (None, [0, 1])]
)
def test_predictions_from_the_threshold_on_are_drawn(
    threshold: float | None, seen: list[int]
) -> None:
    expected = drawn([FOUND[i] for i in seen], None)
    assert same(drawn(FOUND, threshold), expected)
    assert same(drawn([*FOUND, {**FOUND[1], "image_id": 9}], threshold), expected)
    assert same(expected, drawn([], None)) == (not seen)


@pytest.mark.parametrize("count", [1, 3, 7, 10, 12])
def test_shown_images_are_spread_over_all(count: int) -> None:
    ids = list(range(100, 110))
    chosen = evenly_spaced(ids, count)
    assert len(chosen) == min(count, 10)
    steps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
    assert not steps or max(steps) - min(steps) <= 1
