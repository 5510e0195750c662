"""How long OpenMP's waiting threads spin is settled before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
REPORT = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("imported", "given", "expected"),
    [
        *(
            (module, {}, "10000 None")
            for module in (
                "main", "models.build", "datasets.build", "engine.trainer",
                "engine.commands.train", "tests.conftest",
            )
        ),
        ("engine.trainer", {"GOMP_SPINCOUNT": "7"}, "7 None"),
        ("engine.trainer", {"OMP_WAIT_POLICY": "PASSIVE"}, "None PASSIVE"),
    ],
)  # fmt: skip
def test_waiting_threads_spin_briefly_unless_the_user_decided(
    imported: str, given: dict[str, str], expected: str
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names} | given
    done = subprocess.run(
        [sys.executable, "-c", f"{REPORT}\nimport {imported}\nprint('no torch')"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() in (expected, "no torch"), done.stderr
