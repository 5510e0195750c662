"""A run with a recipe: its options, its losses, its weights, and what is left of it afterwards."""

from pathlib import Path

import pytest
import torch
import yaml

from engine.detector import Detector
from main import main
from tests.integration.conftest import TINY, read_log, run_cli

KEY = "recipes.hybrid.query_embed.weight"
PLAIN = ("--no_two_stage", "--no_with_box_refine")


def test_hybrid_matching_trains_resumes_and_evaluates_alike(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_cli(
        "train", "--config", TINY, *PLAIN, "--coco_path", shapes, "--output_dir", folder,
        "--epochs", "1", "--recipes", "hybrid", "--num_queries_one2many", "9",
        "--k_one2many", "2", "--eval_every", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (log,) = read_log(folder)
    for name in ("loss_ce_one2many", "loss_giou_one2many_0", "loss_bbox_one2many_unscaled"):
        assert log[f"train_{name}"] > 0
        assert f"test_{name}" not in log
    config = yaml.safe_load((folder / "config.yaml").read_text())
    expected = {"num_queries_one2many": 9, "k_one2many": 2, "lambda_one2many": 1.0}
    assert config["recipes"] == {"hybrid": expected}

    first = torch.load(folder / "last.pth", weights_only=True)["model"][KEY]
    assert first.shape == (9, 2 * 32)
    done = run_cli("train", "--resume", folder / "last.pth", "--coco_path", shapes, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "train_loss_ce_one2many" in read_log(folder)[1]
    second = torch.load(folder / "last.pth", weights_only=True)["model"][KEY]
    assert second.shape == first.shape
    assert not torch.equal(second, first)

    detector = Detector.load(folder / "last.pth", device="cpu")
    torch.testing.assert_close(detector.model.state_dict()[KEY], second, rtol=0, atol=0)
    image = next((shapes / "val2017").iterdir())
    assert len(detector.predict(str(image), threshold=0.0)) == 100
    evaluated = tmp_path / "evaluated"
    done = run_cli("eval", "--checkpoint", folder / "last.pth", "--output_dir", evaluated)
    assert done.returncode == 0, done.stderr
    found, of_the_run = (f / "eval" / "detections.json" for f in (evaluated, folder))
    assert found.read_bytes() == of_the_run.read_bytes()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_recipes_and_a_new_one_may_drop_those_of_its_file(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--no_tensorboard", "--no_probe", "--device", "cpu", "--max_steps", "1"]
    new = ["train", "--config", TINY, "--coco_path", str(shapes), *common, "--output_dir"]
    folder = tmp_path / "run"
    flags = ["--recipes", "hybrid", "--k_one2many", "2", "--num_queries_one2many", "9"]
    assert main([*new, str(folder), *flags]) == 0
    for other in (["--recipes"], ["--recipes", "hybrid", "--k_one2many", "3"]):
        assert main(["train", "--resume", str(folder / "last.pth"), *other]) == 2
        assert "hybrid" in capsys.readouterr().err
    again = ["train", "--config", str(folder / "config.yaml"), "--recipes", "--output_dir"]
    assert main([*again, str(tmp_path / "plain")]) == 0
    assert "train_loss_ce_one2many" in read_log(folder)[-1]
    assert "train_loss_ce_one2many" not in read_log(tmp_path / "plain")[-1]
