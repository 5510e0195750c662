"""`--precision auto`: bfloat16 where it is faster, else float32."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch

from configs.schema import Config, PrecisionName
from engine.benchmark.measure import synchronise
from engine.optim import Precision
from engine.probe import random_batch
from models.build import ALL_STAGES, build_criterion, build_model, freeze
from util.console import log
from util.device import has_bfloat16
from util.main_process import from_main
from util.random_state import random_state_kept
from util.world import World

_ROUNDS = 3  # after one that is not timed
_GAIN = 0.9  # of the time in float32: what saves less is not worth rounding for
_CLASSES, _BOXES = 80, 10


def with_precision(config: Config, device: torch.device, world: World) -> Config:
    """Return a run's options with a number format in place of `auto`, alike in all processes."""
    if config.optim.precision != "auto":
        return config
    chosen = from_main(world, lambda: choose_precision(config, device))
    return replace(config, optim=replace(config.optim, precision=chosen))


def choose_precision(config: Config, device: torch.device) -> PrecisionName:
    """Return "bf16" where the device has it and a step is faster with it, else "fp32".

    A GPU that has bfloat16 is faster with it. A CPU may be slower, so that the steps of a model
    with random weights on one image of noise are timed, by turns. The state of random numbers
    stays as it was.
    """
    if not has_bfloat16(device):
        log.info(f"precision auto: fp32 ({device.type} has no bfloat16)")
        return "fp32"
    if device.type == "cuda":
        log.info("precision auto: bf16 (this GPU has it)")
        return "bf16"
    with random_state_kept():
        seconds = time_steps(config, device, ("fp32", "bf16"))
    chosen: PrecisionName = "bf16" if seconds["bf16"] < _GAIN * seconds["fp32"] else "fp32"
    times = ", ".join(f"{name} {time:.2f} s" for name, time in seconds.items())
    log.info(f"precision auto: {chosen} (a step of one image: {times})")
    return chosen


def time_steps(config: Config, device: torch.device, names: Sequence[str]) -> Mapping[str, float]:
    """Return the median seconds that forward and backward of an image take in each precision."""
    optim, side = config.optim, config.data.eval_scale
    model = build_model(
        config.model,
        num_classes=_CLASSES,
        frozen_stages=optim.frozen_stages if optim.lr_backbone else ALL_STAGES,
        recipes=config.recipes,
    )
    freeze(model, optim.freeze)
    model.to(device).train()
    criterion = build_criterion(config.loss)
    batch = random_batch(1, (side, min(round(side * 4 / 3), config.data.max_size)), _BOXES)
    assert batch.images is not None
    images = batch.images.to(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 + _ROUNDS):
        for name in names:
            synchronise(device)
            started = perf_counter()
            with Precision(name, device).autocast():
                outputs = model(images, batch.targets)
            torch.autograd.backward(criterion(outputs, batch.targets)["loss"])
            synchronise(device)
            seconds[name].append(perf_counter() - started)
            model.zero_grad(set_to_none=True)
    return {name: median(times[1:]) for name, times in seconds.items()}
