"""Predictions beside the ground truth: which are drawn, and on which images."""

import pytest
from PIL import Image, ImageChops

from engine.evaluation.analysis import draw_gallery, evenly_spaced
from tests.unit.engine.evaluation.shared import detections_of, make_coco, truth_of

SCORES = [0.25, 0.75]


def drawn(scores: list[float], threshold: float | None = 0.3, elsewhere: int = 0) -> Image.Image:
    """Return the prediction half of image 4, without its title."""
    coco = make_coco(
        {
            "images": [{"id": 4}, {"id": 9}],
            "categories": [{"id": 7, "name": "dog"}],
            "annotations": [],
        }
    )
    images = draw_gallery(
        detections_of(
            coco,
            [4] * (len(scores) - elsewhere) + [9] * elsewhere,
            [7] * len(scores),
            [[10, 10, 50, 30]] * len(scores),
            scores,
        ),
        truth_of(coco),
        [9, 4],
        lambda i: Image.new("RGB", (80, 60), "white") if i == 4 else None,
        score_threshold=threshold,
    )
    assert list(images) == [4], "an image that cannot be read is left out"
    whole = images[4]
    return whole.crop((0, whole.height - 60, 80, whole.height))


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


@pytest.mark.parametrize(
    ("threshold", "seen"), [(0.3, [1]), (0.75, [1]), (0.76, []), (0.25, [0, 1]), (None, [0, 1])]
)
def test_predictions_from_the_threshold_on_are_drawn(
    threshold: float | None, seen: list[int]
) -> None:
    expected = drawn([SCORES[i] for i in seen], None)
    assert same(drawn(SCORES, threshold), expected)
    assert same(drawn([*SCORES, SCORES[1]], threshold, elsewhere=1), expected)
    assert same(expected, drawn([], None)) == (not seen)


@pytest.mark.parametrize("count", [1, 3, 7, 10, 12])
def test_shown_images_are_spread_over_all(count: int) -> None:
    ids = list(range(100, 110))
    chosen = evenly_spaced(ids, count)
    assert len(chosen) == min(count, 10)
    steps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
    assert not steps or max(steps) - min(steps) <= 1
