"""The way from an image file to its boxes, stage by stage."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from datasets.images import read_rgb
from datasets.sample import Sample, normalise, resize, to_pixels
from engine.benchmark.measure import Times, synchronise
from models.postprocess import PostProcess
from util.batch import PaddedBatch, pad_images

Size = tuple[int, int]  # (height, width)
STAGES = ("decode", "preparation", "model", "post-processing")
_GENERATED = (480, 640)  # as most images of COCO


def generated_image(folder: Path) -> Path:
    """Write a JPEG of soft shapes and a little noise, the same each time; return its path."""
    height, width = _GENERATED
    draw = np.random.default_rng(0)
    soft = Image.fromarray(draw.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = (pixels + draw.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
    path = folder / "generated.jpg"
    Image.fromarray(noisy).save(path, quality=90)
    return path


def decode(path: Path) -> Sample:
    """Read an image as the model's preparation takes it, without boxes.

    Raises:
        OSError: it cannot be read; see `READ_ERRORS`.
    """
    pixels = to_pixels(read_rgb(path, None))
    size = (pixels.shape[1], pixels.shape[2])
    return Sample(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), size)


def prepare(
    samples: Sequence[Sample], size: Size, mean: Sequence[float], std: Sequence[float]
) -> PaddedBatch:
    """Resize images to (height, width), as evaluation does, and normalise them."""
    resized = (resize(sample, size, exact=True) for sample in samples)
    return pad_images([normalise(sample, mean, std, exact=True).image for sample in resized])


def time_stages(
    model: nn.Module,
    postprocess: PostProcess,
    paths: Sequence[Path],
    size: Size,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    runs: int,
    warm_up: int,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Times]:
    """Return the times of each stage, one image after the other, over and over."""
    taken: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for number, path in enumerate(islice(cycle(paths), warm_up + runs)):
        moments = list(_moments(path, model, postprocess, size, mean, std, device, autocast))
        if number >= warm_up:
            for stage, start, end in zip(STAGES, moments[:-1], moments[1:], strict=True):
                taken[stage].append(end - start)
    return {stage: Times(tuple(seconds)) for stage, seconds in taken.items()}


@torch.inference_mode()
def _moments(
    path: Path,
    model: nn.Module,
    postprocess: PostProcess,
    size: Size,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Iterator[float]:
    """Detect in one image; yield the time before the first stage and after each."""
    yield time.perf_counter()
    sample = decode(path)
    yield time.perf_counter()
    batch = prepare([sample], size, mean, std)
    yield time.perf_counter()
    with autocast():
        outputs = model(batch.to(device))
    synchronise(device)
    yield time.perf_counter()
    found = postprocess(outputs, torch.tensor([sample.size], device=device))
    for detections in found:
        for tensor in detections.values():
            tensor.cpu()
    yield time.perf_counter()
