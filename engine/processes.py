"""`--gpus N`: the same command in N processes, through torch's elastic launcher."""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, get_error_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from util.cores import available_cores
from util.distributed import lost_contact, started_by_launcher
from util.errors import EXIT_USER_ERROR, ConfigError, UserError

# What a run is asked to stop by; Windows lacks the last.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
EXIT_LOST_CONTACT = 3
_LAUNCHED = "DEFORMABLE_DETR_LAUNCHED"
_LOOK_EVERY = 1.0  # seconds, for a launcher that is gone
_PATIENCE = 15.0  # seconds; the launcher looks ten times in one
SHUTDOWN_SECONDS = 120  # what the others get to end in when one process has failed


def launch(
    program: Path, argv: Sequence[str], *, processes: int, device: str, restarts: int
) -> int:
    """Run `program` in several processes on this machine; return the exit code.

    The first process that fails ends the others, and its message comes last, on a line of its
    own; with `restarts` all start again that often.

    Raises:
        ConfigError: fewer GPUs are here.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and torch.cuda.device_count() < processes:
        raise ConfigError(
            f"--gpus {processes}: expected so many GPUs, got {torch.cuda.device_count()}. "
            "Lower it, or add --device cpu."
        )
    if "OMP_NUM_THREADS" not in os.environ:  # else each process takes every core
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))
    os.environ[_LAUNCHED] = str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it shorter
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
        max_restarts=restarts, logs_specs=DefaultLogsSpecs(),
    )  # fmt: skip
    asked: list[int] = []  # by SIGUSR1: the launcher passes on SIGTERM, which stops as gently

    def terminate(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    if hasattr(signal, "SIGUSR1"):  # Windows has none
        signal.signal(signal.SIGUSR1, terminate)
    try:
        elastic_launch(config, entrypoint=sys.executable)(str(program), *argv)
    except SignalException as error:
        return 128 + int(asked[0] if asked else error.sigval)
    except ChildFailedError as error:
        return _report(error)
    return 0


def exit_with_parent() -> None:
    """Let this process, if `launch` started it, end at once when the launcher is killed.

    Nobody else would stop it, and a run that is started anew would share its folder.
    """
    launcher = int(os.environ.get(_LAUNCHED, "0"))
    if launcher and started_by_launcher():
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGKILL)


def _report(error: ChildFailedError) -> int:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; the system ends processes so when memory runs out" if name == "SIGKILL" else ""
        message = f"was ended by {name}{hint}"
    elif isinstance(failure.message, dict):  # what the process recorded; torch says str
        message = str(failure.message["message"]).removeprefix(f"{UserError.__name__}: ")
        message = message.strip().partition("\n")[0]
    elif failure.exitcode - 128 in STOP_SIGNALS:
        name = signal.Signals(failure.exitcode - 128).name
        message = f"was asked to stop by {name}, and all with it; go on with --resume auto"
    else:
        message = f"ended with exit code {failure.exitcode}; its message stands above"
    print(f"error: rank {rank}: {message}", file=sys.stderr)
    return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode


def report_failure(error: Exception, line: str | None) -> int | None:
    """Tell why this process of a run fails; return its exit code, None where Python shows the rest.

    Under `launch` the line is left to the launcher, which shows one of all processes' lines. A
    process that has only lost another one waits for the launcher to end it, so that the other's
    failure is the first.
    """
    if started_by_launcher() and line is None and lost_contact(error):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PATIENCE)
        print(f"rank {os.environ['RANK']}: lost another process: {error}", file=sys.stderr)
        return EXIT_LOST_CONTACT
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        get_error_handler().record_exception(error if line is None else UserError(line))
    if line is None:
        return None
    if _LAUNCHED not in os.environ:
        rank = f"rank {os.environ['RANK']}: " if started_by_launcher() else ""
        print(f"error: {rank}{line}", file=sys.stderr)
    return EXIT_USER_ERROR
