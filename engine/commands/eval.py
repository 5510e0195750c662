"""`main.py eval`: COCO's numbers and an analysis, for a checkpoint or for saved detections."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image
from pycocotools.coco import COCO

from configs.load import Given
from configs.options import option
from configs.schema import DataConfig, EvalDataConfig, ProcessOptions
from configs.schema import Precision as PrecisionName
from datasets.build import build_dataset, load_index
from datasets.loader import eval_loader
from engine.commands.ground_truth import validation_truth
from engine.detector import Detector, beside
from engine.evaluation.analysis import analyse, save_analysis
from engine.evaluation.detections import read_detections
from engine.evaluation.evaluate import evaluate
from engine.evaluation.evaluator import CocoEvaluator, EvalResult, save_results
from engine.evaluation.gallery import draw_gallery
from engine.evaluation.report import save_report
from engine.precision import Precision
from models.postprocess import PostProcess
from util.console import console
from util.device import own_device, pick_device
from util.distributed import World, destroy_process_group, init_process_group
from util.errors import ConfigError
from util.files import make_output_dir

ReadImage = Callable[[int], Image.Image | None]

_IMAGES_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ProcessOptions):
    """What `eval` needs in addition to the data; everything else is in the checkpoint."""

    checkpoint: str = option("", "our or official file, Hugging Face folder, or hf:NAME")
    output_dir: str = option("", "folder for eval/ (default: that of the checkpoint)")
    batch_size: int | None = option(
        None, "images per step (default: that of the run, else 1)", low=1, unset=0
    )
    precision: PrecisionName = option("fp32", "arithmetic of the model")
    ema: bool = option(True, "use a checkpoint's averaged weights, if it has them")
    detections: str = option("", "evaluate this COCO results file instead of a checkpoint")
    evaluator: Literal["fast", "pycocotools"] = option(
        "fast", "what computes COCO's numbers, which are equal to the last digit"
    )
    max_dets: int = option(
        0, "detections per image and class that count, in addition to COCO's 100: 101 or more; "
        "0: as many as an image has boxes of a class", low=0,
    )  # fmt: skip
    analysis: bool = option(True, "write eval/analysis.json and eval/report.html")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.max_dets <= 100:
            raise ConfigError(
                f"max_dets: must be 0 or more than COCO's 100, which always count, not "
                f"{self.max_dets}. Raise it, or leave it out."
            )


SECTIONS = {"eval": EvalOptions, "data": EvalDataConfig}


def processes(given: Given) -> ProcessOptions:
    """Return what a launcher needs; saved detections are evaluated in one process."""
    options = given.section("eval", EvalOptions)
    return replace(options, gpus=1) if options.detections else options


def main(options: EvalOptions, given: Given) -> int:
    """Evaluate a checkpoint, or saved detections, on COCO-format data."""
    if options.detections:
        return evaluate_detections(options, given.config().data)
    world = init_process_group(pick_device(options.device).type)
    try:
        return evaluate_in_world(options, given, world)
    finally:
        destroy_process_group()


def evaluate_detections(options: EvalOptions, data: DataConfig) -> int:
    """Evaluate a file in the COCO results format; no model is needed, nor the images."""
    if options.checkpoint:
        raise ConfigError("`detections` and `checkpoint` are mutually exclusive.")
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


def evaluate_in_world(options: EvalOptions, given: Given, world: World) -> int:
    """Evaluate this process's share; the main one writes the results of all."""
    device = own_device(pick_device(options.device), world)
    detector = Detector.load(options.checkpoint, device=device, ema=options.ema)
    output_dir = Path(options.output_dir) if options.output_dir else beside(options.checkpoint)
    data = given.on(Given({"data": asdict(detector.data)})).config().data
    index = load_index(data, "val", need_boxes=False)
    dataset = build_dataset(
        data, index, train=False, mean=detector.mean, std=detector.std, classes=detector.classes
    )
    make_output_dir(output_dir / "eval")
    console(index.report(detector.model.transformer.num_queries))
    batches = eval_loader(
        dataset,
        batch_size=options.batch_size or detector.batch_size,
        num_workers=data.num_workers,
        rank=world.rank,
        world_size=world.size,
    )
    evaluator = _evaluator(options, index.coco_gt, dataset.label_to_category)
    result, _ = evaluate(
        detector.model,
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


def _evaluator(options: EvalOptions, coco_gt: COCO, labels: dict[int, int]) -> CocoEvaluator:
    return CocoEvaluator(coco_gt, labels, backend=options.evaluator, max_dets=options.max_dets)


def _tell(
    options: EvalOptions,
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
