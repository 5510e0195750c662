"""`main.py eval`: COCO's numbers and an analysis, for a checkpoint or for saved detections."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from pycocotools.coco import COCO

from configs.options import Values
from configs.schema import DataConfig, EvalConfig, merge_options
from datasets.build import build_dataset, load_index
from datasets.loader import eval_loader, loader_processes
from engine.commands.ground_truth import validation_truth
from engine.detector import beside, load_detector, saved_data_options
from engine.evaluation.analysis import analyse, save_analysis
from engine.evaluation.detections import read_detections
from engine.evaluation.evaluate import evaluate
from engine.evaluation.evaluator import Backend, CocoEvaluator, EvalResult, save_results
from engine.evaluation.gallery import draw_gallery
from engine.evaluation.report import save_report
from engine.precision import Precision
from engine.processes import launch_if_asked, process_group
from models.postprocess import PostProcess
from util.console import console
from util.distributed import World
from util.errors import ConfigError
from util.files import make_output_dir

ReadImage = Callable[[int], Image.Image | None]

_IMAGES_SHOWN = 12


def evaluate_checkpoint(args: argparse.Namespace, given: Values) -> int:
    """Evaluate a checkpoint, or saved detections, on COCO-format data."""
    options = EvalConfig(**given.get("eval", {}))
    if options.detections:
        return evaluate_detections(options, DataConfig(**given.get("data", {})))
    code = launch_if_asked(gpus=options.gpus, device=options.device)
    if code is not None:
        return code
    with process_group(options.device) as (world, device):
        return evaluate_in_world(options, given, world, device)


def evaluate_detections(options: EvalConfig, data: DataConfig) -> int:
    """Evaluate a file in the COCO results format; no model is needed, nor the images."""
    if options.checkpoint:
        raise ConfigError(
            "--detections: expected no --checkpoint with it, got both. Evaluate one of the two."
        )
    path = Path(options.detections)
    output_dir = Path(options.output_dir) if options.output_dir else _folder_above(path)
    _keep_inputs(output_dir, path, Path(data.val_annotations))
    coco_gt, read_image, notices = validation_truth(data)
    found, more = read_detections(path, coco_gt.imgs, coco_gt.cats)
    make_output_dir(output_dir / "eval")
    for notice in (*notices, *more):
        console(f"  notice: {notice}")
    evaluator = _evaluator(options, coco_gt, {c: c for c in coco_gt.cats})
    evaluator.take(found)
    _tell(options, output_dir, evaluator, evaluator.evaluate(), coco_gt, read_image, path.name)
    return 0


def _folder_above(path: Path) -> Path:
    """Return the run's folder if the file is in its `eval/`, else the file's folder."""
    return path.parent.parent if path.parent.name == "eval" else path.parent


def _keep_inputs(output_dir: Path, *inputs: Path) -> None:
    """Refuse to write results over what is read."""
    for name in ("results.json", "analysis.json", "report.html"):
        result = output_dir / "eval" / name
        for path in inputs:
            if result.is_file() and path.is_file() and result.samefile(path):
                raise ConfigError(
                    f"--output_dir {output_dir}: expected another folder, as {path}, which is "
                    "read, would be overwritten. Choose one."
                )


def evaluate_in_world(
    options: EvalConfig, given: Values, world: World, device: torch.device
) -> int:
    """Evaluate this process's share; the main one writes the results of all."""
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
        num_workers=loader_processes(data.num_workers, local_size=world.local_size),
        rank=world.rank,
        world_size=world.size,
    )
    evaluator = _evaluator(options, index.coco_gt, dataset.label_to_category)
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
        _tell(
            options, output_dir, evaluator, result, index.coco_gt, dataset.read_image, name
        )  # fmt: skip
    return 0


def _evaluator(options: EvalConfig, coco_gt: COCO, labels: dict[int, int]) -> CocoEvaluator:
    backend = cast(Backend, options.evaluator)  # the option's choices are the same
    return CocoEvaluator(coco_gt, labels, backend=backend, max_dets=options.max_dets)


def _tell(
    options: EvalConfig,
    output_dir: Path,
    evaluator: CocoEvaluator,
    result: EvalResult,
    coco_gt: COCO,
    read_image: ReadImage | None,
    title: str,
) -> None:
    """Print the numbers, and write them with the detections and what the analysis finds."""
    console(result.table())
    # detections that were read from a file are never written over it
    save_results(output_dir, result, None if options.detections else evaluator.detections)
    written = f"written: {output_dir / 'eval' / 'results.json'}"
    written += "" if options.detections else ", detections.json"
    if options.analysis:
        names = {i: str(image.get("file_name", "")) for i, image in coco_gt.imgs.items()}
        analysis = analyse(evaluator, result, file_names=names)
        console(f"\n{analysis.summary()}")
        images = {}
        if read_image is not None:
            shown = [w.image_id for w in analysis.worst[:_IMAGES_SHOWN]]
            least = analysis.least_scores()
            above = [
                d for d in evaluator.detections_on(shown) if d["score"] >= least[d["category_id"]]
            ]
            drawn = draw_gallery(above, coco_gt, shown, read_image, score_threshold=None)
            images = {i: drawn[f"image_{i}"] for i in shown if f"image_{i}" in drawn}
        save_analysis(output_dir, analysis)
        save_report(output_dir, analysis, images, title=title)
        written += ", analysis.json, report.html"
    console(written)
