"""Published detectors under their own keys: recognised, converted, and what is refused.

No published file is read here: keys and shapes are those that the published code builds.
"""

import argparse
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.load import read_options
from configs.schema import ModelConfig
from engine.detector import Detector
from models.build import build_model
from models.recipes import KnownRecipes
from models.recipes.denoising import Options as DenoisingOptions
from models.recipes.hybrid import Options as HybridOptions
from models.recipes.mr import Options as MrOptions
from models.weights.class_names import COCO_CATEGORIES
from models.weights.hugging_face import save_hugging_face
from models.weights.load import Pretrained, load_pretrained
from models.weights.transfer import load_strict, transfer
from tests.unit.models.small import random_images
from tests.unit.models.weights import published_keys as published
from tests.unit.models.weights.published_keys import DECODER, HYBRID, QUERIES, Entry
from util.batch import pad_images
from util.errors import CheckpointError

Weights = dict[str, Tensor]
SIZES: dict[str, Any] = {
    "backbone": "resnet18", "num_feature_levels": 4, "hidden_dim": 32, "dim_feedforward": 24,
    "enc_layers": 2, "dec_layers": 3, "enc_n_points": 4, "dec_n_points": 4,
}  # fmt: skip
TWO_STAGE: dict[str, Any] = {"with_box_refine": True, "two_stage": True}
DINO: dict[str, Any] = {
    **TWO_STAGE, "mixed_query_selection": True, "look_forward_twice": True, "dropout": 0.0,
    "num_queries": QUERIES, "query_position": "box", "decoder_norm": True, "class_proposals": True,
    "refine_eps": 1e-3,
}  # fmt: skip
EDGES: dict[str, Any] = {"position_temperature": 20.0, "position_offset": 0.0}
H_DETR_ARGS = argparse.Namespace(
    num_queries_one2one=QUERIES, num_queries_one2many=HYBRID, mixed_selection=True,
    look_forward_twice=True, nheads=8, dropout=0.0, backbone="resnet18", dilation=False,
    position_embedding="sine",
)  # fmt: skip
DINO_ARGS = argparse.Namespace(
    pe_temperatureH=20, pe_temperatureW=20, num_queries=QUERIES, nheads=8, dropout=0.0,
    backbone="resnet18", dilation=False, position_embedding="sine",
)  # fmt: skip
CASES: dict[str, tuple[list[Entry], dict[str, Any]]] = {
    "h_detr": (
        published.h_detr(),
        {**TWO_STAGE, "mixed_query_selection": True, "look_forward_twice": True,
         "num_queries": QUERIES, "dropout": 0.0},
    ),
    "dino": (published.dino(), {**DINO, **EDGES, "shared_heads": True}),
    "detrex": (published.detrex_dino(), DINO),
    "stable_dino": (published.detrex_dino(fusion=True), {**DINO, "enc_fusion": "dense"}),
    "relation_detr": (
        published.relation_detr(),
        {**DINO, "query_position": "scaled_box", "relation": "previous", "enc_fusion": "mlp"},
    ),
    "mr_detr": (
        published.mr_detr(),
        {**TWO_STAGE, "mixed_query_selection": True, "look_forward_twice": True,
         "num_queries": QUERIES, "dropout": 0.0},
    ),
    "mmdet_plain": (published.mmdetection("plain"), {"num_queries": QUERIES}),
    "mmdet_refine": (
        published.mmdetection("refine"), {"num_queries": QUERIES, "with_box_refine": True}
    ),
    "mmdet_two_stage": (published.mmdetection("two_stage"), TWO_STAGE),
    "mmdet_dino": (published.mmdetection("dino"), {**DINO, **EDGES}),
}  # fmt: skip
ONE_HEAD = {"dino": DECODER, "mmdet_plain": DECODER + 1}  # first heads that are one and the same


