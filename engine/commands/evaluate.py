"""`main.py eval`: COCO's numbers for a checkpoint."""

import argparse
import sys
from pathlib import Path

from configs.schema import DataConfig, EvalConfig, merge_options
from datasets.build import build_dataset, load_index
from datasets.loader import eval_loader
from engine.coco_evaluator import CocoEvaluator, save_results
from engine.commands.detector import beside, load_detector, saved_data_options
from engine.evaluate import evaluate
from engine.launch import launch
from engine.precision import Precision
from models.postprocess import PostProcess
from util.config import Values
from util.device import own_device, pick_device
from util.distributed import World, join_world, leave_world, started_by_launcher
from util.files import make_output_dir
from util.run_log import console


def evaluate_checkpoint(args: argparse.Namespace, given: Values) -> int:
    """Evaluate a checkpoint on COCO-format data."""
    options = EvalConfig(**given.get("eval", {}))
    if options.gpus > 1 and not started_by_launcher():
        return launch(
            Path(sys.argv[0]), sys.argv[1:],
            processes=options.gpus, device=options.device, restarts=0,
        )  # fmt: skip
    world = join_world(pick_device(options.device).type)
    try:
        return evaluate_in_world(options, given, world)
    finally:
        leave_world()


def evaluate_in_world(options: EvalConfig, given: Values, world: World) -> int:
    """Evaluate this process's share; the main one writes the results of all."""
    device = own_device(pick_device(options.device), world)
    model, pretrained, mean, std = load_detector(options.checkpoint, device, ema=options.ema)
    output_dir = Path(options.output_dir) if options.output_dir else beside(options.checkpoint)
    saved = {"data": saved_data_options(pretrained)}
    data = DataConfig(**merge_options(saved, {"data": given.get("data", {})})["data"])
    index = load_index(data, "val")
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
    evaluator = CocoEvaluator(index.coco_gt, dataset.label_to_category)
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
        console(result.table())
        save_results(output_dir, result, evaluator.detections)
        console(f"written: {output_dir / 'eval' / 'results.json'}, detections.json")
    return 0
