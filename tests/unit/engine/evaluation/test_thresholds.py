"""The best thresholds alone are those of the whole analysis."""

import numpy as np
import pytest

from engine.evaluation.analysis import analyse
from engine.evaluation.outcomes import thresholds_by_name
from tests.unit.engine.evaluation.shared import evaluator_with
from tests.unit.engine.evaluation.test_matching import random_detections, random_ground_truth


@pytest.mark.parametrize("seed", range(8))
def test_thresholds_are_those_of_the_analysis(seed: int) -> None:
    draw = np.random.default_rng(seed)
    coco = random_ground_truth(draw, most_boxes=(1, 8)[seed % 2])
    # in every fourth, nothing was found
    evaluator = evaluator_with(coco, random_detections(draw, coco, 6) if seed % 4 else None)
    found = thresholds_by_name(evaluator)
    analysis = analyse(evaluator, evaluator.evaluate())
    assert found == analysis.to_json()["best_thresholds"]
    assert found or seed % 2 == 0
    assert not found or seed % 4
    assert all(type(score) is float for score in found.values())  # loads with weights_only
