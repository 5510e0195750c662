"""Exported files in their own runtimes, against the model in PyTorch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from configs.load import read_options
from engine.detector import Detector
from engine.exported.about import SUFFIXES, About
from engine.exported.half import halved
from engine.exported.model import OUTPUTS, ExportedModel, open_exported
from engine.exported.proof import Differences, prove
from engine.exported.write import write
from models.build import build_model
from models.deformable_detr import DeformableDETR
from models.postprocess import PostProcess
from models.recipes import KnownRecipes
from util.batch import PaddedBatch, pad_images
from util.classes import Classes
from util.errors import CheckpointError, ConfigError, UserError

onnx = pytest.importorskip("onnx", reason="needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
openvino = pytest.importorskip("openvino", reason="needs openvino")

CLASSES = Classes((3, 7, 90), ("Katze", "wół", "犬"))
TINY = {
    "backbone": "timm/test_resnet", "hidden_dim": 32, "nheads": 2, "enc_layers": 1,
    "dec_layers": 2, "dim_feedforward": 64, "num_queries": 20,
}  # fmt: skip
TWO_STAGE = {"with_box_refine": True, "two_stage": True}
DINO = {
    **TWO_STAGE, "mixed_query_selection": True, "look_forward_twice": True, "decoder_norm": True,
    "query_position": "scaled_box", "class_proposals": True, "relation": "previous",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two_stage": TWO_STAGE,
    "dc5": {"backbone": "resnet50", "num_feature_levels": 1, "dilation": True},
    "finetune_small": {},  # the preset; see `tiny`
    "dino": DINO,
    "grounding": {
        **DINO, "relation": "none", "encoder_attn": "enhancer", "decoder_tokens": True
    },
    "mds": TWO_STAGE,
    "sparse": {**TWO_STAGE, "encoder_updates": "sparse"},
    "dat encoder": {"encoder_attn": "dat+deformable", "dat_stride": 2},
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {"mds": {"mds": {}}}


def tiny(name: str) -> DeformableDETR:
    """Return a tiny model whose parameters all matter: those that start at zero are drawn, too."""
    torch.manual_seed(0)
    content = {"model": {**TINY, **MODELS[name]}, "recipes": RECIPES.get(name, {})}
    preset = "finetune_small" if name == "finetune_small" else None
    if preset:  # with its own backbone, levels and switches
        del content["model"]["backbone"]
    config = read_options(preset, content, KnownRecipes()).config()
    model = build_model(config.model, num_classes=3, recipes=config.recipes).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def about(model: DeformableDETR, *, finished: bool = False, precision: str = "fp32") -> About:
    """Return what its file says about itself."""
    return About(
        classes=CLASSES, data={"eval_scale": 64, "max_size": 96, "num_select": 30},
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), thresholds={"犬": 0.25}, batch_size=2,
        num_queries=model.num_queries, finished=finished, num_select=30, precision=precision,
    )  # fmt: skip


def batches() -> list[PaddedBatch]:
    """Return batches of 1 and 3 at each of three sizes; those of 3 are padded."""
    torch.manual_seed(1)
    sizes = [
        each
        for height, width in [(64, 96), (130, 75), (200, 161)]
        for each in ([(height, width)], [(height, width), (height // 3, width), (height, 50)])
    ]
    return [pad_images([torch.randn(3, *size) for size in each]) for each in sizes]


def rows(output: Any) -> Tensor:
    """Return the scores and boxes of each query side by side."""
    return torch.cat([output["pred_logits"].sigmoid(), output["pred_boxes"]], dim=-1)


def assert_near(model: DeformableDETR, exported: ExportedModel, smallest: int = 0) -> None:
    """Compare with the model; the queries of a two-stage model as a set."""
    for batch in [b for b in batches() if min(b.images.shape[2:]) >= smallest]:
        with torch.inference_mode():
            expected, found = rows(model(batch)), rows(exported(batch))
        for wanted, got in zip(expected, found, strict=True):
            if model.transformer.two_stage:
                apart = (wanted[:, None] - got[None]).abs().amax(-1)
                got = got[linear_sum_assignment(apart.numpy())[1]]
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
        assert expected.std(1).mean() > 1e-3  # or it would be no test


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx_and_openvino_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    path = tmp_path / "a.onnx"
    write(model, about(model), path, "onnx")
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", 18)]
    onnx.checker.check_model(graph, full_check=True)
    exported = open_exported(str(path))
    assert_near(model, exported)
    # OpenVINO on the same graph, through its own reader
    session = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in batches():
        found = session([batch.images.numpy(), batch.mask.numpy()])
        other = dict(
            zip(OUTPUTS[False], (torch.from_numpy(x) for x in found.values()), strict=True)
        )
        torch.testing.assert_close(rows(other), rows(exported(batch)), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["openvino", "torch_export"])
def test_other_formats_compute_what_the_model_does(to: str, tmp_path: Path) -> None:
    model = tiny("two_stage")
    path = tmp_path / f"a{SUFFIXES[to]}"
    write(model, about(model), path, to)
    exported = open_exported(str(path))
    assert exported.about == about(model)
    assert_near(model, exported, smallest=65 if to == "torch_export" else 0)


HALVED: dict[str, tuple[str, ...]] = {
    "plain": ("onnx", "openvino", "torch_export"), "dc5": ("onnx",), "finetune_small": ("onnx",)
}  # fmt: skip


def half_layers(**options: Any) -> dict[str, bool]:
    """Return the convolutions and linear layers of a tiny model, and which of them are halved."""
    config = read_options(None, {"model": {**TINY, **options}}, KnownRecipes()).config()
    half, _ = halved(build_model(config.model, num_classes=3).eval())
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    return {
        name: layer.weight.dtype == torch.float16
        for name, layer in half.named_modules()
        if isinstance(layer, kinds)
    }


def test_depthwise_convolutions_of_timm_and_what_attends_in_dat_stay_in_float32() -> None:
    layers = half_layers(backbone="timm/test_efficientnet")
    parts = {name: layer for name, layer in layers.items() if name.startswith("backbone.0.")}
    islands = {name for name, half in parts.items() if not half}
    assert islands == {name for name in parts if ".conv_dw" in name} != set()
    layers = half_layers(backbone="dat_tiny", encoder_attn="dat+deformable", dat_stride=2)
    attending = {
        (name.rpartition(".")[2], half) for name, half in layers.items() if ".proj_" in name
    }
    assert attending == {
        ("proj_qkv", False), ("proj_q", False), ("proj_k", False), ("proj_v", False),
        ("proj_out", True),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVED)
def test_half_precision_is_that_of_heavy_layers_alone(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    for key, buffer in model.named_buffers():  # frozen norms that change something
        if key.endswith(("running_mean", "bn1.bias", "bn2.bias", "bn3.bias")):
            buffer.normal_(std=0.1)
        elif key.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight")):
            buffer.uniform_(0.7, 1.3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    half, count = halved(model)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    kinds = {key: p.dtype for key, p in half.named_parameters()}
    assert sum(kind == torch.float16 for kind in kinds.values()) >= count > 20
    for key, kind in kinds.items():
        exact = ("offset", "attention_weights", "self_attn.in_proj", "embed", "norm", "proposal")
        assert kind == torch.float32 or not any(word in key for word in exact), key
    total = sum(p.numel() for p in half.parameters())
    assert sum(p.numel() for p in half.parameters() if p.dtype == torch.float16) > 0.7 * total
    for to in HALVED[name]:
        path = tmp_path / f"a{SUFFIXES[to]}"
        write(half, about(model, precision="fp16"), path, to)
        exported = open_exported(str(path))
        assert exported.about.precision == "fp16"
        if model.transformer.two_stage:
            continue  # its ranks change: AP is what it is judged by
        for batch in batches()[2:4]:
            with torch.inference_mode():
                expected, found = rows(model(batch)), rows(exported(batch))
            assert found.dtype == torch.float32
            assert 1e-6 < float((found - expected).abs().max()) < 0.01
    graph = onnx.load(tmp_path / "a.onnx")
    assert {node.domain for node in graph.graph.node} == {""}
    sizes: dict[int, int] = {}
    for weight in graph.graph.initializer:
        sizes[weight.data_type] = sizes.get(weight.data_type, 0) + math.prod(weight.dims)
    assert sizes[onnx.TensorProto.FLOAT16] > 0.7 * total


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch_export"])
def test_post_processing_inside_the_file_selects_what_ours_does(to: str, tmp_path: Path) -> None:
    model = tiny("plain")
    path = tmp_path / f"a{SUFFIXES[to]}"
    write(model, about(model, finished=True), path, to)
    exported = open_exported(str(path))
    sizes = torch.tensor([[480, 640], [333, 500], [77, 91]])
    for batch in batches()[2:]:  # large enough for both formats
        with torch.inference_mode():
            original = sizes[: batch.images.shape[0]]
            expected = PostProcess(max_detections=30)(model(batch), original)
            found = exported.postprocess(30, None)(exported(batch), original)
        for wanted, got in zip(expected, found, strict=True):
            torch.testing.assert_close(got["scores"], wanted["scores"], rtol=0, atol=1e-5)
            torch.testing.assert_close(got["boxes"], wanted["boxes"], rtol=0, atol=1e-2)
            assert got["labels"].equal(wanted["labels"])
    arrays = [batch.images, batch.mask, sizes]  # as another program calls it: pixels come out
    torch.testing.assert_close(
        exported.session.run(arrays)[2], torch.stack([d["boxes"] for d in expected]), rtol=0,
        atol=1e-2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="selects 30 detections"):
        exported.postprocess(31, None)
    with pytest.raises(ConfigError, match="without NMS"):
        exported.postprocess(30, 0.7)


@pytest.mark.slow
def test_a_file_carries_all_that_a_detector_needs_and_a_broken_one_is_caught(
    tmp_path: Path,
) -> None:
    model = tiny("plain")
    path = tmp_path / "a.onnx"
    write(model, about(model), path, "onnx")
    exported = Detector.load(path, max_size=90)
    assert exported.classes == CLASSES
    assert exported.thresholds == {"犬": 0.25}
    assert (exported.data.eval_scale, exported.data.max_size) == (64, 90)
    assert (exported.mean, exported.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    assert exported.batch_size == 2
    with pytest.raises(ConfigError, match="no PyTorch module"):
        exported.model  # noqa: B018
    detector = Detector(
        model, CLASSES, data=exported.data, mean=exported.mean, std=exported.std,
        device=torch.device("cpu"),
    )  # fmt: skip
    pixels = (torch.rand(3, 70, 90) * 255).to(torch.uint8)
    for box, other in zip(detector.predict(pixels, 0), exported.predict(pixels, 0), strict=True):
        assert box.name == other.name
        assert box.score == pytest.approx(other.score, abs=1e-5)
        assert box.xyxy == pytest.approx(other.xyxy, abs=1e-2)

    images = [torch.randn(3, 64, 96), torch.randn(3, 80, 75)]
    assert prove(detector, exported, images).largest < 1e-4
    assert prove(detector, exported, images).images == 4
    graph = onnx.load(path)
    for weight in graph.graph.initializer:
        if len(weight.dims) == 4:  # a convolution, mirrored
            values = onnx.numpy_helper.to_array(weight)[..., ::-1].copy()
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    broken = tmp_path / "broken.onnx"
    onnx.save(graph, broken)
    assert prove(detector, Detector.load(broken), images).largest > 1e-4

    content = path.read_bytes()
    for name, damaged in {"cut": content[: len(content) // 2], "other": b"no graph" * 50}.items():
        file = tmp_path / f"{name}.onnx"
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name}.onnx: cannot be opened"):
            Detector.load(file)
    with pytest.raises(CheckpointError, match="no such file"):
        Detector.load(tmp_path / "none.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, broken)
    with pytest.raises(CheckpointError, match="was not written by `export`"):
        Detector.load(broken)


def test_rows_are_compared_as_a_set_unless_they_are_in_order() -> None:
    expected = torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    found = expected.flip(0).clone()
    sure = torch.ones(6, dtype=torch.bool)
    same, ordered, shifted = Differences(), Differences(), Differences()
    same.add(expected, found, sure, in_order=False)
    assert same.largest == 0
    ordered.add(expected, found, sure, in_order=True)
    assert ordered.largest > 0.1
    found[0, 0] += 0.01  # a score of the last row
    found[2, 6] -= 0.02  # a box of row 3
    shifted.add(expected, found, sure, in_order=False)
    assert shifted.scores == pytest.approx(0.01, abs=1e-6)
    assert shifted.boxes == pytest.approx(0.02, abs=1e-6)


def test_what_ties_with_the_last_is_left_out_and_nothing_left_is_no_proof() -> None:
    expected = torch.rand(6, 7)
    found = expected.clone()
    found[5] += 0.5
    sure = torch.tensor([True] * 5 + [False])
    differences = Differences()
    differences.add(expected, found, sure, in_order=True)
    assert (differences.largest, differences.compared, differences.left_out) == (0, 5, 1)
    nothing = Differences()
    nothing.add(expected, found, ~sure & False, in_order=True)
    assert nothing.largest == float("inf")
    found[0, 0] = float("nan")
    differences.add(expected, found, sure, in_order=True)
    assert differences.largest == float("inf")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "was not written by `export`"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"layout": 9}', "another version"),
        ('{"layout": 1, "classes": {"ids": [1], "names": []}}', "is damaged"),
    ],
)
def test_metadata_that_cannot_be_read_is_one_line(text: str | None, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        About.from_text(text, "a.onnx")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_archive_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.pt2"
    file.write_bytes(b"no archive" * 50)
    with pytest.raises(CheckpointError, match=r"other\.pt2: is damaged or no exported file"):
        Detector.load(file)
    assert capfd.readouterr() == ("", "")


def test_what_a_runtime_cannot_compute_is_one_line() -> None:
    def refuse(arrays: object) -> list[Tensor]:
        raise RuntimeError("K is larger\nthan the axis")

    from engine.exported.sessions import Session

    model = tiny("plain")
    exported = ExportedModel(Session("a runtime", None, refuse), about(model))
    with pytest.raises(UserError, match=r"1 images of 96 x 64 pixels .*K is larger than") as error:
        exported(batches()[0])
    assert "\n" not in str(error.value)
