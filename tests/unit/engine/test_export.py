"""What `export` says and decides, with stand-ins for the model and its file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.detection import DetectionOptions
from configs.schema import DataConfig
from configs.tiles import TileOptions
from engine.commands import export
from engine.exported.about import About
from engine.exported.model import ExportedModel
from engine.exported.proof import Differences
from util.classes import Classes
from util.errors import CheckpointError, ConfigError, DataError

CLASSES = Classes((1, 2), ("cat", "dog"))
PLACE = {"val_images": "images", "val_annotations": "truth.json"}


def about(precision: str) -> About:
    """Return what a file says about itself."""
    return About(
        classes=CLASSES, data={}, mean=(0.5,) * 3, std=(0.5,) * 3, thresholds={}, batch_size=1,
        num_queries=9, finished=False, num_select=9, precision=precision,
    )  # fmt: skip


def stand_ins(
    monkeypatch: pytest.MonkeyPatch, *, precision: str, found: Differences, data: bool = True
) -> None:
    """Have a checkpoint, with or without data to validate on, and a file that differs so much."""

    def validation_set(options: DataConfig) -> object:
        if not (data or options.val_images):
            raise DataError("val data: no option says where it is.")
        return object()

    detector = SimpleNamespace(
        model=object(), classes=CLASSES, data=DataConfig(), mean=(0.5,) * 3, std=(0.5,) * 3,
        thresholds={}, batch_size=1, network=SimpleNamespace(num_queries=9), tiles=TileOptions(),
        validation_set=validation_set,
        measure=lambda truth: (SimpleNamespace(stats={"AP": 0.5}), None),
    )  # fmt: skip
    session: Any = SimpleNamespace(runtime="a runtime")
    file = SimpleNamespace(
        network=ExportedModel(session, about(precision)), evaluate=lambda *place: {"AP": 0.501}
    )

    def load(name: str, **options: Any) -> Any:
        return file if name.endswith(".onnx") else detector

    monkeypatch.setattr(export, "Detector", SimpleNamespace(load=load))
    monkeypatch.setattr(export, "prove", lambda *given: found)
    monkeypatch.setattr(export, "prepared_images", lambda *given: [])
    monkeypatch.setattr(export, "halved", lambda model: (model, 1))


def run(**options: Any) -> int:
    """Run the command."""
    given = export.ExportOptions(checkpoint="a.pth", **options)
    return export.main(given, DetectionOptions())


@pytest.mark.parametrize(
    ("precision", "options", "boxes", "code", "said"),
    [
        ("fp32", {"tolerance": 1.0}, 0.9, 0, "boxes 0.9; tolerance 1"),
        ("fp32", {}, 0.9, export.FAILED, "boxes 0.9; tolerance 0.0001"),
        # corners of selected boxes lie beyond the image, so they may be further apart than 1
        ("fp16", {}, 1.4, 0, "boxes 1.4; AP decides"),
        ("fp16", {"tolerance": 1.0}, 1.4, export.FAILED, "boxes 1.4; tolerance 1"),
        ("fp16", {}, float("inf"), export.FAILED, "differs too much"),
    ],
)
def test_ap_decides_only_where_it_is_measured_and_nothing_else_limits(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    options: dict[str, Any],
    boxes: float,
    code: int,
    said: str,
) -> None:
    found = Differences(scores=0.1, boxes=boxes, compared=5, images=1)
    stand_ins(monkeypatch, precision=precision, found=found)
    assert run(verify="a.onnx", **options) == code
    out = capsys.readouterr().out
    assert said in out
    assert ("AP: 0.5000" in out) == (precision == "fp16" and code == 0)


@pytest.mark.parametrize("option", ["output", "verify"])
def test_half_precision_without_data_is_an_error_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    stand_ins(monkeypatch, precision="fp16", found=Differences(), data=False)
    for name in ("write", "prove"):
        monkeypatch.setattr(export, name, lambda *given: pytest.fail("too early"))
    path = tmp_path / "folder" / "a.onnx"
    with pytest.raises(ConfigError, match="proven by AP.* Give `val_images` and"):
        run(**{option: str(path)}, precision="fp16")
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("chosen", "precision", "hint"),
    [
        ({"dcn": "v2"}, "fp16", "What stands in the way is `dcn v2`: train without it."),
        ({"dcn": "v2"}, "fp32", "What stands in the way is `dcn v2`: train without it."),
        ({}, "fp16", "Try `precision fp32`."),
        ({}, "fp32", "Try another version of PyTorch."),
    ],
)
def test_the_hint_names_what_stands_in_the_way_in_any_precision(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    chosen: dict[str, Any],
    precision: str,
    hint: str,
) -> None:
    def fail(*given: Any) -> None:
        raise CheckpointError("onnx: cannot be exported.")

    stand_ins(monkeypatch, precision=precision, found=Differences())
    monkeypatch.setattr(export, "write", fail)
    source = SimpleNamespace(model_options=chosen)
    monkeypatch.setattr(export, "load_pretrained", lambda name: source)
    with pytest.raises(CheckpointError) as caught:
        run(output=str(tmp_path / "a.onnx"), precision=precision, **PLACE)
    assert str(caught.value) == f"onnx: cannot be exported. {hint}"
