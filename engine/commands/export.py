"""`main.py export`: a file for other runtimes, which is run and compared before it is kept."""

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from configs.detection import WEIGHTS, DetectionOptions
from configs.options import Checked, option
from configs.schema import ModelConfig
from datasets.dataset import CocoDetection, find_images
from engine.detector import Detector
from engine.exported.about import SUFFIXES, About
from engine.exported.half import ISLANDS, halved
from engine.exported.model import ExportedModel
from engine.exported.proof import TIE, Differences, prepared_images, prove
from engine.exported.write import write
from models.weights.load import load_pretrained
from util.console import console
from util.errors import CheckpointError, ConfigError, DataError
from util.files import make_output_dir, refuse_overwriting

FAILED = 1  # exit code: the file was written, and is not what it should be
_TOLERANCE = 1e-4
_AP_TOLERANCE = 0.001
# In half precision, proposals of nearly the same score are ranked in another order, and queries
# that are told apart by rank then change their contents: they cannot be compared one by one.
_HALF_AP_TOLERANCE = 0.005
_LEAST_AP = 0.01  # below, that two APs are alike says nothing
# Of these options, values other than the usual ones have not been exported.
_SELDOM = (
    "dcn",
    "encoder",
    "encoder_attn",
    "encoder_updates",
    "enc_fusion",
    "neck",
    "position_embedding",
)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Checked):
    """What is exported, and how it is proven."""

    checkpoint: str = option("", WEIGHTS)
    to: Literal["onnx", "openvino", "torch_export"] = option(
        "onnx", "format: onnx (.onnx), openvino (.xml and .bin) or torch_export (.pt2)"
    )
    output: str = option("", "file to write")
    precision: Literal["fp32", "fp16"] = option(
        "fp32",
        "arithmetic of convolutions and linear layers; all else is fp32, images and boxes "
        "too. fp16 halves the file, and is proven by AP",
    )
    postprocess: bool = option(
        False,
        "put the selection of detections into the file",
        off="leave the selection of detections to whoever runs the file",
    )
    verify: str = option("", "prove this exported file, in place of writing one")
    input: tuple[str, ...] = option((), "images, folders or globs for the proof (default: noise)")
    num_images: int = option(3, "images for the proof", low=1, most=1000)
    val_images: str = option(
        "", "folder of images on which APs are compared (with fp16, default: the run's own)"
    )
    val_annotations: str = option("", "COCO-format JSON file of these")
    tolerance: float | None = option(
        None,
        "largest difference of a score, or of a box as a fraction of the image (default: "
        "1e-4; none with fp16)",
        above=0,
    )
    ema: bool = option(
        True,
        "use a checkpoint's averaged weights, if it has them",
        off="use the trained weights, even if the checkpoint has averaged ones",
    )


SECTIONS = {"export": ExportOptions, "detection": DetectionOptions}
DEFAULTS = {"detection": "the checkpoint's"}


def main(options: ExportOptions, detection: DetectionOptions) -> int:
    """Write an exported file and prove it, or prove one; 1 if it differs too much."""
    output = _output(options)
    paths = find_images(options.input) if options.input else []
    detector = Detector.load(options.checkpoint, device="cpu", ema=options.ema, **asdict(detection))
    about = _about(detector, options)
    if options.verify:
        exported = _opened(output, detection)
        truth = _truth(options, detector, half=_is_half(exported))
        return 0 if _proven(options, detector, exported, paths, truth) else FAILED
    refuse_overwriting([Path(options.checkpoint)], [output])
    # before the export, which takes longer than to see that its proof lacks data
    truth = _truth(options, detector, half=options.precision == "fp16")
    make_output_dir(output.parent, "output")
    # proven under its own name in a folder of its own: a file in its place has been proven
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / output.name
        model = detector.model
        if options.precision == "fp16":
            model, count = halved(model)
            console(f"in float16: {count} convolutions and linear layers; in float32: {ISLANDS}")
        try:
            write(model, about, written, options.to)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {_in_the_way(options)}") from error
        try:
            exported = _opened(written, detection)
        except CheckpointError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            reason = reason.replace(str(written), output.name)[:200]
            raise CheckpointError(
                f"{options.to}: the runtime cannot open what was exported ({reason}). "
                f"{_in_the_way(options)}"
            ) from error
        if not _proven(options, detector, exported, paths, truth):
            console(f"not kept: {output}")
            return FAILED
        for part in sorted(Path(folder).iterdir()):  # OpenVINO's .bin comes before its .xml
            os.replace(part, output.parent / part.name)
    megabytes = sum(part.stat().st_size for part in _parts(output)) / 1e6
    console(f"written: {output} ({megabytes:.1f} MB)")
    return 0


def _output(options: ExportOptions) -> Path:
    """Return the file to write or prove.

    Raises:
        ConfigError: none is named, or its name does not fit the format.
    """
    if bool(options.output) == bool(options.verify):
        raise ConfigError("export: give either `output FILE` or `verify FILE`.")
    if bool(options.val_images) != bool(options.val_annotations):
        raise ConfigError("export: give both `val_images` and `val_annotations`, or neither.")
    path = Path(options.output or options.verify)
    known = {SUFFIXES[options.to]} if options.output else set(SUFFIXES.values())
    if path.suffix not in known:
        raise ConfigError(
            f"export: '{path.name}' must end in {' or '.join(sorted(known))}. Rename it, or choose "
            "another format by `to`."
        )
    return path


