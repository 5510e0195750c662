"""`main.py predict`: what a checkpoint finds in images or a video, drawn and as JSON."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.detection import WEIGHTS_OR_EXPORTED, DetectionOptions
from configs.load import Given
from configs.options import Checked, option
from configs.tiles import TileOptions
from datasets.dataset import find_images
from datasets.images import limit_pixels
from engine.detector import Detector
from engine.predictions import PredictionFiles, drawn_names, relative_names
from engine.video import is_video, predict_video
from util.console import console, short_name
from util.errors import ConfigError, DataError, brief, nearest_hint
from util.files import make_output_dir, read_regular, refuse_overwriting, write_atomic

_MAX_SHOWN = 10
_LARGEST_THRESHOLDS = 2**26  # bytes


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Checked):
    """What `predict` needs; everything else is in the checkpoint."""

    checkpoint: str = option("", WEIGHTS_OR_EXPORTED)
    input: tuple[str, ...] = option(
        (),
        "images, folders, globs or lists (.txt, an image a line; - reads one); or one video: a "
        "file, an address or the number of a camera",
    )
    output_dir: str = option("", "folder for images and predictions")
    prompt: str = option(
        "", 'checkpoint of a Grounding DINO: what to find, as "kettle . mug"; needs transformers'
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    batch_size: int = option(1, "images per step", low=1, most=65536)
    score_threshold: float | None = option(
        None,
        "minimum score to draw (default: per-class thresholds from the checkpoint, else 0.3)",
        low=0,
        high=1,
    )
    score_thresholds: str = option(
        "",
        "JSON file of minimum scores by class, as score_thresholds.json; the other classes "
        "have theirs as without it",
    )
    classes: tuple[str, ...] = option((), "keep these classes only, by name or id (default: all)")
    csv: bool = option(False, "write the boxes that are drawn as predictions.csv, too")
    save_crops: bool = option(False, "write each box that is drawn as an image, to crops/CLASS/")
    draw: bool = option(True, "draw copies of the images", off="draw no copies of the images")
    track: bool = option(False, "number the objects of a video from frame to frame (ByteTrack)")
    track_patience: float = option(
        1.0,
        "track: seconds for which an object that is lost keeps its number",
        low=0,
        most=3600,
        rare=True,
    )
    num_workers: int = option(
        -1, "data-loading workers; -1: one per core, at most 8", low=-1, most=1024
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.track_patience != 1.0 and not self.track:
            raise ConfigError("track_patience: says how long `track` remembers. Add `track`.")


SECTIONS = {"predict": PredictOptions, "detection": DetectionOptions, "tiles": TileOptions}
DEFAULTS = {"detection": "the checkpoint's", "tiles": "as in the checkpoint's training"}


def main(options: PredictOptions, detection: DetectionOptions, given: Given) -> int:
    """Draw what a checkpoint finds in images or a video, and write it as JSON."""
    if not options.input or not options.output_dir:
        raise ConfigError("predict: give `input IMAGES ...` and `output_dir DIR`.")
    video = next((text for text in options.input if is_video(text)), None)
    if video is not None and len(options.input) > 1:
        raise ConfigError(f"`input {video}`: is a video, which comes alone. Give one input.")
    if video is None and options.track:
        raise ConfigError("track: follows the objects of a video, and `input` has none. Give one.")
    paths = find_images(options.input) if video is None else []
    detector = Detector.load(
        options.checkpoint, device=options.device, prompt=options.prompt, **asdict(detection)
    )
    detector.take(given)
    of_file = read_thresholds(options.score_thresholds, detector.names)
    thresholds = {**detector.min_scores(options.score_threshold), **of_file}
    kept = chosen_classes(options.classes, detector)
    thresholds = {name: score for name, score in thresholds.items() if name in kept}
    output_dir = Path(options.output_dir)
    if video is not None:
        limit_pixels(detector.data.max_pixels)
        predict_video(
            detector,
            video,
            output_dir,
            thresholds=thresholds,
            draw=options.draw,
            table=options.csv,
            crops=options.save_crops,
            batch_size=options.batch_size,
            track_patience=options.track_patience if options.track else None,
        )
    else:
        write_predictions(
            detector,
            paths,
            output_dir,
            thresholds=thresholds,
            draw=options.draw,
            table=options.csv,
            crops=options.save_crops,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
        )
    known = detector.thresholds if options.score_threshold is None else {}
    report_thresholds(output_dir, thresholds, known.keys() - of_file.keys())
    return 0


def read_thresholds(path: str, names: Collection[str]) -> dict[str, float]:
    """Return the minimum scores by class that a JSON file has; none without a path.

    Raises:
        DataError: it cannot be read, names a class that the model lacks, or a score is not in 0..1.
    """
    if not path:
        return {}
    try:
        found = json.loads(read_regular(Path(path), _LARGEST_THRESHOLDS))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Write the file again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: must be one object of minimum scores by class, {{NAME: SCORE}}.")
    for name, score in found.items():
        if name not in names:
            hint = nearest_hint(name, names)
            raise DataError(f"{path}: the model has no class {brief(name)}. {hint}")
        if type(score) not in (int, float) or not 0 <= score <= 1:
            raise DataError(
                f"{path}: the score of {brief(name)} must be in 0..1, not {brief(score)}."
            )
    return found


def chosen_classes(wanted: Sequence[str], detector: Detector) -> set[str]:
    """Return the names of classes that are given by name or category id; all if none is.

    Raises:
        ConfigError: the model has no such class.
    """
    if not wanted:
        return set(detector.names)
    classes = detector.classes
    labels = [label for label in range(len(classes)) if classes.in_use(label)]
    known = {str(classes.given_id(label)): classes.shown(label) for label in labels}
    known |= {name: name for name in detector.names}
    for name in wanted:
        if name not in known:
            hint = nearest_hint(name, detector.names)
            raise ConfigError(f"classes: the model has no class {brief(name)}. {hint}")
    return {known[name] for name in wanted}


def write_predictions(
    detector: Detector,
    paths: Sequence[Path],
    output_dir: Path,
    *,
    thresholds: Mapping[str, float],
    draw: bool = True,
    table: bool = False,
    crops: bool = False,
    batch_size: int = 1,
    num_workers: int = 0,
) -> None:
    """Write what is found in images; see `PredictionFiles`. Unreadable ones are named and skipped.

    Classes without a threshold are left out.

    Raises:
        ConfigError: a drawn copy would overwrite one of the images.
        DataError: no image could be read.
    """
    names = relative_names(paths)
    drawn = drawn_names(names) if draw else None
    refuse_overwriting(paths, (output_dir / name for name in drawn or ()))
    make_output_dir(output_dir)
    with PredictionFiles(
        output_dir, names, detector.classes, thresholds, drawn=drawn, table=table, crops=crops
    ) as files:
        for i, boxes in detector.detect(
            paths,
            batch_size=batch_size,
            num_workers=num_workers,
            description="predict",
            tiling=detector.tiling,
        ):
            files.add(i, paths[i], [box for box in boxes if box.name in thresholds])
        if not files.images:
            raise DataError(
                f"`input`: none of the {len(paths)} images can be read. Check the files."
            )
        files.write_json()
    levels = sorted(set(thresholds.values()))
    reached = f"score {levels[0]}" if len(levels) == 1 else "the score threshold of their class"
    unreadable = len(paths) - files.images
    written = "predictions.json and predictions.jsonl"
    written = f"predictions.csv, {written}" if table else written
    found = (
        f"{files.images} image{'s' * (files.images != 1)} with "
        f"{files.boxes} box{'es' * (files.boxes != 1)}"
    )
    console(
        f"written to {output_dir}: {found} at or above {reached}, and {written}"
        + (f"; {unreadable} of {len(paths)} images could not be read" if unreadable else "")
    )


def report_thresholds(
    output_dir: Path, thresholds: Mapping[str, float], known: Collection[str]
) -> None:
    """Write `score_thresholds.json`, and print those that are `known` from the checkpoint."""
    path = output_dir / "score_thresholds.json"
    text = json.dumps(thresholds, indent=1, ensure_ascii=False)
    write_atomic(path, f"{text}\n", errors="backslashreplace")
    shown = [
        f"{short_name(name)} {threshold:.2f}"
        for name, threshold in thresholds.items()
        if name in known
    ]
    if shown:
        more = f", ... ({len(shown)}, all in {path.name})" if len(shown) > _MAX_SHOWN else ""
        others = {f"{threshold:.2f}" for name, threshold in thresholds.items() if name not in known}
        console(
            "score thresholds from the checkpoint's last evaluation: "
            f"{', '.join(shown[:_MAX_SHOWN])}{more}"
            f"{''.join(f'; {threshold} for the other classes' for threshold in others)}. "
            "--score_threshold sets one for all."
        )
