"""`benchmark` as a user runs it."""

import json
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import TINY, Cli

SMALL = """\
model:
  backbone: resnet18
  hidden_dim: 32
  nheads: 4
  enc_layers: 1
  dec_layers: 2
  dim_feedforward: 64
  num_queries: 20
  with_box_refine: false
"""


def test_a_checkpoint_on_its_images(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    checkpoint = finished_run / "last.pth"
    done = cli("benchmark", "--checkpoint", checkpoint, "--input", shapes / "val2017", "--runs",
               "2", "--warm_up", "1", "--batch_sizes", "1", "3", "--precision", "fp32", "bf16",
               "--threads", "1", "--device", "cpu", "--output", report)  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["machine"]["threads"] == 1
    assert content["images"] == 7
    weights = torch.load(checkpoint, weights_only=True)["model"]
    # norms of the backbone are frozen: they are no parameters
    parameters = sum(part["parameters"] for part in content["parts"].values())
    assert 0 < parameters <= sum(tensor.numel() for tensor in weights.values())
    assert [(row["precision"], row["batch_size"]) for row in content["forward"]] == [
        ("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 3)
    ]  # fmt: skip
    for row in content["forward"]:
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["images_per_second"] == pytest.approx(
            1000 * row["batch_size"] / row["median_ms"]
        )
    for words in ("backbone", "GFLOPs per image", "post-processing", "images/s", "1 threads",
                  f"torch {torch.__version__}"):  # fmt: skip
        assert words in done.stdout, words


@pytest.mark.long
def test_beside_hugging_faces_model_with_the_same_weights(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    report = tmp_path / "report.json"
    done = cli("benchmark", "--config", tmp_path / "small.yaml", "--size", "96x128", "--runs", "2",
               "--warm_up", "1", "--num_labels", "5", "--against", "hugging_face", "--device",
               "cpu", "--output", report)  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert content["size"] == [96, 128]
    assert content["images"] == "generated"
    (row,) = content["hugging_face"]
    assert row["largest_difference_of_scores"] < 1e-5
    assert row["times_as_fast"] == pytest.approx(
        row["theirs"]["median_ms"] / row["ours"]["median_ms"]
    )
    assert "times as fast" in done.stdout


def export(cli: Cli, checkpoint: Path, output: Path, kind: str) -> Path:
    done = cli("export", "--checkpoint", checkpoint, "--to", kind, "--output", output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_an_exported_file_beside_its_checkpoint_and_alone(
    cli: Cli, finished_run: Path, shapes: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint, report = finished_run / "last.pth", tmp_path / "report.json"
    file = export(cli, checkpoint, tmp_path / "tiny.onnx", "onnx")
    common = ("--input", shapes / "val2017", "--runs", "2", "--warm_up", "1", "--batch_sizes", "1",
              "2", "--device", "cpu", "--output", report)  # fmt: skip
    done = cli("benchmark", "--checkpoint", checkpoint, "--exported", file, *common)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["exported"]
    assert [row["batch_size"] for row in rows] == [1, 2]
    for row in rows:
        found = row["files"]["tiny.onnx"]
        assert found["runtime"].startswith("onnxruntime ")
        assert 0 < found["median_ms"] <= found["p95_ms"]
        assert found["times_as_fast"] == pytest.approx(
            row["checkpoint"]["median_ms"] / found["median_ms"]
        )
        assert found["largest_difference_of_scores"] < 1e-4
    assert "tiny.onnx" in done.stdout
    done = cli("benchmark", "--checkpoint", file, *common)
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert content["parts"] == {}
    assert content["machine"]["attention_backend"].startswith("onnxruntime ")
    assert [row["batch_size"] for row in content["forward"]] == [1, 2]
    assert set(content["stages"]) == {
        "precision", "decode", "preparation", "model", "post-processing"
    }  # fmt: skip
    for options, words in (
        (("--checkpoint", file, "--precision", "bf16"), "an exported file computes as it was"),
        (("--checkpoint", checkpoint, "--exported", checkpoint), "is not an exported file"),
        (("--config", TINY, "--exported", file), "has other classes than the checkpoint"),
    ):
        done = cli("benchmark", *options, "--device", "cpu")
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_files_of_several_runtimes_are_timed_in_turn(
    cli: Cli, finished_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    checkpoint, report = finished_run / "last.pth", tmp_path / "report.json"
    files = [
        export(cli, checkpoint, tmp_path / name, kind)
        for name, kind in (("tiny.xml", "openvino"), ("tiny.pt2", "torch_export"))
    ]
    done = cli("benchmark", "--checkpoint", checkpoint, "--exported", *files, "--runs", "2",
               "--warm_up", "1", "--size", "96x128", "--device", "cpu",
               "--output", report)  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((row,), names) = (json.loads(report.read_text())["exported"], ("tiny.xml", "tiny.pt2"))
    assert tuple(row["files"]) == names
    for name, runtime in zip(names, ("openvino", "torch.export"), strict=True):
        assert row["files"][name]["runtime"].startswith(runtime)
        assert row["files"][name]["largest_difference_of_scores"] < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "benchmark: give either --checkpoint FILE or --config FILE."),
        (["--config", TINY, "--size", "5x5"], "--size: must be HEIGHTxWIDTH in pixels"),
        (["--config", "auto"], "--config auto: works with `train` and `plan` only."),
        (["--config", TINY, "--precision", "fp8"], "--precision: must be one of fp32, tf32, bf16"),
        (["--config", TINY, "--input", "nowhere.png"], "nowhere.png: no image, folder or pattern"),
    ],
)
def test_a_mistake_is_one_line(cli: Cli, options: list[str], message: str) -> None:
    done = cli("benchmark", *options, "--device", "cpu")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
