"""Every parameter that requires a gradient gets one, whatever the variant, the loss and the batch.

Distributed training waits for the gradient of each; one that never comes stops the run.
"""

from typing import Any

import pytest
import torch

from configs.schema import LossConfig
from models.build import ALL_STAGES, build_criterion, build_model
from tests.lanes import some
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, perturb, random_images, small_config
from util.batch import pad_images

CASES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    **{f"{name}, last layer alone": {**o, "aux_loss": False} for name, o in VARIANTS.items()},
    "one decoder layer": {"with_box_refine": True, "aux_loss": False, "dec_layers": 1},
    **{
        f"{name}, the last boxes alone": {
            **VARIANTS["two_stage"],
            "aux_loss": False,
            "look_forward_twice": True,
            **more,
        }
        for name, more in {"++": {}, "++ of one layer": {"dec_layers": 1}}.items()
    },
    "single level": {"num_feature_levels": 1},
    "single level, two stage": {"num_feature_levels": 1, **VARIANTS["two_stage"]},
    "six levels": {"num_feature_levels": 6},
    "learned encoding": {"position_embedding": "learned"},
    "torchvision": {"backbone": "resnet18"},
    "torchvision, norms learn": {"backbone": "resnet18", "train_backbone_norm": True},
    "DC5": {"backbone": "resnet50", "num_feature_levels": 1, "dilation": True},
    "norms learn": {"train_backbone_norm": True},
    "dcn v1": {"backbone": "resnet18", "dcn": "v1"},
    "dcn v2, one stage": {"backbone": "resnet18", "dcn": "v2", "dcn_stages": (5,)},
    "timm without its own stem": {"backbone": "timm/convnext_atto"},
    "timm transformer": {"backbone": "timm/swin_tiny_patch4_window7_224"},
}


@pytest.mark.long
@pytest.mark.parametrize("frozen_stages", some([0, 2, ALL_STAGES], 2))
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_every_parameter_that_requires_a_gradient_gets_one(
    options: dict[str, Any], frozen_stages: int
) -> None:
    config = small_config(**options)
    model = build_model(config, num_classes=5, frozen_stages=frozen_stages).train()
    perturb(model)
    batch = pad_images([image.float() for image in random_images((40, 60), (50, 43))])
    for counts in ([3, 2], [0, 0]):
        targets = [{**t, "boxes": t["boxes"].float()} for t in random_targets(counts, 5)]
        model.zero_grad()
        torch.autograd.backward(build_criterion(LossConfig())(model(batch), targets)["loss"])
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("twice", [False, True])
def test_only_heads_that_no_loss_reaches_do_not_learn(twice: bool) -> None:
    options = {**VARIANTS["two_stage"], "aux_loss": False, "look_forward_twice": twice}
    model = build_model(small_config(**options), num_classes=5, frozen_stages=0)
    of_classes, of_boxes = (  # of three layers, then the encoder's
        [all(p.requires_grad for p in head.parameters()) for head in heads]
        for heads in (model.class_embed, model.bbox_embed)
    )
    assert of_classes == [False, False, True, True]
    assert of_boxes == [False, twice, True, True]  # the last boxes teach the head before, too
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    frozen = of_classes.count(False) * 2 + of_boxes.count(False) * 6
    assert sum(not p.requires_grad for p in others) == frozen
