"""How a run starts: alone in its folder, from what, and with which options."""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from configs.load import Given
from configs.schema import Config, RunConfig
from engine.checkpoint import (
    CheckpointFolder,
    check_same,
    load_checkpoint,
    saved_preprocessing,
)
from engine.claims import check_claims
from engine.detector import saved_options
from models.build import ALL_STAGES
from models.weights.load import Pretrained, load_pretrained
from models.weights.official import check_sizes
from util.console import log
from util.errors import ConfigError
from util.files import make_output_dir
from util.world import World

_LOCK, _HOLDER = ".lock", ".lock_holder"
_NO_FOLDER = "output_dir: is missing. Name a folder for the run."
_PATIENCE = 15.0  # seconds that the processes of a killed run may take to end
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from some network drives
_FAR_PATIENCE = 100.0  # NFSv4 servers keep the locks of a host that died for some 90 s


@dataclass(frozen=True)
class RunPlan:
    """What a run does: its options, and the weights or the checkpoint it starts from."""

    config: Config
    pretrained: Pretrained | None = None
    checkpoint: Path | None = None
    preprocessing: Mapping[str, Sequence[float]] | None = None  # the checkpoint's
    record: str = ""  # of how options were chosen, where they were left open

    @property
    def output_dir(self) -> Path:
        """Return the run's folder."""
        return Path(self.config.run.output_dir)

    @property
    def in_place(self) -> bool:
        """Return whether the run continues in the folder of its checkpoint."""
        parent = None if self.checkpoint is None else self.checkpoint.parent.resolve()
        return self.output_dir.resolve() == parent


# From the options given, and those of the weights, to all others with these, and a text that says
# how they were chosen.
Choose = Callable[[Given, Given], tuple[Given, str]]


@dataclass(frozen=True)
class Fresh:
    """The options of a new run, the weights it starts from, and how options were chosen."""

    given: Given
    pretrained: Pretrained | None
    record: str


def fresh_options(given: Given, choose: Choose | None = None) -> Fresh:
    """Put the options of a new run on those of the weights it starts from.

    Where `--config auto` leaves options open, `choose` says which they are.

    Raises:
        ConfigError, CheckpointError: the weights cannot be used.
    """
    pretrained, weights, record = None, Given(), ""
    if source := given.section("run", RunConfig).finetune:
        pretrained = load_pretrained(source)
        weights = saved_options(given, {"model": pretrained.model_options}, source)
        check_claims(weights.config().model, pretrained.state_dict, source)
    if given.auto and choose is not None:
        weights, record = choose(given, weights)
    return Fresh(given.on(weights), pretrained, record)


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


def plan_run(
    given: Given, options: RunConfig, world: World, choose: Choose | None = None
) -> RunPlan:
    """Decide what a run starts from, and with which options.

    | `resume`     | started                     | started again after a failure               |
    |--------------|-----------------------------|---------------------------------------------|
    | not given    | fresh                       | newest in `output_dir`, else fresh          |
    | a checkpoint | from that one               | newest in `output_dir`, else from that one  |
    | auto         | newest in `output_dir`, else fresh                                        |

    A fresh run has the options given, on top of the model options of `finetune`; `choose` adds
    those that `--config auto` leaves open. A run from a checkpoint has those given on top of the
    checkpoint's; the model, batches, images and frozen parts must be the same.

    Raises:
        ConfigError: options exclude each other, or a fresh run has no `output_dir`.
        CheckpointError: no checkpoint of the folder is sound, or it is of another model.
    """
    asked, checkpoint = given.section("run", RunConfig), None
    if options.resume not in ("", "auto"):
        checkpoint = Path(options.resume)
        if asked.finetune:
            raise ConfigError("`resume` and `finetune` are mutually exclusive. Give one.")
    if options.resume == "auto" or restarted():
        folder = CheckpointFolder(Path(options.output_dir), keep=options.keep_checkpoints)
        checkpoint = world.broadcast(folder.newest_sound() if world.main else None) or checkpoint
    if checkpoint is None:
        if given.auto and not asked.output_dir:  # before it is measured
            raise ConfigError(_NO_FOLDER)
        fresh = fresh_options(given, choose)
        config = fresh.given.config()
        config.check_effects()
        if not config.run.output_dir:
            raise ConfigError(_NO_FOLDER)
        config = replace(config, run=replace(config.run, resume=""))
        return RunPlan(config, fresh.pretrained, record=fresh.record)
    return _continued(given, checkpoint, output_dir=asked.output_dir)


