"""Time training steps by how long waiting OpenMP threads spin, alone and beside busy processes.

    python -m tests.benchmarks.spinning
    python -m tests.benchmarks.spinning --config configs/finetune_small.yaml
    python -m tests.benchmarks.spinning --config configs/deformable_detr_r50.yaml --seconds 40 \
        --rounds 1 --batch_size 1 --effective_batch_size 1 --train_scales 320 --max_size 427

Every run is `main.py train` in a separate process, stopped after some seconds; `metrics.jsonl` then
has the seconds and the loss of each step. The busy processes start when the training does. The
settings take turns within a round, with one thread per core. Our default is also run with a core
left to each loader process. Other options are passed to `train`. Prints a Markdown table, and
whether the losses are equal to the last digit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = {
    # libgomp's own default, set because `main.py` would set another
    "neither set": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (1000, 10000, 100000)},
}
DEFAULT = "GOMP_SPINCOUNT=10000"
WARM_UP = 1  # steps

Step = dict[str, Any]


def run_steps(
    options: argparse.Namespace, data: str, setting: str, threads: int, busy: int
) -> list[Step]:
    """Train in a separate process beside `busy` others; return the steps after the warm-up."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    environment |= {"OMP_NUM_THREADS": str(threads), **SETTINGS[setting]}
    with tempfile.TemporaryDirectory() as folder:
        folder_of_run, output = Path(folder, "run"), Path(folder, "output.txt")
        command = [
            sys.executable, "main.py", "train", "--config", options.config, "--coco_path", data,
            "--output_dir", str(folder_of_run), "--num_workers", str(options.num_workers),
            "--backbone_weights", "none", *options.train,
        ]  # fmt: skip
        with output.open("wb") as file:
            run = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        others: list[subprocess.Popen[bytes]] = []
        try:
            while not (folder_of_run / "config.yaml").exists():  # written when training begins
                if run.poll() is not None:
                    raise SystemExit(f"{' '.join(command)}\n{output.read_text()[-2000:]}")
                time.sleep(0.1)
            others += [
                subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(busy)
            ]
            time.sleep(options.seconds)
        finally:
            for process in (run, *others):  # the last step ends beside them, too
                process.terminate()
                process.wait()
        metrics = folder_of_run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line) for line in lines][WARM_UP:]


def measure(options: argparse.Namespace, data: str) -> None:
    """Run every setting by turns and print the table."""
    cores = len(os.sched_getaffinity(0))
    spared = max(1, cores - options.num_workers)
    runs = [(setting, cores) for setting in SETTINGS]
    if spared != cores:
        runs.append((DEFAULT, spared))
    seconds: dict[tuple[str, int, int], list[float]] = {}
    losses: dict[int, list[list[float]]] = {}
    for _ in range(options.rounds):
        for busy in options.busy:
            for setting, threads in runs:
                steps = run_steps(options, data, setting, threads, busy)
                seconds.setdefault((setting, threads, busy), []).extend(s["time"] for s in steps)
                losses.setdefault(threads, []).append([s["loss"] for s in steps])
                times = " ".join(f"{s['time']:.3f}" for s in steps)
                print(
                    f"{setting}, {threads} threads, {busy} busy processes: {times}",
                    file=sys.stderr,
                    flush=True,
                )
    print(f"`{options.config}`, {cores} cores, {options.num_workers} loader processes: seconds")
    print("(median and 90th percentile) of a training step\n")
    heads = [f"beside {busy} busy processes" if busy else "alone" for busy in options.busy]
    print(f"| setting | threads | {' | '.join(f'{head} | 90 %' for head in heads)} |")
    print("|---|--:|" + "--:|--:|" * len(heads))
    for setting, threads in runs:
        cells = [setting, str(threads)]
        for busy in options.busy:
            values = seconds[setting, threads, busy]
            if values:
                cells += [f"{np.median(values):.3f}", f"{np.percentile(values, 90):.3f}"]
            else:
                cells += [f"no second step in {options.seconds:g} s", ""]
        print(f"| {' | '.join(cells)} |")
    for threads, found in losses.items():
        # as many as the slowest run has that came to a second step
        steps_of_all = zip(*(run for run in found if run), strict=False)
        equal = all(len(set(values)) == 1 for values in steps_of_all)
        words = "equal to the last digit" if equal else "DIFFERENT"
        print(f"\nLosses of all runs with {threads} threads: {words}.")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/shapes_tiny.yaml")
    parser.add_argument("--coco_path", help="COCO-format data; default: generated shapes")
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0, 2], help="busy processes beside the training"
    )
    parser.add_argument("--seconds", type=float, default=10, help="how long each run trains")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num_workers", type=int, default=1, help="loader processes")
    options, rest = parser.parse_known_args()
    options.train = rest
    with tempfile.TemporaryDirectory() as folder:
        if not options.coco_path:
            command = [sys.executable, "-m", "datasets.shapes", "--output_dir", folder]
            counts = ["--num_train", "400", "--num_val", "8"]
            subprocess.run([*command, *counts], check=True, stdout=subprocess.DEVNULL)
        measure(options, options.coco_path or folder)


if __name__ == "__main__":
    main()
