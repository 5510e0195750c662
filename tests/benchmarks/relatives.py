"""Train the relatives of deformable attention for equal times, and compare what they find.

    python -m tests.benchmarks.relatives --output_dir runs/relatives --minutes 10 --seeds 0 1 \
        --plot relatives.png

Models are the preset `shapes_tiny` with the switches of `MODELS`, each beside the model that it is
to be compared with. Data are generated: `shapes`, and `small`, whose objects all are. Every run has
a folder under `--output_dir`. The same command goes on where an earlier one was interrupted; runs
that are done are not repeated. With `--epochs N` in place of `--minutes` runs take equal steps.

A run of M minutes times its first steps, and its learning rate falls over as many steps as fit
(`--max_hours`): let nothing else run beside it, or the same all the time. AP is that of the
validation images after the last step. Step times are medians of all models by turns; memory is the
peak of a process that makes two steps; multiplications are those of a forward pass of one image.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from datasets.shapes import generate_shapes
from engine.benchmark.counts import flops_by_part
from models.build import build_model
from tests.benchmarks.learning import name_of
from tests.benchmarks.recipe_steps import CLASSES, config_of, contender, peak_of
from util.json_lines import json_lines

PLAIN = (
    "--no_two_stage --no_with_box_refine --no_mixed_query_selection --no_look_forward_twice "
    "--num_denoising 0"
)
MODELS = {
    "DETR, one level": f"{PLAIN} --num_feature_levels 1 --encoder_attn dense --decoder_attn dense "
    "--decoder_norm --input_norm none --position_offset 0",
    "deformable, one level": f"{PLAIN} --num_feature_levels 1",
    "deformable, three levels": PLAIN,
    "the preset": "",
    "mswin+deformable": "--encoder_attn mswin+deformable",
    "dat+deformable": "--encoder_attn dat+deformable",
    "HS-FPN": "--neck hsfpn",
    "width 288": "--hidden_dim 288 --nheads 9",
    "width 288, msda+deformable": "--hidden_dim 288 --nheads 9 --encoder_attn msda+deformable",
    "ResNet-18": "--backbone resnet18",
    "ResNet-18, DCN v2": "--backbone resnet18 --dcn v2",
}
SCENES = {"shapes": "usual", "small": "small"}
BOXES = 7  # in each image of which steps are timed
COLUMNS = {"AP": 0, "AP50": 1, "small": 3, "medium": 4, "large": 5}  # among COCO's 12 numbers
Costs = dict[str, dict[str, float]]


def data_of(options: argparse.Namespace) -> dict[str, str]:
    """Return the options of each data set, which is generated unless they are given."""
    if options.data:
        return dict(options.data)
    found = {}
    for name, scene in SCENES.items():
        place = options.output_dir / "data" / name
        generate_shapes(
            place, num_train=options.num_train, num_val=options.num_val, seed=0, scene=scene
        )
        found[name] = shlex.join(["--coco_path", str(place)])
    return found


def costs_of(models: list[str], options: argparse.Namespace) -> Costs:
    """Return seconds of a step, bytes, multiplications and parameters; measured once for all."""
    file = options.output_dir / f"costs_{Path(options.config).stem}.json"
    found: Costs = json.loads(file.read_text()) if file.exists() else {}
    if found.keys() >= set(models):
        return found
    configs = {name: config_of(options.config, MODELS[name]) for name in models}
    steps = {name: contender(config, BOXES) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    for name, config in configs.items():
        model = build_model(config.model, num_classes=CLASSES)
        side = config.data.eval_scale
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "bytes": peak_of(options.config, MODELS[name], BOXES) * 2**30,
            "products": sum(flops_by_part(model, 1, (side, side * 4 // 3)).values()) / 2,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    file.write_text(json.dumps(found))
    return found


def train(folder: Path, words: list[str]) -> None:
    """Train a run to its end, as far as it has not been done."""
    if (folder / "trained").exists():
        return
    command = [sys.executable, "main.py", "train", *words, "--output_dir", str(folder)]
    command += ["--resume", "auto", "--eval_every", "1", "--no_tensorboard", "--num_images", "0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (folder / "trained").touch()


def results_of(folder: Path) -> list[tuple[float, list[float]]]:
    """Return minutes of training and COCO's 12 numbers of each evaluation of a run."""
    seconds, found = 0.0, []
    for _, entry in json_lines(folder / "log.txt"):
        seconds += entry["train_seconds"]
        if "test_coco_eval_bbox" in entry:
            found.append((seconds / 60, entry["test_coco_eval_bbox"]))
    return found


