"""Other attention in the encoder, by the command line: a warning, and what fits no memory."""

from pathlib import Path

import pytest

from main import main
from tests.integration.conftest import TINY

COMMON = ("train", "--config", TINY, "--no_tensorboard", "--device", "cpu", "--max_steps", "2",
          "--eval_every", "9", "--dropout", "0.1")  # fmt: skip


def run(shapes: Path, folder: Path, *more: str) -> int:
    """Train two steps at most; return the exit code."""
    places = ("--coco_path", str(shapes), "--output_dir", str(folder))
    return main([*map(str, COMMON), *places, *more])


def test_levels_that_never_meet_are_named_and_it_trains(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(shapes, tmp_path / "dense", "--encoder_attn", "dense", "--no_probe") == 0
    printed = "".join(capsys.readouterr())
    assert "encoder_attn dense: no layer joins the 3 feature levels" in printed
    assert "Use dense+deformable" in printed
    assert run(shapes, tmp_path / "both", "--encoder_attn", "mswin+deformable", "--no_probe") == 0
    assert "no layer joins" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("attention", "remedy"),
    [("dense", "--batch_size, mswin or deformable"), ("dat+deformable", "a larger --dat_stride")],
)
def test_attention_weights_that_fit_no_memory_are_refused_before_the_first_step(
    attention: str, remedy: str, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = ("--train_scales", "8000", "--max_size", "16000", "--augment", "none")
    chosen = ("--eval_scale", "8000", "--encoder_attn", attention, "--no_probe")
    assert run(shapes, tmp_path / "run", *large, *chosen) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "encoder_attn" in line]
    assert "its attention weights take" in error
    assert "GiB for 4 images of " in error
    assert remedy in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
