"""A training run: the step, the epochs around it, and what a checkpoint holds."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from datasets.loader import TrainLoader
from engine.between_epochs import Validation
from engine.checkpoint import CheckpointFolder
from engine.ema import Ema
from engine.end_of_epoch import end_epoch, out_of_patience, report_finished
from engine.guards import Guards
from engine.guards.timer import StepTimer
from engine.metrics import StepLog
from engine.optim import Precision
from engine.processes import StopSignals
from engine.run_log import RunLog
from engine.saved_state import restore_run, run_state
from engine.time_limit import TimeLimit
from models.criterion import SetCriterion
from models.deformable_detr import DeformableDETR
from util.batch import Batch, EffectiveBatch, Uploads
from util.console import log
from util.world import World


@dataclass(kw_only=True)
class Trainer:
    """Trains from its present position, `epoch` and `epoch_step` within it, to the end.

    `detector` is what is saved, `model` the same or its distributed wrapper. `identity` is what
    every checkpoint carries in addition to the state: classes, config, versions, preprocessing.
    """

    detector: DeformableDETR
    model: nn.Module
    criterion: SetCriterion
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    precision: Precision
    ema: Ema | None
    clip_max_norm: float  # 0: no limit
    world: World
    device: torch.device
    loader: TrainLoader
    validation: Validation | None
    guards: Guards
    timer: StepTimer
    log: RunLog
    output_dir: Path
    checkpoints: CheckpointFolder
    identity: Mapping[str, Any]
    epochs: int
    eval_every: int = 1  # epochs
    patience: int = 0  # epochs without a better AP; 0: any number
    save_every: int = 0  # steps; 0: at the end of epochs alone
    max_steps: int = 0  # 0: all epochs
    time_limit: TimeLimit | None = None  # as long as it has no length, `epochs` have no end
    seed: int = 0  # of what recipes draw
    flush_every: int = 10  # steps
    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    seconds: float = 0.0  # of training in the epoch so far
    unevaluated: bool = False  # the epoch's steps are done, their evaluation is not
    best: dict[str, float] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)  # by class, of the last evaluation

    def __post_init__(self) -> None:
        self.stop = StopSignals()
        self.upload = Uploads(self.device)
        self.steps = StepLog(
            self.log, self.criterion, self.world, self.timer, self.guards, self.device
        )

    def fit(self) -> int:
        """Train, evaluate and save until the last epoch; return the exit code.

        Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP end the run after the step: it saves `last.pth` and
        returns 128 + the signal's number.
        """
        if not self.unfinished():
            report_finished(self)
            return 0
        self.log.truncate_after(self.step - 1, self.epoch - 1)
        if self.time_limit is not None:
            self.time_limit.start()
        with self.stop, self.log.progress_bar(self.last_step, done=self.step) as bar:
            while self.unfinished() and not self.stop.anywhere(self.world):
                if not self.unevaluated:
                    self.train_epoch(bar)
                end_epoch(self)
        if not self.stop.number:
            if out_of_patience(self):
                report_finished(self)
            return 0
        last = self.checkpoints.last
        log.info(f"{Signals(self.stop.number).name}: stopped at step {self.step}; saved {last}")
        log.info(f"continue with: python main.py train --resume {last}")
        return 128 + self.stop.number

    def train_epoch(self, bar: "tqdm[Any]") -> None:
        """Train the rest of the epoch, until a signal in any process or the last step."""
        self.model.train()
        self.loader.set_epoch(self.epoch, self.epoch_step)
        bar.set_description(f"epoch {self.epoch + 1}{self.of_epochs('/')}", refresh=False)
        clock = begun = time.perf_counter()
        first = self.step
        self.timer.restart()
        for micro_batches in self.loader.effective_batches():
            own_images = sum(len(b.targets) for b in micro_batches if not b.blank)
            counts = [len(t["labels"]) for b in micro_batches for t in b.targets]
            own = [own_images, sum(counts), max(counts, default=0), self.stop.number]
            images, boxes, most, stop = zip(*self.world.every(own), strict=True)
            if any(stop):
                break
            count = int(sum(images))
            whole = EffectiveBatch(int(sum(boxes)), int(max(most)), self.seed, self.epoch, count)
            self.timer.mark("data")
            with self.guards.watch(self.step, micro_batches):
                if any(images):
                    rates = {f"lr_{g['name']}": g["lr"] for g in self.optimizer.param_groups}
                    metrics = self.train_step(micro_batches, whole)
                    self.steps.add(self.step, self.epoch, micro_batches, metrics, rates)
                    for guard in self.guards:
                        guard.after_step(self.step, micro_batches, metrics)
                    if self.ema is not None:  # after the guards: they restore norms that saw a NaN
                        self.ema.update(self.detector)
            self.step, self.epoch_step = self.step + 1, self.epoch_step + 1
            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            bar.update(1)
            if self.step % self.flush_every == 0 and (latest := self.steps.flush(keep=1)):
                shown = {k: f"{latest[k]:.3f}" for k in ("loss", "class_error") if k in latest}
                bar.set_postfix(shown, refresh=False)
            if self.save_every and self.step % self.save_every == 0:
                self.steps.flush()
                self.save()
            if self.time_limit is not None:
                self.time_limit.after_step(self, now - begun, bar, first=self.step == first + 1)
            if self.all_steps_done():
                break
            self.timer.restart()  # logging and saving are not part of a step
            begun = time.perf_counter()
        self.steps.flush()

    def train_step(
        self, micro_batches: Sequence[Batch], whole: EffectiveBatch
    ) -> dict[str, Tensor]:
        """Update the weights once, with the gradient of one effective batch however it is split.

        Returns the losses of this process, whose mean over the processes is that of the batch,
        and the norm of the gradient.
        """
        self.optimizer.zero_grad(set_to_none=True)
        num_boxes = max(whole.boxes, 1) / self.world.size  # every loss is a sum over boxes
        self.criterion.progress = self.step / (self.last_step or math.inf)
        self.criterion.whole = whole
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(self.upload(micro_batches)):
            earlier = i + 1 < len(micro_batches)  # the last exchanges gradients between processes
            with (
                self.model.no_sync()
                if earlier and isinstance(self.model, DistributedDataParallel)
                else nullcontext()
            ):
                with self.precision.autocast():
                    outputs = self.model(batch.images, batch.targets, whole)
                self.timer.mark("forward")
                divisor = math.inf if batch.blank else num_boxes
                losses = self.criterion(outputs, batch.targets, divisor)
                self.timer.mark("match")
                torch.autograd.backward(self.precision.scaler.scale(losses["loss"]))
                self.timer.mark("backward")
            total = total + torch.stack([value.detach() for value in losses.values()])
        self.precision.scaler.unscale_(self.optimizer)
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.clip_max_norm or math.inf)
        self.precision.step(self.optimizer, grad_norm)  # none if the norm is not finite
        self.scheduler.step()
        self.timer.mark("optimiser")
        return {**dict(zip(losses, total, strict=True)), "grad_norm": grad_norm.detach()}

    def unfinished(self) -> bool:
        """Return whether something is left to do."""
        over = self.epoch >= self.epochs or self.all_steps_done() or out_of_patience(self)
        return self.unevaluated or not over

    def all_steps_done(self) -> bool:
        """Return whether `max_steps` is reached, or the length that a time limit has fixed."""
        limits = (self.max_steps, self.time_limit.steps if self.time_limit else 0)
        return any(0 < limit <= self.step for limit in limits)

    @property
    def last_step(self) -> int | None:
        """The steps of the whole run, None as long as a time limit has not fixed them."""
        limits = [self.epochs * self.loader.steps, self.max_steps]
        if self.time_limit is not None:
            limits[0] = self.time_limit.steps
        return min((limit for limit in limits if limit), default=None)

    def of_epochs(self, word: str) -> str:
        """Return the number of epochs after a word, or nothing as long as it is not known."""
        unknown = self.time_limit is not None and not self.time_limit.steps
        return "" if unknown else f"{word}{self.epochs}"

    def load_state_dict(
        self, content: Mapping[str, Any], source: Path | str = "checkpoint"
    ) -> None:
        """Restore the state and the position of a checkpoint of this run; see `restore_run`."""
        restore_run(self, content, source)

    def save(self, *, best: bool = False) -> None:
        """Write `last.pth`, and `best.pth` if it is the best so far; all processes must call it."""
        content = run_state(self)
        if self.world.main:
            self.checkpoints.save(content, best=best)
