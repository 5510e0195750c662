"""`main.py benchmark`: what a model costs, and how fast it is on this machine."""

import json
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from configs.detection import WEIGHTS_OR_EXPORTED
from configs.load import read_options
from configs.options import Checked, option
from configs.schema import PrecisionName
from datasets.dataset import find_images
from datasets.images import READ_ERRORS, limit_pixels
from datasets.sample import resized_size
from engine.benchmark.compare import hugging_face_twin, logits_of
from engine.benchmark.counts import PARTS, flops_by_part, parameters_by_part
from engine.benchmark.exported import open_files, timed_beside
from engine.benchmark.measure import peak_during, time_in_turn
from engine.benchmark.stages import Size, decode, generated_image, prepare, time_stages
from engine.benchmark.text import as_text
from engine.detector import Detector
from engine.exported.model import ExportedModel, is_exported
from engine.optim import Precision
from models.build import build_model
from models.recipes import KnownRecipes
from models.weights.load import load_pretrained
from ops.backends import chosen
from util.batch import PaddedBatch
from util.classes import Classes
from util.console import console
from util.device import pick_device
from util.errors import ConfigError, DataError
from util.files import write_atomic
from util.version import __version__


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(Checked):
    """Which model is measured, and on what."""

    checkpoint: str = option("", WEIGHTS_OR_EXPORTED)
    config: str = option("", "in place of it: a preset or YAML file, with random weights")
    num_labels: int = option(80, "classes of a model that --config builds", low=1, most=100000)
    size: str = option(
        "", "HEIGHTxWIDTH of the model's input (default: as evaluation prepares the first image)"
    )
    input: tuple[str, ...] = option((), "images, folders or globs (default: a generated image)")
    batch_sizes: tuple[int, ...] = option((1,), "images per forward pass", low=1, most=4096)
    precision: tuple[PrecisionName, ...] = option(("fp32",), "arithmetic of the model")
    threads: int = option(0, "threads on the CPU; 0: as PyTorch chooses", low=0, most=4096)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    runs: int = option(20, "timed forward passes of each kind", low=1, most=100000)
    warm_up: int = option(3, "forward passes before them, which do not count", low=0, most=100000)
    against: Literal["none", "hugging_face"] = option(
        "none", "time transformers' model with the same weights in turn"
    )
    exported: tuple[str, ...] = option(
        (), "exported files of the checkpoint (.onnx, .xml, .pt2) to time beside it in turn"
    )
    output: str = option("", "JSON file to write")


SECTIONS = {"benchmark": BenchmarkOptions}
Row = dict[str, Any]


def main(options: BenchmarkOptions) -> int:
    """Print what a model costs and how fast it is; write it as JSON."""
    if bool(options.checkpoint) == bool(options.config):
        raise ConfigError("benchmark: give either `checkpoint FILE` or `config FILE`.")
    alone = is_exported(options.checkpoint)
    if alone and (options.against != "none" or options.precision != ("fp32",)):
        raise ConfigError(
            "checkpoint: an exported file computes as it was exported, and cannot be rebuilt in "
            "transformers. Leave out `precision` and `against`."
        )
    size = parse_size(options.size)
    if options.threads:
        torch.set_num_threads(options.threads)
    detector, model_options = load(options)
    with tempfile.TemporaryDirectory() as folder:
        paths = find_images(options.input) if options.input else [generated_image(Path(folder))]
        report = measure(detector, paths, size, options, model_options)
    console(as_text(report))
    if options.output:
        write_atomic(Path(options.output), json.dumps(report, indent=1) + "\n")
        console(f"written: {options.output}")
    return 0


