"""`main.py eval`: COCO's numbers for a checkpoint."""

import argparse
from pathlib import Path

from configs.schema import DataConfig, EvalConfig, merge_options
from datasets.build import build_dataset, load_index
from datasets.loader import eval_loader
from engine.coco_evaluator import CocoEvaluator, save_results
from engine.commands.detector import beside, load_detector, saved_data_options
from engine.evaluate import evaluate
from models.postprocess import PostProcess
from util.config import Values
from util.device import pick_device
from util.files import make_output_dir
from util.run_log import console


def evaluate_checkpoint(args: argparse.Namespace, given: Values) -> int:
    """Evaluate a checkpoint on COCO-format data."""
    options = EvalConfig(**given.get("eval", {}))
    device = pick_device(options.device)
    model, pretrained, mean, std = load_detector(options.checkpoint, device)
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
    batches = eval_loader(dataset, batch_size=batch_size, num_workers=data.num_workers)
    evaluator = CocoEvaluator(index.coco_gt, dataset.label_to_category)
    result, _ = evaluate(
        model, PostProcess(nms_iou=data.nms_iou), batches, evaluator, device=device
    )
    console(result.table())
    save_results(output_dir, result, evaluator.detections)
    console(f"written: {output_dir / 'eval' / 'results.json'}, detections.json")
    return 0
