"""A recipe by its name: trained, saved with its options, resumed, and left out of evaluation."""

from pathlib import Path

import pytest
import torch
import yaml

from main import main
from tests.integration.conftest import TINY, read_log

COMMON = ("--num_workers", "0", "--no_tensorboard", "--no_probe", "--device", "cpu")


@pytest.mark.slow
def test_a_recipe_from_the_command_line(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    new = ["train", "--config", TINY, "--coco_path", str(shapes), *COMMON, "--output_dir"]
    flags = ["--recipes", "one_to_many", "--k_one2many", "2", "--num_queries_one2many", "9"]
    assert main([*new, str(folder), "--epochs", "1", "--max_steps", "1", *flags]) == 0
    saved = yaml.safe_load((folder / "config.yaml").read_text())["recipes"]
    assert saved == {
        "one_to_many": {"num_queries_one2many": 9, "k_one2many": 2, "lambda_one2many": 1.0}
    }
    content = torch.load(folder / "last.pth", weights_only=True)
    assert content["config"]["recipes"] == saved
    checkpoint = str(folder / "last.pth")
    capsys.readouterr()
    assert main(["train", "--resume", checkpoint, "--recipes"]) == 2
    assert "one_to_many" in capsys.readouterr().err
    assert main(["train", "--resume", checkpoint, "--max_steps", "0", *COMMON]) == 0
    assert "train_loss_ce_one2many" in read_log(folder)[-1]
    assert main(["eval", "--checkpoint", checkpoint, "--no_analysis", "--device", "cpu"]) == 0
    # the resolved file is a config, whose recipe the command line may turn off
    again = ["train", "--config", str(folder / "config.yaml"), "--output_dir"]
    assert main([*again, str(tmp_path / "plain"), "--max_steps", "1", "--recipes"]) == 0
    assert "train_loss_ce_one2many" not in read_log(tmp_path / "plain")[-1]
