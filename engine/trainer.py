"""A training run: epochs, evaluation, checkpoints, logs."""

import json
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from engine.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from engine.evaluation.evaluate import Interrupted
from engine.guards.timer import shares
from engine.metrics import official_log_values
from engine.processes import STOP_SIGNALS
from engine.run_log import RunLog
from engine.train import StepRunner
from engine.validation import Validation
from util.console import console
from util.errors import CheckpointError
from util.files import write_atomic
from util.plot import plot_curves

EXIT_INTERRUPTED = 128 + signal.SIGINT
_SAME_REQUEST = 2.0  # seconds in which a launcher or terminal may send its signal again


class Loader(Protocol):
    """Training micro-batches whose order and augmentation depend on the epoch."""

    steps: int  # of a whole epoch

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the order of an epoch and how many of its steps to pass over."""

    def __iter__(self) -> Any:
        """Iterate over micro-batches."""


@dataclass
class Trainer:
    """Runs training from its present position to the end.

    `identity` is what every checkpoint carries besides the state: classes, config, versions,
    preprocessing. The position is `epoch` (the one under way) and `epoch_step` within it.
    """

    runner: StepRunner
    log: RunLog
    train_loader: Loader
    validation: Validation
    output_dir: Path
    checkpoints: CheckpointFolder
    identity: Mapping[str, Any]
    epochs: int
    eval_every: int
    save_every: int
    max_steps: int
    epoch: int = 0
    epoch_step: int = 0
    seconds: float = 0.0  # of training in the epoch so far
    best: dict[str, float] = field(default_factory=dict)
    unevaluated: bool = False  # the steps are done, their evaluation is not
    interrupted: int = 0  # the signal
    _interrupted_at: float = 0.0

    def fit(self) -> int:
        """Train, evaluate and save until the last epoch; return the exit code.

        Ctrl-C, SIGTERM and SIGUSR1 end the step under way, save `last.pth` and return 128 + the
        signal's number.
        """
        if not self._open():
            limit = f" of --max_steps {self.max_steps}" if self.max_steps else ""
            console(
                f"this run is finished: {self.epoch} of {self.epochs} epochs, "
                f"step {self.runner.step}{limit}. Raise --epochs or --max_steps to go on."
            )
            return 0
        self.log.truncate_after(self.runner.step - 1, self.epoch - 1)
        total = self.epochs * self.train_loader.steps
        total = min(total, self.max_steps) if self.max_steps else total
        handlers = {s: signal.signal(s, self._interrupt) for s in STOP_SIGNALS}
        interval = 0.1 if sys.stderr.isatty() else 30.0
        try:
            with tqdm(
                total=total, initial=self.runner.step, unit="step", dynamic_ncols=True,
                mininterval=interval, maxinterval=max(interval, 10.0),
                disable=not self.runner.world.main,
            ) as bar:  # fmt: skip
                while self._open() and not self.interrupted:
                    self._run_epoch(bar)
        except Interrupted:
            pass  # saved before the evaluation
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.interrupted:
            name = signal.Signals(self.interrupted).name
            console(f"{name}: stopped at step {self.runner.step}; saved {self.checkpoints.last}")
            console(f"continue with: python main.py train --resume {self.checkpoints.last}")
            return 128 + self.interrupted
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
        runner.precision.load_state_dict(content["scaler"])
        if runner.ema is not None and content["ema"]:
            runner.ema.load_state_dict(content["ema"])
        progress = content["progress"]
        runner.step = progress["step"]
        runner.steps.restore(progress["steps"])
        self.epoch, self.epoch_step = progress["next_epoch"], progress["next_step"]
        self.seconds, self.unevaluated = progress["seconds"], progress["unevaluated"]
        self.best = dict(content["best"])
        self.validation.thresholds = dict(content.get("thresholds", {}))  # older files have none
        states = progress["rng"]
        if runner.world.size == len(states):
            set_rng_state(states[runner.world.rank])
        else:
            console(
                f"{path}: was saved by {len(states)} processes, now there are "
                f"{runner.world.size}: dropout draws other numbers from here on"
            )

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.interrupted:
            if now - self._interrupted_at > _SAME_REQUEST:
                raise KeyboardInterrupt
            return
        self.interrupted, self._interrupted_at = number, now
        console("stopping after the step under way; once more to stop at once without saving")

    def _stopping(self) -> bool:
        return bool(self.interrupted)

    def _open(self) -> bool:
        """Tell whether something is left to do."""
        return self.unevaluated or (self.epoch < self.epochs and not self._finished())

    def _finished(self) -> bool:
        return bool(self.max_steps) and self.runner.step >= self.max_steps

    def _run_epoch(self, bar: "tqdm[Any]") -> None:
        self._train(bar)
        whole = self.epoch_step >= self.train_loader.steps
        if not whole and not self._finished():  # interrupted, here or in another process
            self.interrupted = self.interrupted or signal.SIGTERM
            self._save()
            self.runner.world.broadcast(None)  # who ends first takes the others along
            return
        epoch = self.epoch
        ending = self._finished() or epoch + 1 >= self.epochs
        evaluating = ending or (epoch + 1) % self.eval_every == 0
        if evaluating:  # whatever happens in the evaluation, the epoch is not lost
            self.unevaluated = True
            self._save()
        values = self._training_values()
        if whole:
            self.epoch, self.epoch_step, self.seconds = epoch + 1, 0, 0.0
            self.runner.steps.begin_epoch()
        improved = False
        if evaluating:
            label = f"epoch {epoch + 1}/{self.epochs}"
            result, more = self.validation.run(self.runner, label, self._stopping)
            values |= more
            self.unevaluated = False
            improved = result.stats["AP"] > self.best.get("AP", -2.0)
            if improved:
                self.best = {**result.stats, "epoch": float(epoch)}
        self.log.epoch({**values, "epoch": epoch})
        self._save(best=improved)
        if self.runner.world.main:
            plot_curves(self.output_dir / "log.txt", self.output_dir / "curves.png")

    def _training_values(self) -> dict[str, Any]:
        """Return what the log says of an epoch's training."""
        runner = self.runner
        means = official_log_values(runner.steps.averages.means(), runner.criterion)
        if runner.steps.shares:
            console(f"epoch {self.epoch + 1}/{self.epochs}: {shares(runner.steps.shares)}")
        return {
            "train_lr": runner.optimizer.param_groups[0]["lr"],
            **{f"train_{name}": value for name, value in means.items()},
            "train_steps": self.epoch_step,
            "train_seconds": self.seconds,
            "train_unreadable_images": self._list_unreadable(),
            "train_skipped_steps": runner.steps.recorder.total,
            "n_parameters": count_parameters(runner.model),
        }

    def _list_unreadable(self) -> int:
        """Count the training images that any process could not read; list them in the report."""
        runner = self.runner
        gathered = runner.world.gather(runner.unreadable.images)
        found = {image.path: asdict(image) for images in gathered for image in images.values()}
        path = self.output_dir / "data_report.json"
        if runner.world.main and path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            before = report["train"].get("unreadable_in_training", [])  # found before a resume
            found = {image["path"]: image for image in before} | found
            if found:
                listed = sorted(found.values(), key=lambda image: image["image_id"])
                report["train"]["unreadable_in_training"] = listed
                write_atomic(path, json.dumps(report, indent=1))
        return len(found)

    def _train(self, bar: "tqdm[Any]") -> None:
        """Run what is left of the epoch, or until a signal or the last step."""
        bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}", refresh=False)
        clock = time.perf_counter()

        def on_step(latest: Mapping[str, float] | None) -> bool:
            nonlocal clock
            bar.update(1)
            self.epoch_step += 1
            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            if latest is not None:
                shown = {k: f"{latest[k]:.3f}" for k in ("loss", "class_error") if k in latest}
                bar.set_postfix(shown, refresh=False)
            if self.save_every and self.runner.step % self.save_every == 0:
                self.runner.steps.flush()
                self._save()
            return self._finished()

        if not self.unevaluated:
            self.train_loader.set_epoch(self.epoch, self.epoch_step)
            self.runner.run(
                self.train_loader, epoch=self.epoch, stopping=self._stopping, on_step=on_step
            )

    def _content(self) -> dict[str, Any]:
        """Return the checkpoint of the present position in the main process; all must call it."""
        runner = self.runner
        progress = {
            "step": runner.step,
            "next_epoch": self.epoch,
            "next_step": self.epoch_step,
            "seconds": self.seconds,
            "unevaluated": self.unevaluated,
            "steps": runner.steps.state(),
            "rng": runner.world.gather(rng_state()),
        }
        return {
            # plain strides, for readers that know no channels-last tensors
            "model": {k: v.contiguous() for k, v in runner.model.state_dict().items()},
            "ema": runner.ema.state_dict() if runner.ema is not None else {},
            "optimizer": runner.optimizer.state_dict(),
            "lr_scheduler": runner.scheduler.state_dict(),
            "scaler": runner.precision.state_dict(),
            "epoch": self.epoch - 1 if self.epoch_step == 0 else self.epoch,
            "progress": progress,
            "best": self.best,
            "thresholds": self.validation.thresholds,
            **self.identity,
        }

    def _save(self, *, best: bool = False) -> None:
        content = self._content()
        if self.runner.world.main:
            if best:
                save_checkpoint(self.output_dir / "best.pth", content)
            self.checkpoints.save(content)


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
