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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "benchmark: give either --checkpoint FILE or --config FILE."),
        (["--config", TINY, "--size", "5x5"], "--size: must be HEIGHTxWIDTH in pixels"),
        (["--config", "auto"], "--config auto: is of `train` and `plan`."),
        (["--config", TINY, "--precision", "fp8"], "--precision: must be one of fp32, tf32, bf16"),
        (["--config", TINY, "--input", "nowhere.png"], "nowhere.png: no image, folder or pattern"),
    ],
)
def test_a_mistake_is_one_line(cli: Cli, options: list[str], message: str) -> None:
    done = cli("benchmark", *options, "--device", "cpu")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
