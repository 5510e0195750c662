"""The evaluation of a run under way: of its weights, and of their averages."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.evaluation.evaluate import PostProcessor, evaluate
from engine.evaluation.evaluator import EvalResult, Evaluator, save_results
from engine.evaluation.outcomes import thresholds_by_name
from engine.run_log import RunLog
from engine.train import StepRunner, diverged
from util.batch import Batch
from util.console import console
from util.distributed import World


@dataclass
class Validation:
    """What evaluating a run needs.

    `draw` makes images from the evaluator, by image id; they go to TensorBoard and to `pictures/`.
    `thresholds` are the last evaluation's best, by class name, in the main process.
    """

    batches: Iterable[Batch]
    make_evaluator: Callable[[], Evaluator]
    postprocess: PostProcessor
    draw: Callable[[Evaluator], Mapping[int, Image.Image]]
    output_dir: Path
    log: RunLog
    thresholds: dict[str, float] = field(default_factory=dict)

    def run(
        self, runner: StepRunner, label: str, stopping: Callable[[], bool]
    ) -> tuple[EvalResult, dict[str, Any]]:
        """Evaluate; return the numbers by which checkpoints are compared, and all for the log.

        Averaged weights, where there are some, are the ones compared: `eval` and `predict` take
        them too.

        Raises:
            Interrupted: `stopping()` held.
            UserError: the model's outputs are not finite.
        """
        result, values = self._run(runner, label, "", stopping)
        if runner.ema is not None:
            with runner.ema.swapped(runner.model):
                result, more = self._run(runner, label, "ema_", stopping)
            values |= more
        return result, values

    def _run(
        self, runner: StepRunner, label: str, prefix: str, stopping: Callable[[], bool]
    ) -> tuple[EvalResult, dict[str, Any]]:
        share_statistics(runner.model, runner.world)
        started, evaluator = time.perf_counter(), self.make_evaluator()
        try:
            # images of many sizes, not worth compiling for
            with torch.compiler.set_stance("force_eager"):
                result, losses = evaluate(
                    runner.model,
                    self.postprocess,
                    self.batches,
                    evaluator,
                    device=runner.device,
                    criterion=runner.criterion,
                    autocast=runner.precision.autocast,
                    world=runner.world,
                    stopping=stopping,
                )
        except FloatingPointError as error:
            raise diverged(f"evaluation after step {runner.step}", str(error)) from error
        what = "averaged weights: " if prefix else ""
        console(
            f"{label}: {what}AP {result.stats['AP']:.4f}, AP50 {result.stats['AP50']:.4f}, step "
            f"{runner.step}, evaluated in {time.perf_counter() - started:.0f} s"
        )
        if runner.world.main:
            self.thresholds = thresholds_by_name(evaluator)
            detections = evaluator.detections().to_coco(evaluator.truth)
            save_results(self.output_dir, result, detections)
            self._show(runner.step - 1, f"{prefix}val", result, losses, evaluator)
        return result, {
            **{f"{prefix}test_{name}": value for name, value in losses.items()},
            f"{prefix}test_coco_eval_bbox": list(result.stats.values()),
        }

    def _show(
        self,
        step: int,  # the last that was trained
        curve: str,
        result: EvalResult,
        losses: Mapping[str, float],
        evaluator: Evaluator,
    ) -> None:
        self.log.scalars(step, {f"{curve}/{name}": v for name, v in result.stats.items()})
        self.log.scalars(step, {f"{curve}/{n}": losses[n] for n in ("loss",) if n in losses})
        folder = self.output_dir / "pictures"
        for image_id, image in self.draw(evaluator).items():
            folder.mkdir(exist_ok=True)
            image.save(folder / f"image_{image_id}.png")
            self.log.image(f"{curve}/image_{image_id}", image, step)


@torch.no_grad()
def share_statistics(model: nn.Module, world: World) -> None:
    """Give all processes the main one's batch-norm statistics, which are those that are saved.

    In training each takes in its own images, until the next step begins with the main one's.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if world.size == 1 or not norms:
        return
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    values = world.broadcast([b.cpu() for b in buffers] if world.main else [])
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