def parse_size(text: str) -> Size | None:
    """Return the (height, width) of HEIGHTxWIDTH, None where nothing is given.

    Raises:
        ConfigError: it is something else.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text, re.ASCII | re.IGNORECASE)
    if match is None or min(size := (int(match[1]), int(match[2]))) < 16:
        raise ConfigError(
            f"size: must be HEIGHTxWIDTH in pixels, each at least 16, not '{text[:60]}'. "
            "Write, for instance, 800x1066."
        )
    return size


def load(options: BenchmarkOptions) -> tuple[Detector, Mapping[str, Any]]:
    """Return the detector that is measured, and the options of its model."""
    if options.checkpoint:
        detector = Detector.load(options.checkpoint, device=options.device)
        # only a comparison asks for them
        wanted = options.against != "none"
        return detector, load_pretrained(options.checkpoint).model_options if wanted else {}
    given = read_options(options.config, {}, KnownRecipes())
    if given.auto:
        raise ConfigError(
            "config auto: works with `train` and `plan` only. Name a preset or a file."
        )
    config = given.config()
    device = pick_device(options.device)
    model = build_model(config.model, num_classes=options.num_labels, recipes=config.recipes)
    labels = tuple(range(options.num_labels))
    detector = Detector(
        model,
        Classes(labels, ("",) * len(labels)),
        data=config.data,
        mean=model.backbone.mean,
        std=model.backbone.std,
        device=device,
    )
    return detector, asdict(config.model)


def measure(
    detector: Detector,
    paths: Sequence[Path],
    size: Size | None,
    options: BenchmarkOptions,
    model_options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all numbers as JSON has them.

    Raises:
        DataError: an image cannot be read.
    """
    data, device = detector.data, detector.device
    limit_pixels(data.max_pixels)
    try:
        samples = [decode(path) for path in paths[: max(options.batch_sizes)]]
    except READ_ERRORS as error:
        raise DataError(f"`input`: an image cannot be read: {error}. Check the files.") from error
    size = size or resized_size(*samples[0].size, data.eval_scale, data.max_size)
    batches = {
        count: prepare(
            [samples[i % len(samples)] for i in range(count)], size, detector.mean, detector.std
        ).to(device)
        for count in options.batch_sizes
    }
    files = open_files(options.exported, detector)
    arithmetic = {name: Precision(name, device) for name in options.precision}
    common: dict[str, Any] = {"runs": options.runs, "warm_up": options.warm_up, "device": device}
    stages = time_stages(
        detector.network,
        detector.postprocess,
        paths,
        size,
        mean=detector.mean,
        std=detector.std,
        autocast=arithmetic[options.precision[0]].autocast,
        **common,
    )
    rows = [
        forward_row(detector, batch, kind, common)
        for kind in arithmetic.values()
        for batch in batches.values()
    ]
    report: dict[str, Any] = {
        "machine": machine(detector),
        "size": list(size),
        "images": len(paths) if options.input else "generated",
        "runs": options.runs,
        "warm_up": options.warm_up,
        "parts": {} if is_exported(options.checkpoint) else parts_of(detector, size),
        "stages": {
            "precision": precision_of(detector, options.precision[0]),
            **{name: times.to_json() for name, times in stages.items()},
        },
        "forward": rows,
    }
    if files:
        report["exported"] = [
            timed_beside(detector, files, batch, common) for batch in batches.values()
        ]
    if options.against == "hugging_face":
        twin = hugging_face_twin(detector, model_options)
        report["hugging_face"] = [
            compared_row(detector, twin, batch, kind, common)
            for kind in arithmetic.values()
            for batch in batches.values()
        ]
    return report


def forward_row(
    detector: Detector, batch: PaddedBatch, kind: Precision, common: Mapping[str, Any]
) -> Row:
    """Return times, throughput and peak memory of forward passes."""

    @torch.inference_mode()
    def forward() -> None:
        with kind.autocast():
            detector.network(batch)

    (times,) = time_in_turn([forward], **common)
    peak = peak_during(forward, detector.device)
    count = len(batch.images)
    return {
        "precision": precision_of(detector, kind.name),
        "batch_size": count,
        **times.to_json(),
        "images_per_second": count / times.median,
        "peak_memory_bytes": peak,
    }


def precision_of(detector: Detector, asked: str) -> str:
    """Return what a detector computes in: `asked`, unless it is an exported file."""
    network = detector.network
    return network.about.precision if isinstance(network, ExportedModel) else asked


def compared_row(
    detector: Detector,
    twin: torch.nn.Module,
    batch: PaddedBatch,
    kind: Precision,
    common: Mapping[str, Any],
) -> Row:
    """Time both models in turn, and say how far their logits are apart."""
    logits: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def ours() -> None:
        with kind.autocast():
            logits["ours"] = detector.model(batch)["pred_logits"]

    @torch.inference_mode()
    def theirs() -> None:
        with kind.autocast():
            logits["theirs"] = logits_of(twin, batch)

    own, other = time_in_turn([ours, theirs], **common)
    apart = (logits["ours"].float().sigmoid() - logits["theirs"].float().sigmoid()).abs()
    return {
        "precision": kind.name,
        "batch_size": len(batch.images),
        "ours": own.to_json(),
        "theirs": other.to_json(),
        "times_as_fast": other.median / own.median,
        "largest_difference_of_scores": float(apart.max()),
    }


def parts_of(detector: Detector, size: Size) -> dict[str, dict[str, int]]:
    """Return what each part of a model costs for an image."""
    flops, parameters = flops_by_part(detector.model, 1, size), parameters_by_part(detector.model)
    return {name: {"parameters": parameters[name], "flops": flops[name]} for name in PARTS}


def machine(detector: Detector) -> dict[str, Any]:
    """Return what a figure depends on, in addition to the model."""
    device, network = detector.device, detector.network
    cuda = device.type == "cuda"
    if isinstance(network, ExportedModel):
        backend = network.session.runtime
    else:
        backend = chosen(None, device).name
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "attention_backend": backend,
        "deformable_detr": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
