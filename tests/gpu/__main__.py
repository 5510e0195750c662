"""Everything that waits for a GPU, in one command of at most eight minutes.

    make gpu                                    # python -m tests.gpu --output_dir runs/gpu
    make gpu DRY=1                              # every part on the CPU, at toy size
    python -m tests.gpu --parts op steps        # some parts
    python -m tests.gpu --official_op DIR       # beside the official kernel, built in DIR

The parts run one after the other, the ones that matter most first, each in a process of its own
that is killed at its limit. `results.jsonl` gets a line as soon as a figure is known, `log.txt`
all that was printed, and `summary.md` is written again after each part: a run that is cut off loses
nothing. `tests/gpu/README.md` says how to read them.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.gpu.results import DEADLINE, RESULTS, emit
from tests.gpu.summary import write_summary
from util.version import __version__

ROOT = Path(__file__).resolve().parents[2]
DRY_SLOWNESS = 4.0  # of a busy machine without a GPU: factor on all limits


@dataclass(frozen=True)
class Part:
    """A command and the seconds that it may take."""

    name: str
    seconds: float
    command: tuple[str, ...]
    dry_command: tuple[str, ...]


def _module(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    command = ("-m", f"tests.gpu.{name}")
    return command, (*command, "--dry")


_TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
PARTS = (
    Part("doctor", 60, ("main.py", "doctor"), ("main.py", "doctor")),
    Part("tests", 90, (*_TESTS, "tests"), (*_TESTS, "tests/unit/engine/guards")),
    Part("op", 70, *_module("op_times")),
    Part("steps", 130, *_module("step_times")),
    Part("training", 90, *_module("training")),
    Part("processes", 50, *_module("processes")),
    Part("profile", 40, *_module("profile")),
)


def main() -> int:
    """Run the command line; return 1 if a part failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--dry", action="store_true", help="on the CPU, at toy size")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts on a GPU")
    parser.add_argument("--parts", nargs="+", choices=[p.name for p in PARTS], metavar="PART")
    parser.add_argument("--official_op", type=Path, help="folder of the official op, built")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("error: no GPU that this PyTorch can use. Try the parts with `make gpu DRY=1`.")
        return 2
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    results.unlink(missing_ok=True)
    (folder / "log.txt").unlink(missing_ok=True)
    os.environ[RESULTS] = str(results)
    os.environ["PYTHONUNBUFFERED"] = "1"
    emit("machine", **machine())
    slowness = DRY_SLOWNESS if options.dry else 1.0
    end = time.time() + options.minutes * 60 * slowness
    more = ("--official_op", str(options.official_op)) if options.official_op else ()
    failed = False
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        command = part.dry_command if options.dry else part.command
        command = (*command, *(more if part.name == "op" else []))
        outcome = run(part.name, command, folder, min(end, time.time() + part.seconds * slowness))
        failed |= outcome != 0
        write_summary(results, folder / "summary.md")
    print(f"results: {folder / 'summary.md'}")
    return int(failed)


def run(name: str, command: Sequence[str], folder: Path, end: float) -> int | str:
    """Run a part until `end` at most; record its exit code, or why it has none."""
    start = time.time()
    limit = end - start
    if limit < 5:
        emit("part", name=name, outcome="no time left", seconds=0.0)
        return "no time left"
    environment = {**os.environ, DEADLINE: str(start + limit - 3)}
    outcome: int | str
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n===== {name}: python {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            outcome = process.wait(limit)
        except subprocess.TimeoutExpired:
            outcome = f"killed after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    emit("part", name=name, outcome=outcome, seconds=round(time.time() - start, 1))
    return outcome


def machine() -> dict[str, str]:
    """Return what every figure depends on."""
    described = {
        "deformable_detr": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        described["device"] = (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability "
            f"{card.major}.{card.minor}, {card.multi_processor_count} multiprocessors"
        )
    return described


if __name__ == "__main__":
    sys.exit(main())
