"""`make gpu DRY=1`: every part of the run on a GPU, on the CPU, so that no line of it is new."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.__main__ import PARTS
from tests.integration.conftest import ROOT


def test_every_part_runs_and_leaves_its_figures(tmp_path: Path) -> None:
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST")}
    command = [sys.executable, "-m", "tests.gpu", "--dry", "--output_dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert ended.returncode == 0, ended.stdout + log
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    outcomes = {row["name"]: row["outcome"] for row in rows if row["part"] == "part"}
    assert outcomes == {part.name: 0 for part in PARTS}
    parts = {row["part"] for row in rows}
    assert parts >= {"machine", "op", "steps", "training", "processes", "profile"}
    assert not [row for row in rows if "error" in row]
    summary = (tmp_path / "summary.md").read_text()
    assert "nan" not in summary
    assert all(part.name in summary for part in PARTS)
