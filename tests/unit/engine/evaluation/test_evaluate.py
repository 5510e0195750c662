"""Outputs that are not finite never become numbers of an evaluation."""

from typing import Any, cast

import pytest
import torch

from configs.schema import LossConfig
from engine.evaluation.evaluate import detect, evaluate
from models.build import build_criterion
from models.postprocess import PostProcess
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import random_images, small_model
from util.batch import Batch, pad_images
from util.errors import UserError

CPU = torch.device("cpu")


def one_batch() -> Batch:
    """Return one image, number 7, with two boxes."""
    (target,) = random_targets([2], 5)
    target |= {"image_id": torch.tensor(7), "orig_size": torch.tensor([64, 96])}
    return Batch(pad_images(random_images((64, 96))), [target], [])


def test_a_score_that_is_not_finite_is_an_error_of_the_user() -> None:
    model = small_model()
    model.class_embed[0].bias.data[1] = float("nan")  # type: ignore[operator]
    results = detect(model, PostProcess(), [one_batch()], device=CPU, description="")
    with pytest.raises(UserError, match="image 7: the model produced NaN or inf"):
        list(results)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = small_model()
    model.bbox_embed[0].layers[-1].bias.data[0] = float("nan")  # type: ignore[union-attr, index]
    criterion = build_criterion(LossConfig())
    with pytest.raises(FloatingPointError, match="image 7"):
        evaluate(
            model, PostProcess(), [one_batch()], cast(Any, None), device=CPU, criterion=criterion
        )