def value(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return random values that depend on the key alone."""
    drawn = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    tensor = torch.randn(shape, generator=drawn) * 0.1
    return tensor.abs() + 0.5 if key.endswith("running_var") else tensor


def meaning(case: str, ours: str) -> str:
    """Return one key for all those of one tensor."""
    head = ours.removeprefix("transformer.decoder.")
    parts = head.split(".")
    if parts[0] in ("class_embed", "bbox_embed"):
        if int(parts[1]) < ONE_HEAD.get(case, 0):
            parts[1] = "0"
        return ".".join(parts)
    return ours


def theirs_and_ours(case: str) -> tuple[Weights, Weights]:
    """Return a state dict under their keys, and the same tensors under ours."""
    tensors = [(t, o, value(meaning(case, o), shape)) for t, o, shape in CASES[case][0]]
    ours = {o: tensor for _, o, tensor in tensors}
    for key, tensor in ours.items():
        if key.endswith("pos_proj.0.weight"):  # a convolution of one pixel is a linear map
            ours[key] = tensor[:, :, 0, 0]
    return {t: tensor for t, _, tensor in tensors}, ours


def content(case: str, weights: Weights) -> Mapping[str, Any]:
    """Return a file as the program writes it."""
    if case.startswith("mmdet"):
        return {"meta": {"dataset_meta": {"CLASSES": tuple(COCO_CATEGORIES.values())}},
                "state_dict": weights}  # fmt: skip
    args = {"h_detr": H_DETR_ARGS, "dino": DINO_ARGS}.get(case)
    return {"model": weights, "args": args} if args else {"model": weights}


def load(folder: Path, whole: Mapping[str, Any]) -> Pretrained:
    torch.save(whole, folder / "w.pth")
    return load_pretrained(str(folder / "w.pth"))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_options_classes_and_every_tensor_arrive(tmp_path: Path, case: str) -> None:
    theirs, ours = theirs_and_ours(case)
    pretrained = load(tmp_path, content(case, theirs))
    config = ModelConfig(**pretrained.model_options)
    assert config == ModelConfig(**{**SIZES, **CASES[case][1]})
    wanted = {k: t for k, t in ours.items() if not k.startswith(("recipes.", "query_embed."))}
    assert all(pretrained.state_dict[key].equal(tensor) for key, tensor in wanted.items())
    if "query_embed.weight" in ours:
        queries = ours["query_embed.weight"]
        assert pretrained.state_dict["query_embed.weight"].equal(queries[:QUERIES])
    names = COCO_CATEGORIES.values()
    assert [name for name in pretrained.classes.names if name] == [*names]
    labels = {n: i for i, n in zip(pretrained.classes.ids, pretrained.classes.names, strict=True)}
    assert labels["toothbrush"] == 90

    own = {key: tensor for key, tensor in ours.items() if not key.startswith("recipes.")}
    if "query_embed.weight" in own:
        own["query_embed.weight"] = own["query_embed.weight"][:QUERIES]
    direct = build_model(config, num_classes=len(pretrained.classes)).eval()
    assert direct.load_state_dict(own, strict=False).unexpected_keys == []
    if case.startswith(("mmdet", "relation")):  # a missing bias is zero, as in a fresh model
        assert not any(direct.get_parameter(f"input_proj.{i}.0.bias").any() for i in range(4))
    detector = Detector.load(tmp_path / "w.pth", device="cpu")
    batch = pad_images([torch.randn(3, 64, 96), torch.randn(3, 96, 64)])
    with torch.no_grad():
        expected, got = direct(batch), detector.model.eval()(batch)
    assert torch.equal(got["pred_logits"], expected["pred_logits"])
    assert torch.equal(got["pred_boxes"], expected["pred_boxes"])
    assert bool(got["pred_logits"].isfinite().all())


@pytest.mark.parametrize(
    ("case", "preset"),
    [
        ("h_detr", "ddetr_pp_r50"),
        ("dino", "dino_r50"),
        ("detrex", "align_r50"),
        ("stable_dino", "stable_dino_r50"),
        ("relation_detr", "relation_r50"),
        ("mr_detr", "mr_r50"),
        ("mmdet_plain", "deformable_detr_r50"),
        ("mmdet_refine", "deformable_detr_r50_refine"),
        ("mmdet_two_stage", "deformable_detr_r50_refine_two_stage"),
    ],
)
def test_the_options_are_those_of_the_matching_preset(case: str, preset: str) -> None:
    shipped = read_options(preset, {}, KnownRecipes()).config().model
    layout = ModelConfig(**CASES[case][1])
    for name in vars(layout).keys() - {*SIZES, "num_queries"}:
        assert getattr(shipped, name) == getattr(layout, name), name


@pytest.mark.long
@pytest.mark.parametrize("case", ["mmdet_plain", "mmdet_refine"])
@torch.no_grad()
def test_outputs_in_float64_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, _ = theirs_and_ours(case)
    pretrained = load(tmp_path, content(case, theirs))
    config = ModelConfig(**pretrained.model_options)
    model = build_model(config, num_classes=80).double().eval()
    load_strict(model, pretrained.state_dict, "file")
    save_hugging_face(
        tmp_path / "folder", pretrained.state_dict, options=vars(config),
        classes=pretrained.classes, image_mean=model.backbone.mean, image_std=model.backbone.std,
        image_size=(800, 1333),
    )  # fmt: skip
    detector = transformers.DeformableDetrForObjectDetection.from_pretrained(tmp_path / "folder")
    batch = pad_images(random_images((40, 72), (64, 48)))
    expected = detector.double().eval()(batch.images, pixel_mask=(~batch.mask).long())
    got = model(batch)
    for ours, other in ((got["pred_logits"], expected.logits),
                        (got["pred_boxes"], expected.pred_boxes)):  # fmt: skip
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-9)


@pytest.mark.long
def test_h_detr_tells_the_queries_that_only_train_apart(tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours("h_detr")
    pretrained = load(tmp_path, content("h_detr", theirs))
    extra = pretrained.state_dict["recipes.hybrid.query_embed.weight"]
    assert extra.equal(ours["query_embed.weight"][QUERIES:])
    config = ModelConfig(**pretrained.model_options)
    hybrid = HybridOptions(num_queries_one2many=HYBRID)
    model = build_model(config, num_classes=91, recipes={"hybrid": hybrid})
    load_strict(model, pretrained.state_dict, "file")


def test_what_trains_mr_detr_goes_to_its_recipe(tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours("mr_detr")
    pretrained = load(tmp_path, content("mr_detr", theirs))
    config = ModelConfig(**pretrained.model_options)
    model = build_model(config, num_classes=80, recipes={"mr": MrOptions()})
    load_strict(model, pretrained.state_dict, "file")
    state = model.state_dict()
    for layer in range(DECODER):
        name = f"recipes.mr.layers.{layer}"
        contents, positions = (ours[f"{name}.{part}.weight"] for part in ("contents", "positions"))
        assert torch.equal(state[f"{name}.tokens"], torch.stack([contents, positions]))
        assert torch.equal(state[f"{name}.norm.bias"], ours[f"{name}.norm.bias"])
        for part in ("linear1", "linear2"):
            key = f"{name}.feed_forward.{part}.weight"
            assert torch.equal(state[key], ours[key])
    score = "recipes.mr.encoder_heads.score.weight"
    assert torch.equal(state[score], ours[score][:1])


@pytest.mark.long
def test_what_trains_relation_detr_goes_to_its_recipes(tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours("relation_detr")
    pretrained = load(tmp_path, content("relation_detr", theirs))
    config = ModelConfig(**pretrained.model_options)
    recipes = {
        "denoising": DenoisingOptions(),
        "hybrid": HybridOptions(num_queries_one2many=HYBRID, hybrid_proposals=True),
    }
    model = build_model(config, num_classes=91, recipes=recipes)
    load_strict(model, pretrained.state_dict, "file")
    own = {k: t for k, t in ours.items() if k.startswith("recipes.hybrid.")}
    assert len(own) == 9
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in own.items())
    target = type(pretrained.classes)((1, 2), ("dog", "person"))
    small = build_model(config, num_classes=2, recipes=recipes)
    transfer(
        small, pretrained.state_dict, source_classes=pretrained.classes, target_classes=target,
        proposal_scores="classes",
    )  # fmt: skip
    score = "recipes.hybrid.encoder_heads.score.weight"
    assert torch.equal(small.state_dict()[score], own[score][[18, 1]])


def test_h_detr_without_its_command_line_is_known_by_its_number_of_queries(tmp_path: Path) -> None:
    theirs, _ = theirs_and_ours("h_detr")
    for rows, detecting in ((1800, 300), (900, 900)):
        theirs["query_embed.weight"] = torch.randn(rows, 32)
        assert load(tmp_path, {"model": theirs}).model_options["num_queries"] == detecting


@pytest.mark.parametrize(
    ("case", "rows"),
    [("dino", 91), ("detrex", 80), ("mmdet_dino", 80), ("relation_detr", 91)],
)
def test_labels_of_denoising_have_a_row_of_zeros_for_empty_slots(
    tmp_path: Path, case: str, rows: int
) -> None:
    theirs, ours = theirs_and_ours(case)
    key = "recipes.denoising.label_enc.weight"
    got = load(tmp_path, content(case, theirs)).state_dict[key]
    assert got.shape == (rows + 1, 32)
    assert got[:rows].equal(ours[key][:rows])
    assert not got[rows:].any()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20)",
         (20.0, 0.0)),
        ("positional_encoding=dict(\n    normalize=True, num_feats=128, offset=-0.5,\n"
         "    temperature=10000)", (10000.0, -0.5)),
        ("positional_encoding=dict(normalize=True)", (10000.0, 0.0)),
        ("nothing", (20.0, 0.0)),
    ],
)  # fmt: skip
def test_positions_of_mmdetection_are_those_of_its_configuration(
    tmp_path: Path, said: str, expected: tuple[float, float]
) -> None:
    theirs, _ = theirs_and_ours("mmdet_dino")
    options = load(tmp_path, {"meta": {"cfg": said}, "state_dict": theirs}).model_options
    assert (options["position_temperature"], options["position_offset"]) == expected


def test_mmdetection_names_other_classes(tmp_path: Path) -> None:
    theirs, _ = theirs_and_ours("mmdet_plain")
    names = [f"class {i}" for i in range(80)]
    whole = {"meta": {"dataset_meta": {"classes": names}}, "state_dict": theirs}
    classes = load(tmp_path, whole).classes
    assert classes.names == tuple(names)
    assert classes.ids == tuple(range(80))


@pytest.mark.long
@pytest.mark.parametrize("given", ["classes", "objects"])
def test_the_encoders_classes_go_by_name_where_both_models_tell_them(
    tmp_path: Path, given: str
) -> None:
    theirs, ours = theirs_and_ours("detrex")
    pretrained = load(tmp_path, content("detrex", theirs))
    config = ModelConfig(**pretrained.model_options)
    target = type(pretrained.classes)((1, 2), ("dog", "person"))
    model = build_model(config, num_classes=2)
    head = model.get_parameter(f"class_embed.{DECODER}.bias")
    before = head.clone()
    report = transfer(
        model, pretrained.state_dict, source_classes=pretrained.classes, target_classes=target,
        proposal_scores="classes" if given == "classes" else "either",
    )  # fmt: skip
    bias = ours[f"class_embed.{DECODER}.bias"]
    rows = [[*COCO_CATEGORIES.values()].index(name) for name in target.names]
    assert head.equal(bias[rows] if given == "classes" else before)
    assert (f"class_embed.{DECODER}.bias" in report.reinitialised) == (given != "classes")


@pytest.mark.parametrize(
    ("case", "extra", "what"),
    [
        ("detrex", {"transformer.fusion_run.weight": torch.ones(2)},
         "parts that are not supported: transformer.fusion_run.weight"),
        ("mmdet_dino", {"mask_head.weight": torch.ones(2)}, "mask_head.weight"),
        ("dino", {"input_proj.4.0.weight": torch.ones(32, 64, 1, 1)}, "takes 4 feature maps"),
    ],
)  # fmt: skip
def test_further_parts_are_refused_by_name(
    tmp_path: Path, case: str, extra: Weights, what: str
) -> None:
    theirs, _ = theirs_and_ours(case)
    with pytest.raises(CheckpointError, match=what) as caught:
        load(tmp_path, content(case, theirs | extra))
    assert "\n" not in str(caught.value)


def test_a_dino_of_one_stage_is_refused(tmp_path: Path) -> None:
    theirs, _ = theirs_and_ours("dino")
    theirs = {k: t for k, t in theirs.items() if "enc_out" not in k}
    with pytest.raises(CheckpointError, match="without proposals"):
        load(tmp_path, content("dino", theirs))
