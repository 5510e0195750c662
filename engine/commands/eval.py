"""`main.py eval`: COCO's numbers and an analysis, for a checkpoint or for saved detections."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from configs.detection import WEIGHTS_OR_EXPORTED
from configs.load import Given
from configs.options import option
from configs.schema import DataConfig, EvalDataConfig, PrecisionName, ProcessOptions
from configs.tiles import TileOptions
from datasets.build import build_dataset, read_split, reading_of
from datasets.formats.coco_layouts import find_coco
from datasets.index import CocoIndex
from engine.detector import Detector
from engine.evaluation.analysis import ReadImage, analyse, draw_gallery, save_analysis
from engine.evaluation.detections import read_detections
from engine.evaluation.evaluator import EvalResult, Evaluator, comparison_table, save_results
from engine.evaluation.identify import CategoryIds
from engine.evaluation.matching import Truth
from engine.processes import process_group
from util.console import console
from util.errors import ConfigError
from util.files import make_output_dir, refuse_overwriting, short_names
from util.world import World

_IMAGES_SHOWN = 12
_WRITTEN = ("results.json", "analysis.json", "images.json", "report.html")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ProcessOptions):
    """What `eval` needs in addition to the data; everything else is in the checkpoint."""

    checkpoint: tuple[str, ...] = option(
        (),
        f"{WEIGHTS_OR_EXPORTED}; of several, a table compares the results",
    )
    output_dir: str = option(
        "",
        "folder for eval/ (default: that of the checkpoint); of several checkpoints, with a "
        "folder for each",
    )
    batch_size: int | None = option(
        None, "images per step (default: that of the run, else 1)", low=1, most=65536, unset=0
    )
    precision: PrecisionName = option("fp32", "arithmetic of the model")
    ema: bool = option(
        True,
        "use a checkpoint's averaged weights, if it has them",
        off="use the trained weights, even if the checkpoint has averaged ones",
    )
    detections: str = option("", "evaluate this COCO results file instead of a checkpoint")
    evaluator: Literal["fast", "pycocotools"] = option(
        "fast", "what computes COCO's numbers, which are equal to the last digit"
    )
    max_dets: int = option(
        0,
        "detections per image and class that count, in addition to COCO's 100: 101 or more; "
        "0: as many as an image has boxes of a class",
        low=0,
    )
    category_ids: CategoryIds = option(
        "auto",
        "what those of --detections are: as_is, the data's; from_0 or from_1, positions of "
        "the data's categories; plus_1 or minus_1, the data's after adding that; auto: as_is, "
        "unless the boxes show another",
        rare=True,
    )
    class_agnostic: bool = option(False, "take all boxes as one class", rare=True)
    area_ranges: tuple[float, ...] = option(
        (),
        "areas in square pixels from which an object is medium and large "
        "(default: COCO's 1024 9216)",
        above=0,
        rare=True,
    )
    analysis: bool = option(
        True,
        "write analysis.json, images.json and report.html to eval/",
        off="write no analysis.json, images.json and report.html to eval/",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.max_dets <= 100:
            raise ConfigError(
                f"max_dets: must be 0 or more than COCO's 100, which always count, not "
                f"{self.max_dets}. Raise it, or leave it out."
            )
        bounds = self.area_ranges
        if bounds and (len(bounds) != 2 or bounds[0] >= bounds[1]):
            raise ConfigError(
                f"area_ranges: must be two areas, the smaller first, not {bounds}. COCO's are "
                "1024 9216."
            )
        if self.category_ids != "auto" and not self.detections:
            raise ConfigError("category_ids: says how to read `detections`. Give that, too.")

    @property
    def area_bounds(self) -> tuple[float, float] | None:
        """Return the areas from which an object is medium and large; None for COCO's."""
        return (self.area_ranges[0], self.area_ranges[1]) if self.area_ranges else None


SECTIONS = {"eval": EvalOptions, "data": EvalDataConfig, "tiles": TileOptions}
DEFAULTS = {"data": "the checkpoint's", "tiles": "as in the checkpoint's training"}


def processes(given: Given) -> ProcessOptions:
    """Return what a launcher needs; saved detections are evaluated in one process."""
    options = given.section("eval", EvalOptions)
    return replace(options, gpus=1) if options.detections else options


def main(options: EvalOptions, given: Given) -> int:
    """Evaluate a checkpoint, or saved detections, on COCO-format data."""
    if options.detections:
        if given.values.get("tiles", {}).get("tile"):
            raise ConfigError(
                "tile: cuts the images that a model is given; `detections` has none. Leave it out."
            )
        return evaluate_detections(options, given.config().data)
    sources = list(dict.fromkeys(options.checkpoint)) or [""]
    if len(sources) > 1 and not options.output_dir:
        raise ConfigError(
            "output_dir: is missing. Name a folder, in which each checkpoint gets one of its own."
        )
    names = _names(sources) if len(sources) > 1 else [""]
    results = {}
    with process_group(options.device) as (world, device):
        for name, source in zip(names, sources, strict=True):
            if name:
                console(f"{name}: {source}")
            results[name] = evaluate_checkpoint(source, name, options, given, world, device)
        if world.main and len(sources) > 1:
            console(f"\n{comparison_table(results)}")
    return 0


