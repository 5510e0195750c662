"""`main.py check`: look for flaws in a data set before training on it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.options import Checked, option
from configs.schema import SECTIONS as RUN
from configs.schema import Config, DataConfig
from datasets.build import Split, read_split, tiling_of
from datasets.checks.boxes import Limits
from datasets.checks.diagnosis import Diagnosis, corrected, examine
from datasets.checks.report import page, summary
from datasets.workers import loader_processes
from models.recipes import KnownRecipes
from util.console import console
from util.errors import ConfigError
from util.files import make_output_dir, write_atomic

_SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Checked):
    """What `check` does in addition to looking at the data of a training run."""

    fix: str = option(
        "", "new .json file: a corrected COCO-format copy, with .changes.json beside it"
    )
    similar: bool = option(
        True,
        "look for images that look alike, within a split and in two",
        off="do not look for images that look alike",
    )
    splits: tuple[Split, ...] = option((), "splits to check (default: those that are given)")


SECTIONS = {**RUN, "check": CheckOptions}
RECIPES = KnownRecipes()
RELEVANT = {
    "model": ("num_queries",),
    "optim": (),
    "loss": (),
    "run": ("output_dir",),
    "recipes": (),
}


def main(config: Config, options: CheckOptions) -> int:
    """Look for flaws in images and annotations."""
    splits = [split for split in _SPLITS if split in (options.splits or _located(config.data))]
    output_dir = Path(config.run.output_dir) if config.run.output_dir else None
    if output_dir:
        make_output_dir(output_dir)
        for name, mark in (("check.json", b'"check": 1'), ("check.html", b"<title>Check: ")):
            file = output_dir / name
            if file.exists() and not (file.is_file() and mark in file.read_bytes()[:400]):
                raise ConfigError(
                    f"output_dir {output_dir}: it holds another file called {name}, not from an "
                    "earlier check. Choose another folder."
                )
    copies = _copies(options.fix, splits, output_dir)
    sources = {str(split): read_split(config.data, split) for split in splits}
    limits = Limits(
        config.model.num_queries,
        min(config.data.train_scales),
        config.data.max_size,
        tiling_of(config.tiles, config.data.eval_scale),
    )
    processes = loader_processes(config.data.num_workers)
    diagnosis = examine(sources, limits, processes=processes, similar=options.similar)
    console(summary(diagnosis))
    if output_dir:
        names = (source.place.resolve().name for source in sources.values())
        write_atomic(output_dir / "check.json", json.dumps(diagnosis.to_json()))
        write_atomic(
            output_dir / "check.html", page(diagnosis, title=", ".join(dict.fromkeys(names)))
        )
        console(f"written: {output_dir / 'check.html'}, check.json")
    else:
        console("--output_dir OUT writes all of it, with images, to OUT/check.html.")
    if copies:
        _write_copies(diagnosis, copies)
    return 0 if diagnosis.healthy else 1


def _located(data: DataConfig) -> tuple[str, ...]:
    """Return the splits that options locate; both if a folder holds both."""
    explicit = tuple(
        split
        for split in _SPLITS
        if getattr(data, f"{split}_images") or getattr(data, f"{split}_annotations")
    )
    return explicit if explicit and not (data.data_path or data.coco_path) else _SPLITS


def _copies(fix: str, splits: list[Split], output_dir: Path | None) -> dict[str, Path]:
    """Return the files to write: a corrected copy of each split, and "changes".

    Raises:
        ConfigError: a file exists or will exist, the name is not that of a JSON file, or its folder
            is not writable.
    """
    if not fix:
        return {}
    path = Path(fix)
    if path.suffix != ".json":
        raise ConfigError(f"fix {fix}: must be the name of a new .json file.")
    files = {str(s): path.with_suffix(f".{s}.json") if len(splits) > 1 else path for s in splits}
    files["changes"] = path.with_suffix(".changes.json")
    taken = [(output_dir / "check.json").resolve()] if output_dir else []
    for file in files.values():
        if file.exists() or file.resolve() in taken:
            raise ConfigError(
                f"fix {file}: the file exists, and nothing is overwritten. Choose another name."
            )
    make_output_dir(path.parent, f"fix {path}:")  # now, not after an hour of decoding
    return files


def _write_copies(diagnosis: Diagnosis, files: dict[str, Path]) -> None:
    changes: list[dict[str, Any]] = []
    for report in diagnosis.splits:
        content, changed = corrected(report)
        changes += changed
        write_atomic(files[report.split], json.dumps(content))
        console(
            f"written: {files[report.split]}, {len(changed)} changes; "
            f"its images: {report.source.image_dir}"
        )
    # NaN and infinities become text: Python's files hold them, JSON has none
    strict = (json.loads(json.dumps(change), parse_constant=str) for change in changes)
    lines = ",\n".join(map(json.dumps, strict))
    write_atomic(files["changes"], f"[\n{lines}\n]\n" if changes else "[]\n")
    console(f"written: {files['changes']}")