def steps_of(folder: Path) -> int:
    """Return how many steps a run has made."""
    return sum(entry["train_steps"] for _, entry in json_lines(folder / "log.txt"))


def row(name: str, seed: int, folder: Path, costs: dict[str, float]) -> str:
    """Return a run's line of the table."""
    _, numbers = results_of(folder)[-1]
    shown = [f"{numbers[i]:.3f}" if numbers[i] >= 0 else "" for i in COLUMNS.values()]
    of_model = [
        f"{costs['seconds']:.3f} s",
        f"{costs['bytes'] / 2**30:.2f} GiB",
        f"{costs['products'] / 1e9:.2f}",
        f"{costs['parameters'] / 1e6:.1f}",
    ]
    cells = [f"`{name}`", str(seed), str(steps_of(folder)), *shown, *of_model]
    return f"| {' | '.join(cells)} |"


def draw(runs: dict[str, dict[str, list[Path]]], path: Path) -> None:
    """Draw AP over minutes of training for each data set, a line for each seed."""
    figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    names = list(MODELS)
    for axes, (data, models) in zip(panels, runs.items(), strict=True):
        for name, folders in models.items():
            place = names.index(name)  # every second of 20 colours first, which differ more
            colour = colormaps["tab20"](2 * place % 20 + place // 10)
            for number, folder in enumerate(folders):
                results = results_of(folder)
                minutes = [0.0, *(at for at, _ in results)]
                found = [0.0, *(numbers[0] for _, numbers in results)]
                style = "--" if PLAIN in MODELS[name] else "-"
                label = None if number else name
                axes.plot(minutes, found, style, color=colour, label=label, lw=1.5)
        axes.set(title=data, xlabel="minutes of training", xlim=0, ylim=0)
        axes.set_ylabel("AP on the validation images")
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of each run, with its evaluations")
    length.add_argument("--epochs", type=int, help="of each run, in place of minutes")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--config", default="shapes_tiny", help="preset")
    parser.add_argument(
        "--data", nargs=2, action="append", metavar=("NAME", "OPTIONS"),
        help="a data set in place of the generated ones, and its options for train",
    )  # fmt: skip
    parser.add_argument("--num_train", type=int, default=2800, help="generated images")
    parser.add_argument("--num_val", type=int, default=200, help="generated images")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each model")
    parser.add_argument("--plot", type=Path, help="PNG to draw AP over minutes to")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    data = data_of(options)
    costs = costs_of(options.models, options)
    limit = f"--epochs {options.epochs}"
    if options.minutes:
        limit = f"--max_hours {options.minutes / 60:.5g}"
    runs: dict[str, dict[str, list[Path]]] = {name: {} for name in data}
    for seed in options.seeds:
        for name, of_data in data.items():
            for model in options.models:
                switches = f"{limit} {MODELS[model]}"
                folder = options.output_dir / name / name_of(switches, seed)
                words = ["--config", options.config, "--seed", str(seed)]
                train(folder, words + shlex.split(f"{of_data} {switches}"))
                runs[name].setdefault(model, []).append(folder)
                print(f"{name}: {row(model, seed, folder, costs[model])}", flush=True)
    head = ["model", "seed", "steps", *COLUMNS, "step", "peak memory", "GMAC", "M parameters"]
    for name, models in runs.items():
        print(f"\n{name}\n\n| {' | '.join(head)} |\n|---|{'--:|' * (len(head) - 1)}")
        for model, folders in models.items():
            for seed, folder in zip(options.seeds, folders, strict=True):
                print(row(model, seed, folder, costs[model]))
    if options.plot:
        draw(runs, options.plot)


if __name__ == "__main__":
    main()