def _parts(output: Path) -> list[Path]:
    weights = [output.with_suffix(".bin")] if output.suffix == SUFFIXES["openvino"] else []
    return [output, *weights]


def _about(detector: Detector, options: ExportOptions) -> About:
    """Return what the file says about itself.

    Raises:
        ConfigError: an exported file is to be exported, or an option stands in the way.
    """
    nms = detector.data.nms_iou
    if options.postprocess and nms is not None and nms < 1:
        raise ConfigError(
            f"postprocess: NMS (nms_iou {nms}) cannot be part of the file. Leave `postprocess` "
            "out, or add `nms_iou 1`."
        )
    detector.model  # noqa: B018 - an exported file has none
    return About(
        classes=detector.classes,
        data=asdict(detector.data),
        mean=tuple(detector.mean),
        std=tuple(detector.std),
        thresholds=detector.thresholds,
        batch_size=detector.batch_size,
        num_queries=detector.network.num_queries,
        finished=options.postprocess,
        num_select=detector.data.num_select,
        tiles=asdict(detector.tiles),
        precision=options.precision,
    )


def _in_the_way(options: ExportOptions) -> str:
    """Return a sentence on the options that a model could not be exported for."""
    chosen, usual = load_pretrained(options.checkpoint).model_options, asdict(ModelConfig())
    seldom = [
        f"`{name} {chosen[name]}`"
        for name in _SELDOM
        if chosen.get(name, usual[name]) != usual[name]
    ]
    if seldom:
        return f"What stands in the way is {' or '.join(seldom)}: train without it."
    if options.precision == "fp16":
        return "Try `precision fp32`."
    return "Try another version of PyTorch."


def _opened(path: Path, detection: DetectionOptions) -> Detector:
    # eval_scale and max_size are those that it was exported with
    return Detector.load(
        str(path),
        num_select=detection.num_select,
        nms_iou=detection.nms_iou,
        max_pixels=detection.max_pixels,
    )


def _is_half(exported: Detector) -> bool:
    assert isinstance(exported.network, ExportedModel)
    return exported.network.about.precision == "fp16"


def _truth(options: ExportOptions, detector: Detector, *, half: bool) -> CocoDetection | None:
    """Return the data on which APs are compared, None if they are not.

    Raises:
        ConfigError: half precision must be proven, and the run's own data cannot be read.
        DataError: the data that options name cannot be.
    """
    data = detector.data
    if options.val_images:
        data = replace(
            data,
            coco_path="",
            data_path="",
            val_images=options.val_images,
            val_annotations=options.val_annotations,
        )
    elif not half:
        return None
    try:
        return detector.validation_set(data)
    except DataError as error:
        if options.val_images:
            raise
        raise ConfigError(
            "precision fp16: is proven by AP, and validation data of the checkpoint's run cannot "
            "be read here. Give `val_images` and `val_annotations`."
        ) from error


def _proven(
    options: ExportOptions,
    detector: Detector,
    exported: Detector,
    paths: list[Path],
    truth: CocoDetection | None,
) -> bool:
    """Print how far a file is from its checkpoint; return whether that is near enough."""
    differences = prove(detector, exported, prepared_images(detector, paths, options.num_images))
    assert isinstance(exported.network, ExportedModel)
    half = _is_half(exported)
    tolerance = options.tolerance or (None if half else _TOLERANCE)
    console(_report(differences, exported.network.session.runtime, tolerance))
    # a file that computes no numbers, or other shapes, is told by an infinite difference
    largest = differences.largest
    near = largest < math.inf if tolerance is None else largest <= tolerance
    if near and truth is not None:
        near = _same_ap(detector, exported, options, truth, half=half)
    if not near:
        console("the exported file differs too much from its checkpoint")
    return near


def _same_ap(
    detector: Detector,
    exported: Detector,
    options: ExportOptions,
    truth: CocoDetection,
    *,
    half: bool,
) -> bool:
    """Print the AP of both; return whether they are near enough to each other."""
    place = (options.val_images, options.val_annotations) if options.val_images else ()
    ours = detector.measure(truth)[0].stats["AP"]
    ours = ours if ours >= 0 else math.nan  # as `evaluate` has it
    other = exported.evaluate(*place)["AP"]  # reads the data as the file says
    tolerance = _HALF_AP_TOLERANCE if half else _AP_TOLERANCE
    console(f"AP: {ours:.4f} of the checkpoint, {other:.4f} of the file; tolerance {tolerance:g}")
    if half and not ours >= _LEAST_AP:
        console(f"an AP below {_LEAST_AP} proves nothing: name other images by --val_images")
        return False
    return abs(ours - other) <= tolerance


def _report(found: Differences, runtime: str, tolerance: float | None) -> str:
    limit = "AP decides" if tolerance is None else f"tolerance {tolerance:g}"
    text = (
        f"proof in {runtime}, {found.images} times an image: largest difference of scores "
        f"{found.scores:.2g}, of boxes {found.boxes:.2g}; {limit}"
    )
    if found.left_out:
        total = found.compared + found.left_out
        text += f"; left out: {found.left_out} of {total} within {TIE:g} of the last selected"
    return text
