"""One training update stays short to read, as `tests/benchmarks/reading_path.py` counts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_one_update_of_the_plain_model_opens_few_files_and_lines() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.reading_path"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    frames = re.search(r"forward: (\d+)", done.stdout)
    update = re.search(r"one update: (\d+) files, (\d+) lines", done.stdout)
    assert frames is not None
    assert update is not None
    assert int(frames[1]) <= 6, done.stdout
    assert int(update[1]) <= 24, done.stdout
    assert int(update[2]) <= 2800, done.stdout
