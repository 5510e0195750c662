"""Runs side by side: what their logs say, in a table and on a page."""

import json
import re
from pathlib import Path

import pytest

from engine.comparison import differing_options, page, ranked, read_run, table
from main import main
from util.errors import DataError
from util.files import short_names


def write_run(
    folder: Path, aps: list[float | None], *, lr: float, ema: float | None = None
) -> Path:
    """Write the log and options of a run with an AP per epoch, None where nothing was evaluated."""
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w") as file:
        for epoch, ap in enumerate(aps):
            entry: dict[str, object] = {
                "epoch": epoch,
                "train_loss": 10.0 - epoch,
                "train_seconds": 1800.0,
            }
            if ap is not None:
                entry["test_coco_eval_bbox"] = [ap, ap + 0.2, ap + 0.1, -1, 0.3, 0.4, *[0.5] * 6]
            if ap is not None and ema is not None:
                entry["ema_test_coco_eval_bbox"] = [ap + ema, *[0.6] * 11]
            file.write(json.dumps(entry) + "\n")
        file.write('{"epoch": 9, "train_')  # killed while writing
    (folder / "config.yaml").write_text(
        f"optim:\n  lr: {lr}\n  epochs: 3\nrun:\n  output_dir: {folder}\n"
        + ("recipes:\n  denoising: {num_denoising: 100}\n" if ema else "")
    )
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "a" / "run", [0.1, 0.3, 0.3], lr=1e-4),
        write_run(tmp_path / "b" / "run", [None, 0.35, 0.2], lr=2e-4, ema=0.05),
        write_run(tmp_path / "c" / "<i>", [None, None], lr=1e-4),
    ]


def test_a_run_is_taken_at_its_best_epoch(folders: list[Path]) -> None:
    names = short_names(folders)
    assert names == ["a/run", "b/run", "c/<i>"]
    first, second, third = (read_run(f, n) for f, n in zip(folders, names, strict=True))
    assert (first.best, first.epochs, first.seconds) == (2, 3, 5400.0)  # the first one of equals
    assert first.results[2] == pytest.approx(
        {"AP": 0.3, "AP50": 0.5, "AP75": 0.4, "AP_medium": 0.3, "AP_large": 0.4}
    )
    assert second.best == 2
    assert second.results[2]["AP"] == pytest.approx(0.4), "of the averaged weights"
    assert second.losses == {1: 10.0, 2: 9.0, 3: 8.0}
    assert third.best is None
    runs = [third, first, second]
    assert [run.name for run in ranked(runs)] == ["b/run", "a/run", "c/<i>"]
    assert differing_options(runs) == {
        "lr": ["0.0001", "0.0001", "0.0002"], "denoising.num_denoising": ["", "", "100"],
    }  # fmt: skip
    rows = [line.split() for line in table(runs).splitlines()]
    assert rows[1][:5] == ["b/run", "3", "2", "0.400", "0.600"]
    assert rows[2][:7] == ["a/run", "3", "2", "0.300", "0.500", "0.400", "n/a"]
    assert rows[3][1:4] == ["2", "n/a", "n/a"]


def test_the_page_needs_nothing_else_and_escapes_names(folders: list[Path]) -> None:
    text = page([read_run(f, n) for f, n in zip(folders, short_names(folders), strict=True)])
    assert "<i>" not in text
    assert text.count("<svg") == 3
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "denoising.num_denoising" in text
    alone = page([read_run(folders[0], "a")])
    assert "<p>1 run." in alone
    assert "Options" not in alone, "nothing to differ from"


def test_one_name_is_as_long_as_it_takes() -> None:
    assert short_names([Path("runs/a"), Path("runs/b/")]) == ["a", "b"]
    assert short_names([Path("x/a/b"), Path("y/a/b")]) == ["x/a/b", "y/a/b"]


def test_folders_without_a_log_are_one_line_errors(tmp_path: Path, folders: list[Path]) -> None:
    with pytest.raises(DataError, match="cannot read its log.txt"):
        read_run(tmp_path, "none")
    (folders[0] / "log.txt").write_text("")
    with pytest.raises(DataError, match="has no epoch yet"):
        read_run(folders[0], "a")
    (folders[1] / "config.yaml").write_text("a: [")
    with pytest.raises(DataError, match="config.yaml: cannot be read"):
        read_run(folders[1], "b")


def test_the_command_prints_a_table_and_writes_the_page(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "--runs", *map(str, folders[:2])]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert "b/run" in capsys.readouterr().out
    assert (tmp_path / "out" / "compare.html").read_text().startswith("<!doctype html>")
    assert main(["compare"]) == 2
    assert "--runs: give the folders" in capsys.readouterr().err
