"""Old commit and new, side by side: the same numbers to the last bit.

    git worktree add ../old 10a4dea
    python -m tests.benchmarks.same_numbers --old ../old [--checkpoint FILE --coco_path DIR]

Runs the command line of both checkouts by turns, with fresh data, and compares every value of
every step (times aside), the weights, averages and optimiser state at the end, and what
evaluation finds. With `--checkpoint`, also `eval` of that file in both, to the last digit.
Exit code 1 names what differs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parents[2]
TINY = "tests/integration/tiny.yaml"
EFFICIENTNET = ("--backbone", "timm/test_efficientnet")
PLAIN = ("--no_two_stage", "--no_with_box_refine")
RUNS: dict[str, tuple[str, ...]] = {
    "two-stage, dropout, averages": ("--ema_decay", "0.9", "--dropout", "0.1"),
    "plain, resnet18, trained norms": (*PLAIN, "--backbone", "resnet18"),
    "refine, accumulation": ("--no_two_stage", "--effective_batch_size", "8", "--batch_size", "2"),
    "bfloat16, official augmentation": ("--precision", "bf16", "--random_crop", *EFFICIENTNET),
    "checkpointing, mosaic, mixup": (
        "--activation_checkpointing", "encoder", "decoder", "--augment", "strong",
        "--mosaic", "0.5", "--mixup", "0.5", "--close_augment_epochs", "0", *EFFICIENTNET,
    ),
}  # fmt: skip
NEW_KEYS = ("config", "versions")  # of a checkpoint, allowed to differ


def run(tree: Path, *words: str) -> None:
    """Run a tree's command line; print what it said if it failed."""
    done = subprocess.run(
        [sys.executable, "main.py", *words], cwd=tree, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(words)}\n{done.stdout}{done.stderr}")


def lines(path: Path) -> list[dict[str, Any]]:
    """Return a log's lines without times."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in e.items() if "time" not in k and "seconds" not in k} for e in entries]


def differences(a: Any, b: Any, place: str) -> list[str]:
    """Return the places where two nested values differ in any bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        differing = [f"{place}.{key} (in one only)" for key in sorted(a.keys() ^ b.keys(), key=str)]
        return differing + [
            d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{place}.{k}")
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{place}[{i}]")]
    return [] if a == b or (a != a and b != b) else [f"{place}: {a!r:.60} and {b!r:.60}"]


def compare_runs(old: Path, new: Path) -> list[str]:
    """Compare logs, checkpoints and evaluation of two run folders."""
    found = []
    for name in ("metrics.jsonl", "log.txt"):
        found += differences(lines(old / name), lines(new / name), name)
    states = [torch.load(folder / "last.pth", weights_only=True) for folder in (old, new)]
    for state in states:
        del state["progress"]["seconds"]
        for key in NEW_KEYS:
            del state[key]
    found += differences(states[0], states[1], "last.pth")
    for name in ("results.json", "detections.json"):
        a, b = (json.loads((folder / "eval" / name).read_text()) for folder in (old, new))
        found += differences(a, b, f"eval/{name}")
    return found


def main() -> int:
    """Compare, print, and return the exit code."""
    parser = argparse.ArgumentParser(description="compare two checkouts number by number")
    parser.add_argument("--old", type=Path, required=True, help="checkout of the old commit")
    parser.add_argument("--steps", type=int, default=30, help="training steps of each run")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--checkpoint", type=Path, help="also evaluate this file")
    parser.add_argument("--coco_path", help="its validation data")
    options = parser.parse_args()
    trees = {"old": options.old.resolve(), "new": HERE}
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make = "import sys; from pathlib import Path; from datasets.shapes import generate_shapes; "
        make += "generate_shapes(Path(sys.argv[1]), num_train=16, num_val=7, seed=0)"
        subprocess.run([sys.executable, "-c", make, folder / "shapes"], cwd=HERE, check=True)
        for name in options.runs:
            outputs = {side: folder / f"{side} {name}" for side in trees}
            for side, tree in trees.items():
                run(
                    tree, "train", "--config", TINY, "--coco_path", str(folder / "shapes"),
                    "--output_dir", str(outputs[side]), "--epochs", "30", "--max_steps",
                    str(options.steps), "--eval_every", "3", "--device", "cpu", *RUNS[name],
                )  # fmt: skip
            found = compare_runs(outputs["old"], outputs["new"])
            failed = failed or bool(found)
            print(
                f"{name}: " + ("\n    ".join(["DIFFERS", *found[:20]]) if found else "same"),
                flush=True,
            )
        if options.checkpoint:
            results = []
            for side, tree in trees.items():
                run(
                    tree, "eval", "--checkpoint", str(options.checkpoint.resolve()), "--coco_path",
                    str(Path(options.coco_path).resolve()), "--output_dir", str(folder / side),
                )  # fmt: skip
                files = ("results.json", "detections.json", "analysis.json")
                results.append(
                    [json.loads((folder / side / "eval" / f).read_text()) for f in files]
                )
            found = differences(results[0], results[1], "eval")
            failed = failed or bool(found)
            print(f"eval: {'; '.join(found[:20]) or 'same'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
