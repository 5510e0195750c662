"""A run with a recipe: its options, its losses, its weights, and what is left of it afterwards."""

from pathlib import Path

import pytest
import torch
import yaml

from engine.detector import Detector
from main import main
from tests.integration.conftest import TINY, read_log, run_cli
from tests.integration.runs import Command, assert_same_runs, metrics

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
    assert config["recipes"] == {"hybrid": {**expected, "hybrid_proposals": False}}

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


@pytest.mark.slow
def test_denoising_killed_and_resumed_ends_as_if_nothing_had_happened(
    reference_options: tuple[str | Path, ...], tmp_path: Path
) -> None:
    options = (*reference_options, "--num_denoising", "10")
    whole, command = (Command(tmp_path / name, options) for name in ("whole", "run"))
    running = command.start()
    running.wait_until((command.folder / "last.pth").exists)
    running.kill()
    command.run("--resume", "auto")
    whole.run()
    assert_same_runs(command.folder, whole.folder)
    assert metrics(whole.folder)[0]["loss_giou_dn_0"] > 0


def test_an_option_of_denoising_chooses_it_and_0_leaves_it_out(
    shapes: Path, tmp_path: Path
) -> None:
    new = ("train", "--config", TINY, "--coco_path", shapes, "--max_steps", "1", "--output_dir")
    done = run_cli(*new, tmp_path / "one", "--dn_label_noise", "0.4", "--no_dn_contrast")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    assert config["recipes"] == {"denoising": {
        "num_denoising": 100, "dn_label_noise": 0.4, "dn_box_noise": 1.0, "dn_contrast": False,
    }}  # fmt: skip
    assert "train_loss_ce_dn" in read_log(tmp_path / "one")[-1]
    assert not any("_dn" in name for name in read_log(tmp_path / "one")[-1] if "test" in name)
    again = ("train", "--config", tmp_path / "one" / "config.yaml", "--num_denoising", "0")
    done = run_cli(*again, "--output_dir", tmp_path / "none")
    assert done.returncode == 0, done.stderr
    assert "train_loss_ce_dn" not in read_log(tmp_path / "none")[-1]
    weights = torch.load(tmp_path / "none" / "last.pth", weights_only=True)["model"]
    assert not any(name.startswith("recipes") for name in weights)
