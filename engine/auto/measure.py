"""A few training steps on this machine, on noise: what images of two sizes cost."""

import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from configs.schema import Config
from configs.tiles import TrainTileOptions
from datasets.build import build_dataset, split_batch
from datasets.dataset import CocoDetection
from datasets.index import CocoIndex
from datasets.workers import loader_processes
from engine.auto.choices import Machine, Measurement, SizeTrial
from engine.auto.precision import with_precision
from engine.build import assemble_trainer, build_loaders
from engine.checkpoint import CheckpointFolder
from engine.probe import random_batch, total_memory
from engine.run_log import RunLog
from engine.trainer import Trainer
from models.build import ALL_STAGES, build_model, freeze
from util.batch import EffectiveBatch
from util.cores import available_cores
from util.device import has_bfloat16
from util.world import World

_LONGEST = {"cpu": 640}  # pixels of a short side that is tried; costs grow with the pixels
_LONGEST_OF_GPU = 1024
_AT_ONCE = 2  # images
_UNTIMED, _TIMED = 1, 3  # steps of each size
_LOADED = 8  # images
_MORE = 1.5  # memory in a step, as a factor on what is kept for the backward pass
_PER_WEIGHT = 4  # copies: the weight, its gradient and two moments


def machine_of(device: torch.device, processes: int) -> Machine:
    """Return what a plan has to know of the machine on which the processes compute."""
    memory = total_memory(device)
    return Machine(device.type == "cuda", has_bfloat16(device), memory, processes)


def measure(config: Config, train: CocoIndex, val: CocoIndex, device: torch.device) -> Measurement:
    """Time steps of a run's model from random weights, as `Trainer.train_step` makes them.

    Two sizes are tried, at most as large as the run's: half of it, and all.

    Raises:
        UserError: a step does not fit into memory.
    """
    side = min(config.data.eval_scale, _LONGEST.get(device.type, _LONGEST_OF_GPU))
    longest = round(side * config.data.max_size / max(config.data.train_scales))
    sizes: dict[str, Any] = {"eval_scale": side, "train_scales": (side,), "max_size": longest}
    data = replace(config.data, cache_images=0.0, **sizes)
    optim = replace(config.optim, batch_size=_AT_ONCE, effective_batch_size=0, compile=False)
    # what is cut into tiles is already: they are the images of both indices
    config = replace(config, data=data, optim=optim, tiles=TrainTileOptions())
    config = with_precision(config, device, World())
    with tempfile.TemporaryDirectory() as folder:
        trainer, train_set = throwaway_trainer(config, train, val, device, Path(folder))
        boxes = int(train.boxes_per_image.max())
        shapes = [(max(s, 32), max(round(s * longest / side), 32)) for s in (side // 2, side)]
        small, large = (_try(trainer, shape, boxes) for shape in shapes)
        if small.pixels == large.pixels:  # of tiny images
            small = replace(small, pixels=small.pixels // 2)
        assert trainer.validation is not None
        evaluation = trainer.validation.estimate_seconds(trainer.detector, None) / len(val)
    weights = sum(p.nbytes for p in trainer.detector.parameters())
    loaders = available_cores()
    if device.type == "cuda":
        loaders = max(loader_processes(config.data.num_workers), 1)
    return Measurement(
        trials=(small, large),
        evaluation=evaluation,
        loading=_loading(train_set) / loaders,
        fixed_memory=float(_PER_WEIGHT * weights),
    )


def throwaway_trainer(
    config: Config, train: CocoIndex, val: CocoIndex, device: torch.device, folder: Path
) -> tuple[Trainer, CocoDetection]:
    """Return a trainer from random weights that writes nothing, and its training set."""
    optim = config.optim
    model = build_model(
        config.model,
        num_classes=len(train.classes),
        frozen_stages=optim.frozen_stages if optim.lr_backbone else ALL_STAGES,
        recipes=config.recipes,
    ).to(device)
    freeze(model, optim.freeze)
    mean, std = model.backbone.mean, model.backbone.std
    train_set, val_set = (
        build_dataset(
            config.data,
            index,
            train=index is train,
            mean=mean,
            std=std,
            classes=train.classes,
            epochs=None if optim.max_hours else optim.epochs,
        )
        for index in (train, val)
    )
    share = split_batch(0, max_size=optim.batch_size)
    loader, val_batches = build_loaders(
        config, train_set, val_set, share, num_workers=0, on_gpu=device.type == "cuda"
    )
    trainer = assemble_trainer(
        config,
        model,
        loader,
        val_set,
        val_batches,
        world=World(),
        device=device,
        run_log=RunLog(folder, enabled=False),
        folder=CheckpointFolder(folder, keep=1),
        identity={},
    )
    return trainer, train_set


def _try(trainer: Trainer, shape: tuple[int, int], boxes: int) -> SizeTrial:
    """Make some steps on images of a shape (height, width)."""
    device, pixels = trainer.device, shape[0] * shape[1]
    batch = random_batch(_AT_ONCE, shape, boxes)
    whole = EffectiveBatch(_AT_ONCE * boxes, boxes, trainer.seed, 0)
    trainer.model.train()
    seconds, memory = [], 0.0
    for number in range(_UNTIMED + _TIMED):
        first, kept = number == 0, _Kept()
        hooks: AbstractContextManager[Any] = nullcontext()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif first:
            hooks = saved_tensors_hooks(kept.add, kept.unchanged)
        trainer.timer.restart()
        started = time.perf_counter()
        with hooks, trainer.guards.watch(number, [batch]):
            trainer.train_step([batch], whole)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - started) / _AT_ONCE)
        if device.type == "cuda":
            memory = max(memory, float(torch.cuda.max_memory_allocated(device)))
        elif first:
            memory = _MORE * kept.bytes
    if device.type == "cuda":
        weights = sum(p.nbytes for p in trainer.detector.parameters())
        memory = max(memory - _PER_WEIGHT * weights, 0.0)
    return SizeTrial(pixels, median(seconds[_UNTIMED:]), memory / _AT_ONCE)


class _Kept:
    """Counts the bytes that are kept for the backward pass, each storage once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """The bytes of all storages."""
        return sum(self._sizes.values())

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is kept."""
        storage = tensor.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @staticmethod
    def unchanged(tensor: Tensor) -> Tensor:
        """Return what was kept."""
        return tensor


def _loading(dataset: CocoDetection) -> float:
    """Return the seconds that one process takes to read and prepare an image."""
    count = min(_LOADED, len(dataset))
    started = time.perf_counter()
    for i in range(count):
        dataset[i * len(dataset) // count]
    return (time.perf_counter() - started) / count
