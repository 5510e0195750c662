"""How a run begins or continues: its folder is locked, its logs are opened, its state restored."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from configs.load import Given, changed_options, to_yaml
from configs.schema import RunConfig
from datasets.build import split_batch
from engine.auto.complete import RECORD, complete
from engine.auto.precision import with_precision
from engine.build import build_trainer
from engine.checkpoint import CheckpointFolder, check_classes
from engine.plan import forget_saved_run, plan_run, restarted, run_lock, saved_run
from engine.run_log import RunLog
from engine.trainer import Trainer
from util.console import log
from util.errors import ConfigError
from util.files import write_atomic
from util.world import World


def start(
    given: Given, options: RunConfig, world: World, device: torch.device, stack: ExitStack
) -> Trainer:
    """Return a trainer at the place where its run begins or continues.

    Its folder is locked, and its logs are open, until `stack` is closed.
    """
    searching = options.resume == "auto" or restarted()
    if searching:  # a run that is ending saves once more
        if not options.output_dir:
            raise ConfigError("`resume auto` needs `output_dir`. Give both.")
        stack.enter_context(run_lock(Path(options.output_dir), world))
    plan = plan_run(given, options, world, partial(complete, device=device, world=world))
    if not searching:
        stack.enter_context(run_lock(plan.output_dir, world))
    folder = CheckpointFolder(plan.output_dir, keep=plan.config.run.keep_checkpoints)
    if not plan.in_place and world.broadcast(folder.last.exists()):
        raise ConfigError(
            f"output_dir {plan.output_dir}: there is a run in it. Continue it with "
            "`resume auto`, or choose another folder."
        )
    plan = replace(plan, config=with_precision(plan.config, device, world))
    log.info(f"options that differ from the defaults: {', '.join(changed_options(plan.config))}")
    optim = plan.config.optim
    share = split_batch(
        optim.effective_batch_size,
        max_size=optim.batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    optim = replace(optim, effective_batch_size=share.effective)
    plan = replace(plan, config=replace(plan.config, optim=optim))
    run_log = stack.enter_context(
        RunLog(plan.output_dir, log_to=plan.config.run.trackers, enabled=world.main)
    )
    trainer = build_trainer(plan, world, device, share, run_log, folder)
    if plan.checkpoint is not None:
        content = saved_run(plan.checkpoint)
        forget_saved_run()
        check_classes(content["classes"], trainer.identity["classes"], plan.checkpoint)
        trainer.load_state_dict(content, plan.checkpoint)
        log.info(f"resuming at epoch {trainer.epoch + 1}, step {trainer.step}")
    if world.main:
        folder.remove_remains()
        write_atomic(plan.output_dir / "config.yaml", to_yaml(plan.config))
        if plan.record:
            write_atomic(plan.output_dir / RECORD, plan.record)
    return trainer
