"""Between epochs: what the log says of the last one, and the evaluation of its weights."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from datasets.collate import collate
from datasets.dataset import CocoDetection
from datasets.tiled import as_tiles
from datasets.tiles import Tiling
from engine.averages import official_log_values
from engine.data_report import report_unreadable
from engine.evaluation.analysis import draw_gallery, evenly_spaced
from engine.evaluation.evaluate import detect, evaluate
from engine.evaluation.evaluator import EvalResult, Evaluator, save_results
from engine.evaluation.matching import Truth
from engine.evaluation.outcomes import thresholds_by_name
from engine.guards.timer import shares
from engine.metrics import StepLog
from engine.optim import Precision
from engine.run_log import RunLog
from models.criterion import SetCriterion
from models.postprocess import PostProcess
from util.batch import Batch
from util.console import log
from util.errors import UserError
from util.world import World

_SAMPLED = 6  # images by which the time of an evaluation is estimated


def training_values(steps: StepLog, label: str, output_dir: Path) -> dict[str, Any]:
    """Return what the log says of the steps of an epoch, and print how they spent their time.

    Images that could not be read go to the data report.
    """
    if steps.times:
        log.info(f"{label}: {shares(steps.times)}")
    means = official_log_values(steps.averages.means(), steps.criterion)
    unreadable = steps.guards.unreadable.images
    return {
        **{f"train_{name}": value for name, value in means.items()},
        "train_unreadable_images": report_unreadable(output_dir, unreadable, steps.world),
        "train_skipped_steps": steps.guards.nonfinite.total,
    }


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(kw_only=True)
class Validation:
    """Evaluates models on the validation data, as its share in each process of the run."""

    dataset: CocoDetection
    batches: Iterable[Batch]
    postprocess: PostProcess
    criterion: SetCriterion
    precision: Precision
    world: World
    device: torch.device
    log: RunLog
    output_dir: Path
    num_images: int  # drawn after each evaluation
    tiling: Tiling | None = None  # of large images; `batches` are those of their tiles then

    def __call__(
        self,
        model: nn.Module,
        averaged: nn.Module | None,
        *,
        step: int,
        label: str,
        stopping: Callable[[], bool],
    ) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
        """Evaluate a model after `step` steps, and its averaged weights if there are some.

        Returns COCO's numbers by name and, in the main process, the best threshold of each class,
        both of the averaged weights where there are some, as `eval` and `predict` use them too;
        and all values for the log.

        Raises:
            Interrupted: `stopping()` held between two batches.
            UserError: the model's outputs are not finite.
        """
        stats, thresholds, values = self._evaluate(model, step, label, "", stopping)
        if averaged is not None:
            label = f"{label}: averaged weights"
            stats, thresholds, more = self._evaluate(averaged, step, label, "ema_", stopping)
            values |= more
        return stats, thresholds, values

    def estimate_seconds(self, model: nn.Module, averaged: nn.Module | None) -> float:
        """Estimate how long an evaluation takes, by a few of the images that can be read."""
        dataset = self.dataset if self.tiling is None else as_tiles(self.dataset, self.tiling)
        positions = np.linspace(0, len(dataset) - 1, _SAMPLED).astype(int).tolist()
        batches = [collate([dataset[position]]) for position in positions]
        times = [time.perf_counter()]
        with torch.compiler.set_stance("force_eager"):
            for _ in detect(
                model,
                self.postprocess,
                [batch for batch in batches if batch.images is not None],
                device=self.device,
                description=None,
                on_outputs=self.criterion,
                autocast=self.precision.autocast,
            ):
                times.append(time.perf_counter())
        seconds = [after - before for before, after in pairwise(times)][1:]  # the first warms up
        images = -(-len(dataset) // self.world.size) * (1 if averaged is None else 2)
        return images * sum(seconds) / max(len(seconds), 1)

    def _evaluate(
        self, model: nn.Module, step: int, label: str, prefix: str, stopping: Callable[[], bool]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
        share_statistics(model, self.world)
        started, truth = time.perf_counter(), Truth.of(self.dataset.index)
        evaluator = Evaluator(truth, self.dataset.label_to_category)
        try:
            # images of many sizes, not worth compiling for
            with torch.compiler.set_stance("force_eager"):
                result, losses = evaluate(
                    model,
                    self.postprocess,
                    self.batches,
                    evaluator,
                    device=self.device,
                    criterion=self.criterion,
                    autocast=self.precision.autocast,
                    world=self.world,
                    stopping=stopping,
                    tiling=self.tiling,
                )
        except FloatingPointError as error:
            raise UserError(
                f"evaluation after step {step}: {error}. The run diverged or the data is not "
                "finite: resume from last.pth with a lower `lr`, or start a new run with "
                "`warmup_steps`."
            ) from error
        stats = result.stats
        log.info(
            f"{label}: AP {_shown(stats['AP'])}, AP50 {_shown(stats['AP50'])}, step {step}, "
            f"evaluated in {time.perf_counter() - started:.0f} s"
        )
        thresholds: dict[str, float] = {}
        if self.world.main:
            thresholds = thresholds_by_name(evaluator)
            self._write(result, losses, evaluator, step, prefix)
        values = {
            **{f"{prefix}test_{name}": value for name, value in losses.items()},
            f"{prefix}test_coco_eval_bbox": list(stats.values()),
        }
        return stats, thresholds, values

    def _write(
        self,
        result: EvalResult,
        losses: Mapping[str, float],
        evaluator: Evaluator,
        step: int,
        prefix: str,
    ) -> None:
        """Write results, curves and some images with what was found in them."""
        truth, detections = evaluator.truth, evaluator.detections()
        save_results(self.output_dir, result, evaluator)
        shown = {**result.stats, **{n: losses[n] for n in ("loss",) if n in losses}}
        self.log.scalars(step - 1, {f"{prefix}val/{name}": value for name, value in shown.items()})
        ids = evenly_spaced(truth.image_ids.tolist(), self.num_images)
        folder = self.output_dir / "pictures"
        for image_id, image in draw_gallery(
            detections, truth, ids, self.dataset.read_image
        ).items():
            folder.mkdir(exist_ok=True)
            image.save(folder / f"image_{image_id}.png")
            self.log.image(f"{prefix}val/image_{image_id}", image, step - 1)


@torch.no_grad()
def share_statistics(model: nn.Module, world: World) -> None:
    """Give all processes the main one's batch-norm statistics, which are those that are saved.

    In training each takes in its own images, until the next step begins with the main one's.
    """
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    if world.size == 1 or not buffers:
        return
    values = world.broadcast([b.cpu() for b in buffers] if world.main else [])
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def _shown(value: float) -> str:
    return "n/a" if value < 0 else f"{value:.4f}"
