"""How a run starts: fresh, from other weights, or from a checkpoint, and with which options."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.load import Given
from configs.schema import Config, RunConfig
from engine.checkpoint import CheckpointFolder, check_same, load_checkpoint
from engine.detector import saved_options
from models.build import ALL_STAGES
from models.weights.load import Pretrained, load_pretrained
from util.errors import ConfigError
from util.world import World


@dataclass(frozen=True)
class RunPlan:
    """What a run does: its options, and the weights or the checkpoint it starts from."""

    config: Config
    pretrained: Pretrained | None = None
    checkpoint: Path | None = None
    preprocessing: Mapping[str, Sequence[float]] | None = None  # the checkpoint's

    @property
    def output_dir(self) -> Path:
        """Return the run's folder."""
        return Path(self.config.run.output_dir)

    @property
    def in_place(self) -> bool:
        """Return whether the run continues in the folder of its checkpoint."""
        if self.checkpoint is None:
            return False
        return self.output_dir.resolve() == self.checkpoint.parent.resolve()


def restarted() -> bool:
    """Return whether a launcher has started this run again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def processes(given: Given) -> RunConfig:
    """Return the options of the run itself, on top of those of the checkpoint it resumes."""
    options = given.section("run", RunConfig)
    if options.resume in ("", "auto"):
        return options
    config = saved_run(Path(options.resume))["config"]
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
    content = saved_run(checkpoint)
    saved = saved_options(given, content["config"], str(checkpoint))
    before, config = saved.config(), given.on(saved).config()
    check_same("model", asdict(before.model), asdict(config.model), checkpoint)
    check_same("recipes", asdict(before)["recipes"], asdict(config)["recipes"], checkpoint)
    fixed = _fixed_on_resume(before), _fixed_on_resume(config)
    check_same("batches and frozen parts", *fixed, checkpoint)
    output_dir = asked.output_dir or str(checkpoint.parent)
    run = replace(config.run, output_dir=output_dir, resume="")
    return RunPlan(
        replace(config, run=run), checkpoint=checkpoint, preprocessing=content["preprocessing"]
    )


def _fixed_on_resume(config: Config) -> dict[str, Any]:
    """Return what the place in an epoch and the optimiser's state depend on."""
    optim = config.optim
    return {
        "effective_batch_size": optim.effective_batch_size,
        "frozen_stages": ALL_STAGES if optim.lr_backbone == 0 else optim.frozen_stages,
        "freeze": optim.freeze,
    }


def saved_run(path: Path) -> dict[str, Any]:
    """Return what `load_checkpoint` does, reading once what is asked for several times in a row.

    The options of a checkpoint are needed before there are processes, and its state last of all.
    `forget_saved_run` frees it.
    """
    return _read(path, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=1)
def _read(path: Path, changed: int) -> dict[str, Any]:
    return load_checkpoint(path)


forget_saved_run = _read.cache_clear
