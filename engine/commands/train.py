"""`main.py train`: a new run, or one continued."""

import os
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from configs.load import Given, changed_options, to_yaml
from configs.schema import SECTIONS, Config, RunConfig
from datasets.samplers import split_batch
from engine.build import RunPlan, build_trainer
from engine.checkpoint import CheckpointFolder, check_same, load_checkpoint
from engine.detector import saved_options
from engine.processes import process_group
from engine.run_lock import run_lock
from engine.run_log import RunLog
from models.build import ALL_STAGES
from models.recipes import RecipeOptions
from models.weights.load import load_pretrained
from util.console import log
from util.device import set_deterministic
from util.errors import ConfigError
from util.files import write_atomic
from util.world import World

__all__ = ["RECIPES", "SECTIONS", "main", "processes"]
RECIPES = RecipeOptions()


def main(given: Given) -> int:
    """Train on COCO-format data, or continue a run."""
    options = processes(given)
    if options.deterministic:
        set_deterministic()
    with process_group(options.device) as (world, device), ExitStack() as stack:
        searching = options.resume == "auto" or restarted()
        if searching:  # a run that is ending saves once more
            if not options.output_dir:
                raise ConfigError("`resume auto` needs `output_dir`. Give both.")
            stack.enter_context(run_lock(Path(options.output_dir), world))
        plan = plan_run(given, options, world)
        if not searching:
            stack.enter_context(run_lock(plan.output_dir, world))
        folder = CheckpointFolder(plan.output_dir, keep=plan.config.run.keep_checkpoints)
        if not plan.in_place and world.broadcast(folder.last.exists()):
            raise ConfigError(
                f"output_dir {plan.output_dir}: there is a run in it. Continue it with "
                "`resume auto`, or choose another folder."
            )
        changed = ", ".join(changed_options(plan.config))
        log.info(f"options that differ from the defaults: {changed}")
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
            RunLog(plan.output_dir, tensorboard=plan.config.run.tensorboard, enabled=world.main)
        )
        trainer = build_trainer(plan, world, device, share, run_log, folder)
        if plan.checkpoint is not None:
            trainer.resume(plan.checkpoint)
            log.info(f"resuming at epoch {trainer.epoch + 1}, step {trainer.step}")
        if world.main:
            folder.remove_remains()
            write_atomic(plan.output_dir / "config.yaml", to_yaml(plan.config))
        return trainer.fit()


def restarted() -> bool:
    """Return whether a launcher has started this run again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def processes(given: Given) -> RunConfig:
    """Return the options of the run itself, on top of those of the checkpoint it resumes."""
    options = given.section("run", RunConfig)
    if options.resume in ("", "auto"):
        return options
    config = load_checkpoint(Path(options.resume))["config"]
    # the run may have been moved
    moved = Given({"run": {"output_dir": str(Path(options.resume).parent)}})
    return given.on(moved.on(saved_options(given, config, options.resume))).config().run


def plan_run(given: Given, options: RunConfig, world: World) -> RunPlan:
    """Decide what a run starts from, and with which options.

    | `resume`     | started                     | started again after a failure               |
    |--------------|-----------------------------|---------------------------------------------|
    | not given    | fresh                       | newest in `output_dir`, else fresh          |
    | a checkpoint | from that one               | newest in `output_dir`, else from that one  |
    | auto         | newest in `output_dir`, else fresh                                        |

    A fresh run has the options given, on top of the model options of `finetune`. A run from a
    checkpoint has those given on top of the checkpoint's; the model, batches and frozen parts must
    be the same.

    Raises:
        ConfigError: options exclude each other, or a fresh run has no `output_dir`.
        CheckpointError: no checkpoint of the folder is sound, or it is of another model.
    """
    asked, checkpoint = given.section("run", RunConfig), None
    if options.resume not in ("", "auto"):
        checkpoint = Path(options.resume)
        if asked.finetune:
            raise ConfigError("`resume` and `finetune` are mutually exclusive.")
    if options.resume == "auto" or restarted():
        folder = CheckpointFolder(Path(options.output_dir), keep=options.keep_checkpoints)
        checkpoint = world.broadcast(folder.newest_sound() if world.main else None) or checkpoint
    if checkpoint is None:
        pretrained = None
        if asked.finetune:
            pretrained = load_pretrained(asked.finetune)
            model = {"model": pretrained.model_options}
            given = given.on(saved_options(given, model, asked.finetune))
        config = given.config()
        if not config.run.output_dir:
            raise ConfigError("output_dir: is missing. Name a folder for the run.")
        return RunPlan(replace(config, run=replace(config.run, resume="")), pretrained)
    content = load_checkpoint(checkpoint)
    saved = saved_options(given, content["config"], str(checkpoint))
    before, config = saved.config(), given.on(saved).config()
    check_same("model", asdict(before.model), asdict(config.model), checkpoint)
    check_same("recipes", asdict(before)["recipes"], asdict(config)["recipes"], checkpoint)
    fixed = fixed_on_resume(before), fixed_on_resume(config)
    check_same("batches and frozen parts", *fixed, checkpoint)
    output_dir = asked.output_dir or str(checkpoint.parent)
    run = replace(config.run, output_dir=output_dir, resume="")
    return RunPlan(
        replace(config, run=run), checkpoint=checkpoint, preprocessing=content["preprocessing"]
    )


def fixed_on_resume(config: Config) -> dict[str, Any]:
    """Return what the place in an epoch and the optimiser's state depend on."""
    optim = config.optim
    frozen = ALL_STAGES if optim.lr_backbone == 0 else optim.frozen_stages
    return {
        "effective_batch_size": optim.effective_batch_size,
        "frozen_stages": frozen,
        "freeze": optim.freeze,
    }
