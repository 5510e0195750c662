"""`Detector.explain`: which detections it explains, in which units, and what it refuses."""

import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import DataConfig
from configs.tiles import TileOptions
from engine.detector import Detector
from engine.explain.explanation import Explanation
from engine.explain.record import recording
from models.build import build_model
from models.recipes.mds import Options as MDS
from tests.unit.models.small import perturb, small_config
from util.batch import pad_images
from util.classes import Classes
from util.errors import ConfigError, DataError

CLASSES = Classes((3, 7, 90), ("cat", "dog", "cow"))
SIZE = (150, 100)  # width and height; the model sees 96 x 64 pixels


def detector_of(recipes: dict[str, Any] | None = None, **options: Any) -> Detector:
    """Return a small detector with weights that make a difference."""
    model = build_model(small_config(**options), num_classes=3, recipes=recipes or {})
    perturb(model)
    return Detector(
        model, CLASSES, data=DataConfig(eval_scale=64, max_size=96),
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), device=torch.device("cpu"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """An image of noise."""
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def detector() -> Detector:
    """A two-stage detector."""
    torch.manual_seed(0)
    return detector_of(with_box_refine=True, two_stage=True)


def test_the_best_boxes_are_explained_in_order(detector: Detector, image: Image.Image) -> None:
    boxes = detector.predict(image, 0.0)
    found = detector.explain(image, 0.0, count=4).queries
    assert [(q.name, q.category_id, q.score, q.xyxy) for q in found] == [
        (b.name, b.category_id, b.score, b.xyxy) for b in boxes[:4]
    ]
    (third,) = detector.explain(image, 0.0, box=2).queries
    assert third.xyxy == boxes[2].xyxy
    for query in found:
        assert query.boxes[-1] == pytest.approx(query.xyxy, abs=1e-3)
        assert query.scores[-1] == pytest.approx(query.score, abs=1e-6)


@torch.no_grad()
def test_points_are_pixels_of_the_image(detector: Detector, image: Image.Image) -> None:
    """They are the model's fractions of the levels times the sides of the original image."""
    (query,) = detector.explain(image, query=3).queries
    small = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    seen: list[Any] = []
    hook = detector.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    detector.predict(small)
    hook.remove()
    with recording(detector.model) as record:
        output = detector.model(pad_images([seen[0].images[0]]))
    for layer, look in enumerate(record.looks):
        locations, weights = look.samples(torch.tensor([3]))
        expected = locations[0, 0].double() * torch.tensor(SIZE)
        np.testing.assert_allclose(query.sampling.points[layer], expected, atol=1e-4)
        np.testing.assert_allclose(query.sampling.weights[layer], weights[0, 0], atol=1e-6)
        if layer:  # the box that the layer before has found is where this one looks
            x0, y0, x1, y1 = query.boxes[layer - 1]
            box = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
            np.testing.assert_allclose(query.sampling.references[layer], box, atol=1e-3)
    cx, cy, w, h = (output["pred_boxes"][0, 3] * torch.tensor((*SIZE, *SIZE))).tolist()
    assert query.xyxy == pytest.approx((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), abs=1e-3)
    assert query.category_id == CLASSES.ids[int(output["pred_logits"][0, 3].argmax())]


def test_an_image_that_is_cut_is_refused_and_one_tile_is_not(image: Image.Image) -> None:
    torch.manual_seed(0)
    detector = detector_of(with_box_refine=True)
    whole = detector.explain(image, 0.0, box=0).queries[0].xyxy
    detector.tiles = TileOptions(tile=True, tile_size=SIZE[0])
    assert detector.explain(image, 0.0, box=0).queries[0].xyxy == whole
    detector.tiles = TileOptions(tile=True, tile_size=SIZE[0] - 1)
    with pytest.raises(ConfigError, match="tile: this image is cut into 2 tiles"):
        detector.explain(image, 0.0, box=0)


def test_a_point_chooses_the_smallest_box_around_it(detector: Detector, image: Image.Image) -> None:
    boxes = detector.predict(image, 0.0)
    x0, y0, x1, y1 = boxes[0].xyxy
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    (found,) = detector.explain(image, 0.0, point=(x, y)).queries
    areas = [
        (b.xyxy[2] - b.xyxy[0]) * (b.xyxy[3] - b.xyxy[1])
        for b in boxes
        if b.xyxy[0] <= x <= b.xyxy[2] and b.xyxy[1] <= y <= b.xyxy[3]
    ]
    left, top, right, bottom = found.xyxy
    assert left <= x <= right
    assert top <= y <= bottom
    assert (right - left) * (bottom - top) == pytest.approx(min(areas))
    with pytest.raises(ConfigError, match=r"point 9999,5: is in none of the 21 boxes"):
        detector.explain(image, 0.0, point=(9999, 5))


def test_a_class_leaves_its_detections_alone(detector: Detector, image: Image.Image) -> None:
    best = next(box for box in detector.predict(image, 0.0) if box.name == "dog")
    found = detector.explain(image, 0.0, class_name="dog", count=2).queries
    assert [query.name for query in found] == ["dog", "dog"]
    assert found[0].xyxy == best.xyxy
    (asked,) = detector.explain(image, query=5, class_name="cow").queries
    assert (asked.query, asked.name) == (5, "cow")
    with pytest.raises(ConfigError, match="no class 'dgo'. Known: cat, cow, dog"):
        detector.explain(image, class_name="dgo")


def test_a_token_is_the_cell_that_a_pixel_is_in(detector: Detector, image: Image.Image) -> None:
    explanation = detector.explain(image, 1.0, token=(77, 30, 1))
    assert not explanation.queries
    token = explanation.token
    assert token is not None
    height, width = explanation.level_shapes[1]
    assert (token.level, token.row, token.column) == (1, int(0.3 * height), 77 * width // 150)
    x, y = token.centre
    assert abs(x - 77) <= SIZE[0] / width / 2
    assert abs(y - 30) <= SIZE[1] / height / 2
    assert token.sampling.references == pytest.approx(np.tile([x, y, 0, 0], (2, 1)), abs=1e-3)
    assert token.sampling.layers.tolist() == [0, 1]
    assert token.sampling.weights.sum((2, 3)) == pytest.approx(np.ones((2, 4)), abs=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "refine": {"with_box_refine": True},
    "single scale": {"num_feature_levels": 1},
    "relation": {"with_box_refine": True, "relation": "previous"},
    "lite": {"encoder_updates": "lite"},
    "windows first": {"encoder_attn": "mswin+deformable"},
    "class tokens": {"encoder_attn": "enhancer", "decoder_tokens": True},
    "mds": {"with_box_refine": True, "two_stage": True, "recipes": {"mds": MDS()}},
}


@pytest.mark.parametrize("name", CASES)
def test_any_architecture_is_explained(name: str, image: Image.Image) -> None:
    detector = detector_of(**CASES[name])
    explanation = detector.explain(image, 0.0, count=2, token=(149, 99, 0))
    assert explanation.token is not None
    layers, levels = 3, len(explanation.level_shapes)
    for query in explanation.queries:
        sampling = query.sampling
        assert sampling.points.shape == (layers, 4, levels, 3, 2)
        assert sampling.weights.sum((2, 3)) == pytest.approx(np.ones((layers, 4)), abs=1e-5)
        assert query.attention.shape == (layers, 4, 7)
        assert query.attention.sum(2) == pytest.approx(np.ones((layers, 4)), abs=1e-5)
        assert query.boxes[-1] == pytest.approx(query.xyxy, abs=1e-3)
        assert explanation.query_boxes[:, query.query] == pytest.approx(query.boxes)


def test_an_encoder_without_sampling_points_is_said(image: Image.Image) -> None:
    detector = detector_of(encoder_attn="dense")
    assert detector.explain(image, 0.0).queries
    with pytest.raises(ConfigError, match=r"token: the encoder .* has no deformable attention"):
        detector.explain(image, 0.0, token=(1, 1, 0))


def test_a_decoder_without_sampling_points_is_said(image: Image.Image) -> None:
    detector = detector_of(encoder_attn="dense", decoder_attn="dense", num_feature_levels=1)
    with pytest.raises(ConfigError, match=r"decoder_attn: .* as in DETR, .* no sampling points"):
        detector.explain(image, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "no detection reaches it; the best is "),
        ({"box": 21}, "box 21: there are 21 detections, counted from 0"),
        ({"query": 7}, "query 7: the model has 7"),
        ({"box": 0, "query": 0}, "box: leaves nothing to choose by `query`"),
        ({"box": -1}, "box: must not be negative"),
        ({"token": (0, 0, 4)}, "token: there is no level 4. This model has 4"),
        ({"token": (150, 0, 0)}, "token: 150,0 is outside the image of 150 x 100"),
    ],
)
def test_what_is_not_there_is_refused(
    detector: Detector, image: Image.Image, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        detector.explain(image, **{"threshold": 0.0, **options})


def test_an_unreadable_image_is_named(detector: Detector) -> None:
    with pytest.raises(DataError, match=r"nothing\.jpg: cannot be read"):
        detector.explain("nothing.jpg")


def test_json_holds_every_number(detector: Detector, image: Image.Image) -> None:
    explanation = detector.explain(image, 0.0, box=0, token=(1, 1, 0))
    content = json.loads(json.dumps(explanation.to_json()))
    assert set(content) == {field.name for field in fields(Explanation)}
    query = explanation.queries[0]
    assert content["queries"][0]["sampling"]["points"] == query.sampling.points.tolist()
    assert content["queries"][0]["attention"] == query.attention.tolist()
    assert content["token"]["centre"] == list(explanation.token.centre if explanation.token else ())