def _continued(given: Given, checkpoint: Path, *, output_dir: str) -> RunPlan:
    """Return the plan of a run from a checkpoint, by default in the checkpoint's folder."""
    content = saved_run(checkpoint)
    saved = saved_options(given, content["config"], str(checkpoint))
    before, config = saved.config(), given.on(saved).config()
    check_sizes(content["model"], asdict(before.model), str(checkpoint))
    check_claims(before.model, content["model"], str(checkpoint), recipes=before.recipes)
    check_same("model", asdict(before.model), asdict(config.model), checkpoint)
    check_same("recipes", asdict(before)["recipes"], asdict(config)["recipes"], checkpoint)
    check_same("batches, images and frozen parts", _fixed(before), _fixed(config), checkpoint)
    run = replace(config.run, output_dir=output_dir or str(checkpoint.parent), resume="")
    if config.optim.precision == "auto":  # it was chosen when the run began
        config = replace(config, optim=replace(config.optim, precision=before.optim.precision))
    return RunPlan(
        replace(config, run=run),
        checkpoint=checkpoint,
        preprocessing=saved_preprocessing(content, checkpoint),
    )


def _fixed(config: Config) -> dict[str, Any]:
    """Return what the place in an epoch and the optimiser's state depend on."""
    optim = config.optim
    return {
        "effective_batch_size": optim.effective_batch_size,
        "empty_images": config.data.empty_images,
        "frozen_stages": ALL_STAGES if optim.lr_backbone == 0 else optim.frozen_stages,
        "freeze": optim.freeze,
        "norm_weight_decay": "as weight_decay" if optim.norm_weight_decay is None else "its own",
        **_tiles_of(config),
    }


def _tiles_of(config: Config) -> dict[str, Any]:
    """Return how training images are cut, with what the size of tiles depends on."""
    tiles = config.tiles
    if not tiles.tile:
        return {"tile": False}
    names = ("tile", "tile_overlap", "tile_min_seen", "tile_empty")
    size = tiles.tile_size or config.data.eval_scale
    return {**{name: getattr(tiles, name) for name in names}, "tile_size": size}


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


@contextlib.contextmanager
def run_lock(folder: Path, world: World) -> Iterator[None]:
    """Make a run's folder, and keep other runs out of it.

    The main process holds the lock. The system releases it when that process ends, however it
    ends, so a killed run blocks nothing. On a network drive the lock of a dead host may stay for a
    while, so the lock of another host is waited for longer. A drive without locks protects nothing.

    Raises:
        ConfigError: another run uses the folder, or it cannot be made.
    """
    lock, other = _acquire(folder) if world.main else (None, "")
    try:
        other = world.broadcast(other)
        if other:
            raise ConfigError(
                f"output_dir {folder}: {other} is training there. Wait for its end, or choose "
                "another folder."
            )
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):  # a folder that has become unwritable
                (folder / _HOLDER).unlink()
            lock.release()


def _acquire(folder: Path) -> tuple[FileLock | None, str]:
    """Return the lock of the folder, and the name of the process that holds it instead of us."""
    make_output_dir(folder)
    lock, holder, other = FileLock(folder / _LOCK), folder / _HOLDER, "another process"
    begun, reported = time.monotonic(), ""
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            with contextlib.suppress(OSError):  # other hosts may see it only after a while
                other = holder.read_text(encoding="utf-8").strip() or other
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None, ""
        far = " on " in other and not other.endswith(f" on {socket.gethostname()}")
        patience = _FAR_PATIENCE if far else _PATIENCE
        if time.monotonic() > begun + patience:
            return None, other
        if other != reported:
            reported = other
            expiry = ", or for its lock to expire if that host is dead" if far else ""
            log.info(
                f"output_dir {folder}: waiting up to {patience:.0f} s for {other} to end{expiry}"
            )
        time.sleep(0.2)
    with holder.open("w", encoding="utf-8") as file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        os.fsync(file.fileno())  # other hosts read it
    return lock, ""
