"""`export` as a user runs it, and what takes its files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Config
from models.build import build_model
from tests.integration.conftest import Cli
from tests.unit.models.small import small_config
from util.classes import Classes

onnx = pytest.importorskip("onnx", reason="needs onnx")
for runtime in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(runtime, reason=f"needs {runtime}")


# a torch.export file needs more pixels than the tiny run's 64
SIZE = ("--eval_scale", "96", "--max_size", "128")


def predictions(cli: Cli, checkpoint: Path, shapes: Path, folder: Path) -> list[dict[str, Any]]:
    """Return what `predict` writes."""
    done = cli("predict", "--checkpoint", checkpoint, "--input", shapes / "val2017",
               "--output_dir", folder, *SIZE)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads((folder / "predictions.json").read_text())
    return found


def average_precision(cli: Cli, checkpoint: Path, folder: Path) -> float:
    """Return the AP that `eval` writes, on the validation data of the run."""
    done = cli("eval", "--checkpoint", checkpoint, "--output_dir", folder, "--no_analysis", *SIZE)
    assert done.returncode == 0, done.stderr
    stats = json.loads((folder / "eval" / "results.json").read_text())["stats"]
    return float(stats["AP"])


def assert_same_use(cli: Cli, run: Path, file: Path, shapes: Path, folder: Path) -> None:
    """Compare what `predict` and `eval` make of a checkpoint and its exported file."""
    ours = predictions(cli, run / "last.pth", shapes, folder / "ours")
    others = predictions(cli, file, shapes, folder / "others")
    assert len(ours) == 700
    for one, other in zip(ours, others, strict=True):
        assert one["file_name"] == other["file_name"]
        assert other["score"] == pytest.approx(one["score"], abs=1e-5)
    for key in ("category_name", "category_id"):  # but for ties of scores
        assert sum(a[key] != b[key] for a, b in zip(ours, others, strict=True)) <= 7
    ap = average_precision(cli, run / "last.pth", folder / "ours")
    assert average_precision(cli, file, folder / "others") == pytest.approx(ap, abs=1e-3)


@pytest.mark.long
def test_an_onnx_file_is_proven_used_and_refused_when_it_is_broken(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    checkpoint, file = finished_run / "last.pth", tmp_path / "a.onnx"
    truth = shapes / "annotations" / "instances_val2017.json"
    images = shapes / "val2017"
    done = cli("export", "--checkpoint", checkpoint, "--to", "onnx", "--output", file,
               "--input", images, "--val_images", images, "--val_annotations", truth)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "proof in onnxruntime" in done.stdout
    assert "AP: " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert_same_use(cli, finished_run, file, shapes, tmp_path)

    graph = onnx.load(file)
    for weight in graph.graph.initializer:
        if len(weight.dims) == 4:  # a convolution, mirrored
            values = onnx.numpy_helper.to_array(weight)[..., ::-1].copy()
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, file)
    done = cli("export", "--checkpoint", checkpoint, "--verify", file)
    assert done.returncode == 1
    assert "differs too much" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("to", "name"), [("openvino", "a.xml"), ("torch_export", "a.pt2")])
def test_other_formats_are_proven_and_used(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path, to: str, name: str
) -> None:
    file = tmp_path / name
    done = cli(
        "export", "--checkpoint", finished_run / "last.pth", "--to", to, "--output", file, *SIZE
    )
    assert done.returncode == 0, done.stderr
    assert_same_use(cli, finished_run, file, shapes, tmp_path)


@pytest.mark.slow
def test_half_precision_is_proven_by_ap(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    checkpoint, whole, half = finished_run / "last.pth", tmp_path / "a.onnx", tmp_path / "b.onnx"
    export = ("export", "--checkpoint", checkpoint, "--output", half, "--precision", "fp16")
    done = cli(*export)
    assert done.returncode == 1, done.stderr
    assert "proves nothing: name other images by --val_images" in done.stdout
    assert not half.exists()

    # what the checkpoint itself finds best is taken for the truth, so its AP is high
    content = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    names = {image["file_name"]: image["id"] for image in content["images"]}
    best: dict[str, list[dict[str, Any]]] = {}
    for box in predictions(cli, checkpoint, shapes, tmp_path / "found"):
        best.setdefault(box["file_name"], []).append(box)
    content["annotations"] = [
        {"id": 10 * names[name] + i, "image_id": names[name], "category_id": box["category_id"],
         "bbox": box["bbox"], "area": box["bbox"][2] * box["bbox"][3], "iscrowd": 0}
        for name, boxes in best.items() for i, box in enumerate(boxes[:5])
    ]  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(content))
    place = ("--val_images", shapes / "val2017", "--val_annotations", tmp_path / "truth.json")
    done = cli(*export, *place, *SIZE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in float16: " in done.stdout
    assert "AP decides" in done.stdout
    done = cli("export", "--checkpoint", checkpoint, "--output", whole)
    assert done.returncode == 0, done.stderr
    assert half.stat().st_size < whole.stat().st_size
    assert len(predictions(cli, half, shapes, tmp_path / "half")) == 700

    graph = onnx.load(half)
    for weight in graph.graph.initializer:
        if len(weight.dims) == 4:  # a convolution, mirrored
            values = onnx.numpy_helper.to_array(weight)[..., ::-1].copy()
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, half)
    done = cli("export", "--checkpoint", checkpoint, "--verify", half, *place, *SIZE)
    assert done.returncode == 1
    assert "differs too much" in done.stdout


@pytest.mark.slow
def test_what_differs_too_much_is_not_kept(cli: Cli, finished_run: Path, tmp_path: Path) -> None:
    done = cli("export", "--checkpoint", finished_run / "last.pth", "--output",
               tmp_path / "a.onnx", "--tolerance", "1e-12", "--postprocess")  # fmt: skip
    assert done.returncode == 1
    assert "not kept" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_option_that_stands_in_the_way_is_named(cli: Cli, tmp_path: Path) -> None:
    model = small_config(backbone="resnet18", dcn="v2")
    content = {
        "model": build_model(model, num_classes=2).state_dict(),
        "config": asdict(Config(model=model)),
        "classes": Classes((1, 2), ("cat", "dog")).to_json(),
        "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    torch.save(content, tmp_path / "dcn.pth")
    done = cli("export", "--checkpoint", tmp_path / "dcn.pth", "--output", tmp_path / "a.onnx")
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1
    assert "What stands in the way is `dcn v2`: train without it." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dcn.pth"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "either --output FILE or --verify FILE"),
        (("--output", "a.xml"), "must end in .onnx"),
        (("--output", "a.onnx", "--val_images", "here"), "give both --val_images"),
        (
            ("--output", "a.onnx", "--postprocess", "--nms_iou", "0.7"),
            "--postprocess: NMS (nms_iou 0.7) cannot",
        ),
        (("--verify", "none.onnx"), "no such file"),
    ],
)
def test_wrong_use_is_one_line(
    cli: Cli, finished_run: Path, options: tuple[str, ...], reason: str
) -> None:
    done = cli("export", "--checkpoint", finished_run / "last.pth", *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr
