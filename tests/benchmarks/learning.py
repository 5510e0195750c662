"""Train a preset with several sets of switches from several seeds, and print what each reached.

    python -m datasets.shapes --output_dir data/shapes
    python -m tests.benchmarks.learning --config shapes_tiny --seeds 0 1 \
        --output_dir runs/learning --data "--coco_path data/shapes" \
        "" "--num_denoising 50" "--mixed_query_selection --look_forward_twice"

Each set of switches is what one would add to the command line of `train`; an empty one is the
preset alone. `--data` goes to `train` and `eval`, `--train` to `train` alone. Every run has a
folder under `--output_dir`. A run that is there is not repeated, one that was interrupted goes on,
so that another call with more switches adds rows. Weights are those after the last epoch.

AP is that of the validation images, with every detection kept and with overlaps of one class above
0.7 suppressed. All runs take equally many steps, unless a switch changes that. For equal minutes,
multiply steps by the step times of `tests.benchmarks.recipe_steps`, which takes them by turns on a
quiet machine. The seconds that runs took here would say little on a busy one.
"""

import argparse
import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

NMS = {"every": "1", "nms": "0.7"}  # folder of an evaluation, and its --nms_iou
COLUMNS = ("AP", "AP50", "AP_small", "AP_medium", "AP_large")


def name_of(switches: str, seed: int) -> str:
    """Return the folder of a run: readable, and of its own for each set of switches."""
    words = re.sub(r"[^A-Za-z0-9.]+", "_", switches.replace("--", "")).strip("_")[:60] or "preset"
    return f"{words}-{hashlib.sha256(switches.encode()).hexdigest()[:6]}-seed{seed}"


def run(folder: Path, switches: str, seed: int, options: argparse.Namespace) -> None:
    """Train and evaluate, as far as it has not been done."""
    main = [sys.executable, "main.py"]
    last = folder / "last.pth"
    if not (folder / "trained").exists():
        words = ["train", "--resume", str(last)]
        if not last.exists():
            words = ["train", "--config", options.config, "--output_dir", str(folder)]
            words += ["--seed", str(seed), *shlex.split(f"{options.data} {options.train}")]
            words += shlex.split(switches)
        subprocess.run([*main, *words], check=True, stdout=subprocess.DEVNULL)
        (folder / "trained").touch()
    for kind, overlap in NMS.items():
        if not (folder / kind / "eval/results.json").exists():
            words = ["eval", "--checkpoint", str(last), "--output_dir", str(folder / kind)]
            words += ["--nms_iou", overlap, *shlex.split(options.data)]
            subprocess.run([*main, *words], check=True, stdout=subprocess.DEVNULL)


def row(folder: Path, switches: str, seed: int) -> str:
    """Return a run's line of the table."""
    stats = {}
    for kind in NMS:
        stats[kind] = json.loads((folder / kind / "eval/results.json").read_text())["stats"]
    every = [f"{stats['every'][key]:.3f}" for key in COLUMNS]
    suppressed = [f"{stats['nms'][key]:.3f}" for key in COLUMNS[:2]]
    lines = (folder / "log.txt").read_text().splitlines()
    steps = sum(json.loads(line).get("train_steps", 0) for line in lines)
    return " | ".join([f"| `{switches}`", str(seed), str(steps), *every, *suppressed]) + " |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("switches", nargs="*", default=[""], help="options added to the preset")
    parser.add_argument("--config", required=True, help="preset")
    parser.add_argument("--data", default="", help="options of the data, for train and eval")
    parser.add_argument("--train", default="", help="options of every training run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    print("| switches | seed | steps | " + " | ".join(COLUMNS) + " | AP, NMS 0.7 | AP50, NMS 0.7 |")
    print("|---|" + "--:|" * (len(COLUMNS) + 4), flush=True)
    for seed in options.seeds:
        for switches in options.switches:
            folder = options.output_dir / name_of(switches, seed)
            run(folder, switches, seed, options)
            print(row(folder, switches, seed), flush=True)


if __name__ == "__main__":
    main()