def _names(sources: Sequence[str]) -> list[str]:
    """Return short names of checkpoints that differ, and can be names of folders."""
    paths = [Path(source.replace(":", "/")) for source in sources]
    return short_names([path if path.is_dir() else path.with_suffix("") for path in paths])


def _output_dir(options: EvalOptions, source: str, name: str) -> Path:
    """Return the folder of a checkpoint's results: its own, or below the one that is given."""
    if options.output_dir:
        return Path(options.output_dir) / name
    place = Path(source)
    if not place.exists():  # on the hub
        raise ConfigError(f"output_dir: {source} has no folder here. Say where its results go.")
    return place if place.is_dir() else place.parent


def evaluate_checkpoint(
    source: str,
    name: str,
    options: EvalOptions,
    given: Given,
    world: World,
    device: torch.device,
) -> EvalResult:
    """Evaluate a checkpoint in all processes of `world`; the main one writes the results.

    `name` is that of their folder in `output_dir`, "" for this itself.
    """
    detector = Detector.load(source, device=device, ema=options.ema)
    output_dir = _output_dir(options, source, name)
    detector.take(given)
    dataset = detector.validation_set(detector.data, world)
    make_output_dir(output_dir / "eval")
    result, evaluator = detector.measure(  # in this process's part of the images
        dataset,
        batch_size=options.batch_size,
        precision=options.precision,
        world=world,
        backend=options.evaluator,
        max_dets=options.max_dets,
        area_bounds=options.area_bounds,
    )
    if world.main:
        found = evaluator
        if options.class_agnostic:
            evaluator = evaluator.without_classes()
            result = evaluator.evaluate()
        save_results(output_dir, result, found)
        _report(options, output_dir, evaluator, result, dataset.read_image, Path(source).name)
    return result


def evaluate_detections(options: EvalOptions, data: DataConfig) -> int:
    """Evaluate a file in the COCO results format; no model is needed, nor the images."""
    if options.checkpoint:
        raise ConfigError("`detections` and `checkpoint` are mutually exclusive. Give one.")
    path = Path(options.detections)
    # results go to the run's folder if the file is in its eval/, else beside the file
    above = path.parent.parent if path.parent.name == "eval" else path.parent
    output_dir = Path(options.output_dir) if options.output_dir else above
    refuse_overwriting(
        [path, Path(data.val_annotations)],
        [output_dir / "eval" / name for name in _WRITTEN],
    )
    truth, read_image, notices = read_truth(data)
    detections, more = read_detections(
        path,
        truth,
        category_ids=options.category_ids,
        class_agnostic=options.class_agnostic,
    )
    make_output_dir(output_dir / "eval")
    for notice in (*notices, *more):
        console(f"  notice: {notice}")
    evaluator = Evaluator(
        truth,
        backend=options.evaluator,
        max_dets=options.max_dets,
        area_bounds=options.area_bounds,
    )
    evaluator.add(detections)
    evaluator = evaluator.without_classes() if options.class_agnostic else evaluator
    result = evaluator.evaluate()
    save_results(output_dir, result, None)  # what was read is never written over
    _report(options, output_dir, evaluator, result, read_image, path.name)
    return 0


def read_truth(data: DataConfig) -> tuple[Truth, ReadImage | None, list[str]]:
    """Return validation annotations, a reader of images if they are at hand, and notices.

    Raises:
        DataError: no option says where the data lies, or they cannot be read.
    """
    annotations, images_exist = data.val_annotations, bool(data.val_images)
    if not annotations and data.coco_path and not data.data_path:
        file, folder = find_coco(Path(data.coco_path), "val")
        annotations, images_exist = str(file), folder.is_dir()
    read_image: ReadImage | None = None
    if annotations and not images_exist:
        index = CocoIndex.load(Path(annotations), None, need_boxes=False, reading=reading_of(data))
    else:
        index = CocoIndex.from_source(read_split(data, "val"), need_boxes=False)
        dataset = build_dataset(data, index, train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
        read_image = dataset.read_image
    return Truth.of(index), read_image, index.notices


def _report(
    options: EvalOptions,
    output_dir: Path,
    evaluator: Evaluator,
    result: EvalResult,
    read_image: ReadImage | None,
    title: str,
) -> None:
    """Print the numbers, and write what the analysis finds."""
    console(result.table())
    detections, truth = evaluator.detections(), evaluator.truth
    written = f"written: {output_dir / 'eval' / 'results.json'}"
    written += "" if options.detections else ", detections.json"
    if options.analysis:
        analysis = analyse(evaluator, result)
        console(f"\n{analysis.summary()}")
        images = {}
        if read_image is not None:
            above = detections.select(detections.score >= analysis.min_scores[detections.category])
            shown = [w.image_id for w in analysis.worst[:_IMAGES_SHOWN]]
            images = draw_gallery(above, truth, shown, read_image, score_threshold=None)
        save_analysis(output_dir, analysis, images, title=title)
        written += ", analysis.json, images.json, report.html"
    console(written)
