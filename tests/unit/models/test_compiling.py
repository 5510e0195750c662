"""The detector compiles as one graph, once for each size of batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.testing import CompileCounter

from configs.schema import LossConfig
from models.build import build_criterion, build_model, compile_model, set_checkpointing
from models.deformable_detr import DeformableDETR
from models.recipes.denoising import Options as DenoisingOptions
from models.recipes.hybrid import Options
from tests.lanes import some
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, perturb, random_images, small_config
from util.batch import pad_images

variants = pytest.mark.parametrize("variant", some(VARIANTS, "refine"))
SIZES = [(60, 90), (75, 64)]


def small(recipes: Mapping[str, Any] | None = None, **options: Any) -> DeformableDETR:
    """Return a float64 detector in training mode without dropout."""
    torch.manual_seed(0)
    options = {
        "backbone": "timm/test_resnet",
        "dropout": 0.0,
        "enc_layers": 1,
        "dec_layers": 2,
    } | options
    model = build_model(small_config(**options), num_classes=5, recipes=recipes).double().train()
    perturb(model)
    return model


def gradients(model: DeformableDETR, counts: Sequence[int] = (3, 2)) -> dict[str, Tensor]:
    """Return gradients of the loss of a random batch."""
    model.zero_grad()
    torch.manual_seed(1)
    images, targets = random_images(*SIZES), random_targets(counts, 5)
    targets = [{**t, "image_id": torch.tensor(i)} for i, t in enumerate(targets)]
    losses = build_criterion(LossConfig())(model(pad_images(images), targets), targets)
    torch.autograd.backward(losses["loss"])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.long
@variants
def test_training_and_evaluation_are_one_graph_each_and_compute_the_same(variant: str) -> None:
    torch.compiler.reset()
    plain, compiled = small(**VARIANTS[variant]), small(**VARIANTS[variant])
    counter = CompileCounter()
    keys = set(compiled.state_dict())
    compile_model(compiled, backend=counter)
    assert set(compiled.state_dict()) == keys
    expected, found = gradients(plain), gradients(compiled)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert counter.frame_count == 1
    batch = pad_images(random_images(*SIZES))
    with torch.no_grad():
        wanted, output = plain.eval()(batch), compiled.eval()(batch)
    torch.testing.assert_close(output["pred_logits"], wanted["pred_logits"])
    for ours, theirs in zip(output["groups"], wanted["groups"], strict=True):
        assert (ours.name, ours.learning.targets) == (theirs.name, theirs.learning.targets)
        torch.testing.assert_close((ours.logits, ours.boxes), (theirs.logits, theirs.boxes))
    assert counter.frame_count == 2


@pytest.mark.long
@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="its dynamo cannot follow dataclasses.replace"
)
@variants
def test_a_recipe_compiles_once_for_any_number_of_boxes(variant: str) -> None:
    torch.compiler.reset()
    recipes = {
        "hybrid": Options(num_queries_one2many=9, k_one2many=2),
        "denoising": DenoisingOptions(num_denoising=6),
    }
    options = VARIANTS[variant] | {"num_feature_levels": 5}
    plain, compiled = small(recipes, **options), small(recipes, **options)
    counter = CompileCounter()
    compile_model(compiled, backend=counter)
    for counts in ((3, 2), (0, 5), (1, 1), (0, 0)):
        expected, found = gradients(plain, counts), gradients(compiled, counts)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_every_size_is_compiled_once_however_many_pytorch_would_compile() -> None:
    torch.compiler.reset()
    model = small().eval()
    counter = CompileCounter()
    with dynamo.patch(cache_size_limit=1):  # PyTorch's own is 8, and would take long to reach
        compile_model(model, backend=counter)
        for size in [(70, 70), (128, 65), (60, 128), (65, 127), (20, 40)]:
            with torch.no_grad():
                model(pad_images(random_images(size), multiple=64))
    assert counter.frame_count == 3  # 128 x 128 thrice, 64 x 128, 64 x 64


@pytest.mark.slow
def test_autocast_and_checkpointing_compile_too() -> None:
    torch.compiler.reset()
    model = small(backbone="resnet18", dropout=0.1, dec_layers=1).float()
    set_checkpointing(model, ("backbone", "encoder", "decoder"))
    compile_model(model, backend="aot_eager")
    batch = pad_images([image.float() for image in random_images(*SIZES)])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
    torch.autograd.backward(outputs["pred_boxes"].sum())
    assert outputs["pred_boxes"].dtype == torch.float32
