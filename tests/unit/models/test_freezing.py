"""What is frozen needs no gradient, stays in evaluation mode, and costs autograd nothing."""

from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import LossConfig
from models.build import build_criterion, build_model, freeze
from models.deformable_detr import DeformableDETR
from models.recipes.hybrid import Options
from models.recipes.mds import Options as MDS
from tests.unit.models.definitions import random_targets
from tests.unit.models.small import VARIANTS, perturb, random_images, small_config
from util.batch import pad_images
from util.errors import ConfigError

HEADS = ("class_embed.", "bbox_embed.", "transformer.decoder.class_embed.",
         "transformer.decoder.bbox_embed.")  # fmt: skip
BEFORE_DECODER = ("backbone.", "input_proj.", "transformer.encoder.", "transformer.level_embed")
FROZEN = {"none": (), "backbone": ("backbone.0.",), "encoder": BEFORE_DECODER}


def is_frozen(name: str, part: str) -> bool:
    """Return whether a choice of --freeze freezes the parameter of this name."""
    if part == "all_but_heads":
        return not name.startswith(HEADS)
    return name.startswith(FROZEN[part]) if FROZEN[part] else False


def small(part: str, **options: Any) -> DeformableDETR:
    config = small_config(**options)
    model = build_model(config, num_classes=5, frozen_stages=0)
    perturb(model)
    freeze(model, part)
    return model.train()


@pytest.mark.long
@pytest.mark.parametrize("part", ["none", "backbone", "encoder", "all_but_heads"])
@pytest.mark.parametrize(
    "options",
    [
        *VARIANTS.values(),
        {"position_embedding": "learned", "train_backbone_norm": True},
        {**VARIANTS["two_stage"], "aux_loss": False},
    ],
    ids=[*VARIANTS, "learned encoding, norms learn", "two stage, last layer alone"],
)
def test_exactly_the_unfrozen_parameters_get_gradients(options: dict[str, Any], part: str) -> None:
    model, free = small(part, **options), small("none", **options)
    batch = pad_images([image.float() for image in random_images((40, 60), (50, 43))])
    targets = [{**t, "boxes": t["boxes"].float()} for t in random_targets([3, 2], 5)]
    torch.autograd.backward(build_criterion(LossConfig())(model(batch), targets)["loss"])
    before = dict(free.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = before[name].requires_grad and not is_frozen(name, part)
        assert parameter.requires_grad == wanted, name
        assert (parameter.grad is not None) == wanted, name


@pytest.mark.parametrize("part", ["backbone", "encoder", "all_but_heads"])
def test_autograd_records_nothing_of_frozen_parts(part: str) -> None:
    model, recorded = small(part, **VARIANTS["two_stage"]), {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            recorded[name] = first.requires_grad

        module.register_forward_hook(hook)

    watch("backbone", model.backbone[0])
    watch("encoder", model.transformer.encoder)
    watch("decoder", model.transformer.decoder.layers[-1])
    batch = pad_images([image.float() for image in random_images((60, 90))])
    model(batch)
    position = ("backbone", "encoder", "all_but_heads").index(part)
    order = ("backbone", "encoder", "decoder")
    assert recorded == {name: i > position for i, name in enumerate(order)}


@pytest.mark.parametrize("part", ["none", "backbone", "encoder", "all_but_heads"])
def test_frozen_parts_stay_in_evaluation_mode(part: str) -> None:
    model = small(part, dropout=0.5, train_backbone_norm=True)
    encoder, decoder = model.transformer.encoder, model.transformer.decoder
    for _ in range(2):
        assert model.training
        assert model.backbone.training == (part in ("none", "backbone"))
        assert all(m.training == (part == "none") for m in model.backbone[0].modules())
        in_encoder = part in ("none", "backbone")
        assert all(m.training == in_encoder for m in encoder.modules())
        assert decoder.layers[0].training == (part != "all_but_heads")
        model.eval()
        assert not any(m.training for m in model.modules())
        model.train()


def test_frozen_models_give_the_same_output_twice() -> None:
    model = small("all_but_heads", dropout=0.5, train_backbone_norm=True)
    batch = pad_images([image.float() for image in random_images((60, 90))])
    first, second = model(batch)["pred_logits"], model(batch)["pred_logits"]
    assert first.equal(second)  # no dropout, and no statistics that follow the batch


@pytest.mark.parametrize("part", ["none", "backbone", "encoder", "all_but_heads"])
def test_queries_of_a_recipe_learn_unless_only_the_heads_do(part: str) -> None:
    recipes = {"hybrid": Options(num_queries_one2many=4, k_one2many=2)}
    model = build_model(small_config(), num_classes=5, recipes=recipes).train()
    name = "recipes.hybrid.query_embed.weight"
    if part == "all_but_heads":
        with pytest.raises(ConfigError, match=f"'{name}' would stay random"):
            freeze(model, part, fresh=[name])
    freeze(model, part)
    assert model.get_parameter(name).requires_grad == (part != "all_but_heads")
    assert model.recipes.training == (part != "all_but_heads")
    batch = pad_images([image.float() for image in random_images((60, 90))])
    targets = [{**t, "boxes": t["boxes"].float()} for t in random_targets([3], 5)]
    torch.autograd.backward(build_criterion(LossConfig())(model(batch, targets), targets)["loss"])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if part == "all_but_heads":
            assert parameter.requires_grad == name.startswith(HEADS), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_learn_one_to_many_and_one_to_one_where_a_recipe_detects(variant: str) -> None:
    model = build_model(
        small_config(**VARIANTS[variant]), num_classes=5, recipes={"mds": MDS()}
    ).train()
    own = "recipes.mds.class_embed."
    freeze(model, "all_but_heads", fresh=[f"{own}weight"])
    batch = pad_images([image.float() for image in random_images((60, 90))])
    targets = [{**t, "boxes": t["boxes"].float()} for t in random_targets([3], 5)]
    torch.autograd.backward(build_criterion(LossConfig())(model(batch, targets), targets)["loss"])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith((*HEADS, own)), name
    with pytest.raises(ConfigError, match=r"'recipes\.mds\.suppressor\..*' would stay random"):
        freeze(model, "all_but_heads", fresh=["recipes.mds.suppressor.token_key"])


def test_randomly_initialised_parts_are_not_frozen() -> None:
    model = build_model(small_config(), num_classes=5)
    names = [name for name, _ in model.named_parameters()]
    freeze(model, "encoder", fresh=[n for n in names if n.startswith("transformer.decoder.")])
    with pytest.raises(ConfigError, match=r"freeze all_but_heads: .*'transformer\.decoder\."):
        freeze(model, "all_but_heads", fresh=["transformer.decoder.layers.0.norm1.bias"])
    with pytest.raises(ConfigError, match=r"'transformer\.level_embed' would stay random"):
        freeze(model, "encoder", fresh=["transformer.level_embed"])
