"""`main.py eval`: COCO's numbers and an analysis, for a checkpoint or for saved detections."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from PIL import Image

from configs.options import Values
from configs.schema import DataConfig, EvalConfig, merge_options
from datasets.build import build_dataset, load_index, read_split
from datasets.formats.coco import coco_layout
from datasets.index import CocoIndex
from datasets.loader import eval_loader
from engine.detector import beside, load_detector, saved_data_options
from engine.evaluation.analysis import analyse, save_analysis
from engine.evaluation.detections import read_detections
from engine.evaluation.evaluate import evaluate
from engine.evaluation.evaluator import Backend, EvalResult, Evaluator, save_results
from engine.evaluation.gallery import draw_gallery
from engine.evaluation.matching import Truth
from engine.evaluation.report import save_report
from engine.precision import Precision
from engine.processes import launch
from models.postprocess import PostProcess
from util.console import console
from util.device import own_device, pick_device
from util.distributed import World, destroy_process_group, init_process_group, started_by_launcher
from util.errors import ConfigError
from util.files import make_output_dir

ReadImage = Callable[[int], Image.Image | None]

_IMAGES_SHOWN = 12


def evaluate_checkpoint(args: argparse.Namespace, given: Values) -> int:
    """Evaluate a checkpoint, or saved detections, on COCO-format data."""
    options = EvalConfig(**given.get("eval", {}))
    if options.detections:
        return evaluate_detections(options, DataConfig(**given.get("data", {})))
    if options.gpus > 1 and not started_by_launcher():
        return launch(
            Path(sys.argv[0]), sys.argv[1:],
            processes=options.gpus, device=options.device, restarts=0,
        )  # fmt: skip
    world = init_process_group(pick_device(options.device).type)
    try:
        return evaluate_in_world(options, given, world)
    finally:
        destroy_process_group()


def evaluate_detections(options: EvalConfig, data: DataConfig) -> int:
    """Evaluate a file in the COCO results format; no model is needed, nor the images."""
    if options.checkpoint:
        raise ConfigError("--detections and --checkpoint are mutually exclusive. Use one of them.")
    path = Path(options.detections)
    # results go to the run's folder if the file is in its eval/, else beside the file
    above = path.parent.parent if path.parent.name == "eval" else path.parent
    output_dir = Path(options.output_dir) if options.output_dir else above
    for name in ("results.json", "analysis.json", "report.html"):
        result = output_dir / "eval" / name
        for file in (path, Path(data.val_annotations)):
            if result.is_file() and file.is_file() and result.samefile(file):
                raise ConfigError(
                    f"--output_dir {output_dir}: {file}, which is an input, would be overwritten. "
                    "Choose another folder."
                )
    truth, read_image, notices = read_truth(data)
    detections, more = read_detections(path, truth)
    make_output_dir(output_dir / "eval")
    for notice in (*notices, *more):
        console(f"  notice: {notice}")
    evaluator = _evaluator(options, truth)
    evaluator.add(detections)
    _report(options, output_dir, evaluator, evaluator.evaluate(), read_image, path.name)
    return 0


def read_truth(data: DataConfig) -> tuple[Truth, ReadImage | None, list[str]]:
    """Return validation annotations, a reader of images if they are at hand, and notices.

    Raises:
        DataError: no option says where the data lies, or they cannot be read.
    """
    annotations = Path(data.val_annotations) if data.val_annotations else None
    images_exist = bool(data.val_images)
    if annotations is None and data.coco_path and not data.data_path:
        folder, annotations = coco_layout(Path(data.coco_path), "val")
        images_exist = folder.is_dir()
    if annotations is not None and not images_exist:
        index = CocoIndex.load(annotations, None, need_boxes=False)
        return Truth.of(index.classes, index.images, index.annotations), None, index.notices
    index = CocoIndex.from_source(read_split(data, "val"), need_boxes=False)
    dataset = build_dataset(data, index, train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    truth = Truth.of(index.classes, index.images, index.annotations)
    return truth, dataset.read_image, index.notices


def evaluate_in_world(options: EvalConfig, given: Values, world: World) -> int:
    """Evaluate this process's part; the main one writes the results of all."""
    device = own_device(pick_device(options.device), world)
    model, pretrained, mean, std = load_detector(options.checkpoint, device, ema=options.ema)
    output_dir = Path(options.output_dir) if options.output_dir else beside(options.checkpoint)
    saved = {"data": saved_data_options(pretrained)}
    data = DataConfig(**merge_options(saved, {"data": given.get("data", {})})["data"])
    index = load_index(data, "val", need_boxes=False)
    dataset = build_dataset(
        data, index, train=False, mean=mean, std=std, classes=pretrained.classes
    )
    make_output_dir(output_dir / "eval")
    console(index.report(model.transformer.num_queries))
    optim = (pretrained.config or {}).get("optim", {})
    batch_size = options.batch_size or optim.get("eval_batch_size") or optim.get("batch_size", 1)
    batches = eval_loader(
        dataset,
        batch_size=batch_size,
        num_workers=data.num_workers,
        rank=world.rank,
        world_size=world.size,
    )
    truth = Truth.of(index.classes, index.images, index.annotations)
    evaluator = _evaluator(options, truth, dataset.label_to_category)
    result, _ = evaluate(
        model,
        PostProcess(nms_iou=data.nms_iou),
        batches,
        evaluator,
        device=device,
        autocast=Precision(options.precision, device).autocast,
        world=world,
    )
    if world.main:
        name = Path(options.checkpoint).name
        _report(options, output_dir, evaluator, result, dataset.read_image, name)
    return 0


def _evaluator(
    options: EvalConfig, truth: Truth, label_to_category: dict[int, int] | None = None
) -> Evaluator:
    backend = cast(Backend, options.evaluator)  # the option's choices are the same
    return Evaluator(truth, label_to_category, backend=backend, max_dets=options.max_dets)


def _report(
    options: EvalConfig,
    output_dir: Path,
    evaluator: Evaluator,
    result: EvalResult,
    read_image: ReadImage | None,
    title: str,
) -> None:
    """Print the numbers, and write them with the detections and what the analysis finds."""
    console(result.table())
    detections, truth = evaluator.detections(), evaluator.truth
    # detections that were read from a file are never written over it
    save_results(output_dir, result, None if options.detections else detections.to_coco(truth))
    written = f"written: {output_dir / 'eval' / 'results.json'}"
    written += "" if options.detections else ", detections.json"
    if options.analysis:
        analysis = analyse(evaluator, result)
        console(f"\n{analysis.summary()}")
        images = {}
        if read_image is not None:
            above = detections.select(
                detections.score >= analysis.min_scores()[detections.category]
            )
            shown = [w.image_id for w in analysis.worst[:_IMAGES_SHOWN]]
            images = draw_gallery(above, truth, shown, read_image, score_threshold=None)
        save_analysis(output_dir, analysis)
        save_report(output_dir, analysis, images, title=title)
        written += ", analysis.json, report.html"
    console(written)
