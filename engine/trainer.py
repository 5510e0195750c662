"""A training run: epochs, evaluation, checkpoints, logs."""

import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from engine.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from engine.coco_evaluator import CocoEvaluator, EvalResult, save_results
from engine.evaluate import PostProcessor, evaluate
from engine.train import StepRunner, diverged
from util.batch import Batch
from util.errors import CheckpointError
from util.plot import plot_curves
from util.run_log import console

EXIT_INTERRUPTED = 130


class Loader(Protocol):
    """Training batches whose order and augmentation depend on the epoch."""

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order of an epoch and how many of its batches to pass over."""

    def __iter__(self) -> Any:
        """Iterate over batches."""

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""


@dataclass
class Validation:
    """What evaluating a run needs.

    `draw` makes pictures from the evaluator and names them; they go to TensorBoard and to
    `pictures/`.
    """

    batches: Iterable[Batch]
    make_evaluator: Callable[[], CocoEvaluator]
    postprocess: PostProcessor
    draw: Callable[[CocoEvaluator], Mapping[str, Any]]


@dataclass
class Trainer:
    """Runs training from its present position to the end.

    `identity` is what every checkpoint carries besides the state: classes, config, versions,
    preprocessing. The position is `epoch` (the one under way) and `batch` within it.
    """

    runner: StepRunner
    train_loader: Loader
    validation: Validation
    output_dir: Path
    identity: Mapping[str, Any]
    epochs: int
    eval_every: int
    max_steps: int
    epoch: int = 0
    batch: int = 0
    best: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False

    def fit(self) -> int:
        """Train, evaluate and save until the last epoch; return the exit code.

        Ctrl-C and SIGTERM end the step under way, save `last.pth` and return 130.
        """
        if self.epoch >= self.epochs or self._finished():
            limit = f" of --max_steps {self.max_steps}" if self.max_steps else ""
            console(
                f"this run is finished: {self.epoch} of {self.epochs} epochs, "
                f"step {self.runner.step}{limit}. Raise --epochs or --max_steps to go on."
            )
            return 0
        self.runner.log.truncate_after(self.runner.step - 1, self.epoch - 1)
        total = self.epochs * len(self.train_loader)
        total = min(total, self.max_steps) if self.max_steps else total
        handlers = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        interval = 0.1 if sys.stderr.isatty() else 30.0
        try:
            with tqdm(
                total=total, initial=self.runner.step, unit="step", dynamic_ncols=True,
                mininterval=interval, maxinterval=max(interval, 10.0),
            ) as bar:  # fmt: skip
                while self.epoch < self.epochs and not self._finished() and not self.interrupted:
                    self._run_epoch(bar)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.interrupted:
            console(f"interrupted at step {self.runner.step}; saved {self.output_dir / 'last.pth'}")
            console(f"continue with: python main.py train --resume {self.output_dir / 'last.pth'}")
            return EXIT_INTERRUPTED
        return 0

    def resume(self, path: Path) -> None:
        """Take over the state and the position of a checkpoint of this run.

        Rates and weight decay are those of the present options, at the checkpoint's place in the
        schedule.

        Raises:
            CheckpointError: the checkpoint cannot be read, or its classes are not the data's.
        """
        content = load_checkpoint(path)
        if content["classes"] != self.identity["classes"]:
            raise CheckpointError(
                f"{path}: expected the classes of its run ({len(content['classes']['ids'])}), got "
                f"data with others ({len(self.identity['classes']['ids'])}). Start a new run from "
                "it with --finetune."
            )
        runner = self.runner
        runner.model.load_state_dict(content["model"])
        restore_optimizer(runner.optimizer, runner.scheduler, content)
        progress = content["progress"]
        runner.step = progress["step"]
        self.epoch, self.batch = progress["next_epoch"], progress["next_batch"]
        self.best = dict(content["best"])
        set_rng_state(progress["rng"])

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        console("stopping after the step under way; once more to stop at once without saving")

    def _finished(self) -> bool:
        return bool(self.max_steps) and self.runner.step >= self.max_steps

    def _run_epoch(self, bar: "tqdm[Any]") -> None:
        started, first_step = time.perf_counter(), self.runner.step
        rate = self.runner.optimizer.param_groups[0]["lr"]
        bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}", refresh=False)

        def on_step(latest: Mapping[str, float] | None) -> bool:
            bar.update(1)
            self.batch += 1
            if latest is not None:
                shown = {k: f"{latest[k]:.3f}" for k in ("loss", "class_error") if k in latest}
                bar.set_postfix(shown, refresh=False)
            return self.interrupted or self._finished()

        self.train_loader.set_epoch(self.epoch, self.batch)
        means = self.runner.run(self.train_loader, on_step)
        whole = self.batch >= len(self.train_loader)
        if self.interrupted and not whole:
            self._save("last.pth")
            return
        seconds = time.perf_counter() - started
        values = {
            "train_lr": rate,
            **{f"train_{name}": value for name, value in means.items()},
            "train_steps": self.runner.step - first_step,
            "train_seconds": seconds,
            "train_unreadable_images": len(self.runner.unreadable.paths),
        }
        epoch = self.epoch
        if whole:
            self.epoch, self.batch = epoch + 1, 0
        ending = self.epoch >= self.epochs or self._finished()
        if ending or (epoch + 1) % self.eval_every == 0:
            values |= self._evaluate(epoch)
        parameters = count_parameters(self.runner.model)
        self.runner.log.epoch({**values, "epoch": epoch, "n_parameters": parameters})
        self._save("last.pth")
        plot_curves(self.output_dir / "log.txt", self.output_dir / "curves.png")

    def _evaluate(self, epoch: int) -> dict[str, Any]:
        """Evaluate, keep the best weights, draw; return the values for the log."""
        started = time.perf_counter()
        evaluator = self.validation.make_evaluator()
        try:
            result, losses = evaluate(
                self.runner.model,
                self.validation.postprocess,
                self.validation.batches,
                evaluator,
                device=self.runner.device,
                criterion=self.runner.criterion,
            )
        except FloatingPointError as error:
            raise diverged(f"evaluation after step {self.runner.step}", str(error)) from error
        save_results(self.output_dir, result, evaluator.detections)
        console(
            f"epoch {epoch + 1}/{self.epochs}: AP {result.stats['AP']:.4f}, "
            f"AP50 {result.stats['AP50']:.4f}, step {self.runner.step}, "
            f"evaluated in {time.perf_counter() - started:.0f} s"
        )
        self._log_evaluation(result, losses, evaluator)
        if result.stats["AP"] > self.best.get("AP", -2.0):
            self.best = {**result.stats, "epoch": float(epoch)}
            self._save("best.pth")
        return {
            **{f"test_{name}": value for name, value in losses.items()},
            "test_coco_eval_bbox": list(result.stats.values()),
        }

    def _log_evaluation(
        self, result: EvalResult, losses: Mapping[str, float], evaluator: CocoEvaluator
    ) -> None:
        step, log = self.runner.step - 1, self.runner.log  # the last step that was trained
        log.scalars(step, {f"val/{name}": value for name, value in result.stats.items()})
        log.scalars(step, {f"val/{name}": losses[name] for name in ("loss",) if name in losses})
        folder = self.output_dir / "pictures"
        for name, picture in self.validation.draw(evaluator).items():
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"{name}.png")
            log.picture(f"val/{name}", picture, step)

    def _save(self, name: str) -> None:
        runner = self.runner
        progress = {
            "step": runner.step,
            "next_epoch": self.epoch,
            "next_batch": self.batch,
            "rng": rng_state(),
        }
        content = {
            # plain strides, for readers that know no channels-last tensors
            "model": {k: v.contiguous() for k, v in runner.model.state_dict().items()},
            "optimizer": runner.optimizer.state_dict(),
            "lr_scheduler": runner.scheduler.state_dict(),
            "epoch": self.epoch - 1 if self.batch == 0 else self.epoch,
            "progress": progress,
            "best": self.best,
            **self.identity,
        }
        save_checkpoint(self.output_dir / name, content)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: LambdaLR, content: Mapping[str, Any]
) -> None:
    """Load the state of both, but keep the rates and the weight decay they were built with."""
    built = [(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    base_lrs = list(scheduler.base_lrs)
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict({**content["lr_scheduler"], "base_lrs": base_lrs})
    for group, (rate, decay), factor in zip(
        optimizer.param_groups, built, scheduler.lr_lambdas, strict=True
    ):
        now = rate * factor(scheduler.last_epoch)
        group.update(initial_lr=rate, weight_decay=decay, lr=now)


def versions() -> dict[str, str]:
    """Return the versions that a checkpoint records."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__)}


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
