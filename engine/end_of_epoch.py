"""The end of an epoch of a run: it is evaluated, logged and saved. The end of a run."""

import time
from pathlib import Path
from signal import SIGTERM
from typing import Protocol

from engine.between_epochs import count_parameters, training_values
from engine.evaluation.evaluate import Interrupted
from engine.processes import StopSignals
from engine.run_log import RunLog
from engine.saved_state import SavedRun
from util.console import log
from util.plot import plot_curves


class EndingRun(SavedRun, Protocol):
    """What the end of an epoch reads and changes of a run: the trainer."""

    stop: StopSignals
    log: RunLog
    output_dir: Path
    eval_every: int
    max_steps: int
    patience: int

    def of_epochs(self, word: str) -> str:
        """Return the number of epochs after a word."""


def end_epoch(run: EndingRun) -> None:
    """Evaluate, log and save; after an interruption in the middle of an epoch save alone."""
    whole = run.epoch_step >= run.loader.steps
    if not whole and not run.all_steps_done():  # interrupted, here or in another process
        run.stop.follow(SIGTERM)
        run.save()
        run.world.broadcast(None)  # who ends first takes the others along
        return
    epoch = run.epoch
    last = run.all_steps_done() or epoch + 1 >= run.epochs
    validation = run.validation if last or (epoch + 1) % run.eval_every == 0 else None
    run.unevaluated = validation is not None  # a resumed run may leave out what was interrupted
    if run.unevaluated:  # whatever happens in the evaluation, the epoch is not lost
        run.save()
    label = f"epoch {epoch + 1}{run.of_epochs('/')}"
    values = {
        "train_lr": run.optimizer.param_groups[0]["lr"],
        "train_steps": run.epoch_step,
        "train_seconds": run.seconds,
        **training_values(run.steps, label, run.output_dir),
        "n_parameters": count_parameters(run.detector),
    }
    if whole:
        run.epoch, run.epoch_step, run.seconds = epoch + 1, 0, 0.0
        run.steps.begin_epoch()
    improved = False
    if validation is not None:
        started = time.perf_counter()
        try:
            stats, run.thresholds, more = validation(
                run.detector,
                None if run.ema is None else run.ema.model,
                step=run.step,
                label=label,
                stopping=lambda: bool(run.stop.number),
            )
        except Interrupted:  # here or in another process; it was saved before
            run.stop.follow(SIGTERM)
            return
        values |= more
        run.unevaluated = False
        if run.time_limit is not None:
            run.time_limit.evaluation = time.perf_counter() - started
        improved = stats["AP"] < 0 or stats["AP"] > run.best.get("AP", -1.0)  # below 0: n/a
        if improved:
            run.best = {**stats, "epoch": float(epoch)}
    if run.time_limit is not None:
        values["total_steps"] = run.time_limit.steps or None
    run.log.epoch({**values, "epoch": epoch})
    run.save(best=improved)
    if run.world.main:
        plot_curves(run.output_dir / "log.txt", run.output_dir / "curves.png")


def out_of_patience(run: EndingRun) -> bool:
    """Return whether AP has not risen for `patience` epochs, as of the last evaluation."""
    evaluated = run.epoch // run.eval_every * run.eval_every - 1
    waited = evaluated - run.best.get("epoch", evaluated)
    return 0 < run.patience <= waited


def report_finished(run: EndingRun) -> None:
    """Say that nothing is left to do, and what would change it."""
    if out_of_patience(run):
        log.info(
            f"this run is finished: after {run.epoch} epochs, AP has not risen for "
            f"`patience {run.patience}` since epoch {run.best['epoch'] + 1:.0f} "
            f"({run.best['AP']:.4f}, best.pth). Raise `patience` to continue."
        )
        return
    limit = f" of `max_steps {run.max_steps}`" if run.max_steps else ""
    length = "epochs" if run.time_limit is None else "max_hours"
    log.info(
        f"this run is finished: {run.epoch}{run.of_epochs(' of ')} epochs, step "
        f"{run.step}{limit}. Raise `{length}` or `max_steps` to continue."
    )
