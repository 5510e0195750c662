"""The comparison of trained relatives: its models build; one command trains and draws."""

import sys
from pathlib import Path

import pytest

from models.build import build_model
from tests.benchmarks import relatives
from tests.benchmarks.recipe_steps import config_of
from tests.integration.conftest import TINY


@pytest.mark.long
@pytest.mark.parametrize("name", relatives.MODELS)
def test_switches_of_every_model_are_accepted(name: str) -> None:
    config = config_of("shapes_tiny", relatives.MODELS[name])
    model = build_model(config.model, num_classes=3, recipes=config.recipes)
    levels, two_stage = len(model.input_proj), model.transformer.two_stage
    assert levels == (1 if "one level" in name else 3)
    assert two_stage == (relatives.PLAIN not in relatives.MODELS[name])


@pytest.mark.slow
def test_one_command_trains_what_is_left_and_draws(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["relatives", "--output_dir", str(tmp_path), "--epochs", "1", "--config", TINY]
    words += ["--data", "drawn", f"--coco_path {shapes}", "--rounds", "1"]
    words += ["--plot", str(tmp_path / "plot.png"), "--models", "DETR, one level"]
    tables: list[list[str]] = []
    before: dict[Path, int] = {}
    for models in ([], ["HS-FPN"]):  # the second call adds one
        words += models
        monkeypatch.setattr(sys, "argv", words)
        relatives.main()
        tables.append(capsys.readouterr().out.splitlines())
        logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("drawn/*/metrics.jsonl")}
        assert before.items() < logs.items()  # what was done is not repeated
        before = logs
    assert len(before) == 2
    rows = [[line for line in table if line.startswith("| `")] for table in tables]
    assert [len(lines) for lines in rows] == [1, 2]
    assert rows[1][0].split(" | ")[:8] == rows[0][0].split(" | ")[:8]
    assert rows[0][0].split(" | ")[2] == "4"  # steps
    assert (tmp_path / "plot.png").stat().st_size > 1000
