"""The processes of a run: `--gpus N` through torch's elastic launcher, and how they end."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, get_error_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from util.console import error_line, log
from util.cores import available_cores
from util.device import own_device, pick_device
from util.distributed import (
    destroy_process_group,
    init_process_group,
    lost_contact,
    rank_at_start,
    started_by_launcher,
)
from util.errors import EXIT_USER_ERROR, ConfigError, UserError
from util.world import World

# What a run is asked to stop by; Windows lacks the last two.
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
_HANGUP = getattr(signal, "SIGHUP", None)
EXIT_LOST_CONTACT = 3
_LAUNCHED = "DEFORMABLE_DETR_LAUNCHED"
_LOOK_EVERY = 1.0  # seconds, for a launcher that is gone
_PATIENCE = 15.0  # seconds; the launcher looks ten times in one
_SAME_REQUEST = 2.0  # seconds in which a launcher or terminal may send its signal again
SHUTDOWN_SECONDS = 120  # what the others get to end in when one process has failed


@contextlib.contextmanager
def process_group(device: str) -> Iterator[tuple[World, torch.device]]:
    """Join the processes of a run; yield them and this process's device."""
    picked = pick_device(device)
    world = init_process_group(picked.type)
    try:
        yield world, own_device(picked, world)
    finally:
        destroy_process_group()


class StopSignals:
    """Catches Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP inside a `with` block: the first asks to stop.

    `number` is that of the signal, 0 before. A second signal raises KeyboardInterrupt. In a thread
    of a user's program nothing is caught: signals come to the main thread alone.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0  # when the first came
        self._handlers_before = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS if _in_main_thread() else ():
            if number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # the run was started by nohup, to outlive its terminal
            before = signal.signal(number, self._stop)
            self._handlers_before.callback(signal.signal, number, before)
        return self

    def __exit__(self, *error: object) -> None:
        self._handlers_before.close()

    def follow(self, number: int) -> None:
        """Stop as another process does, by its number; 0 asks for nothing.

        The signal of this process may still come: from launchers that send it to one after the
        other. It is the same request.
        """
        if number and not self.number:
            self.number, self._since = number, time.monotonic()

    def anywhere(self, world: World) -> bool:
        """Return whether a signal has come to any process, none of which continues alone."""
        asked = int(max(number for (number,) in world.every([self.number])))
        self.follow(asked)
        return asked > 0  # not `number`, which a signal may have set since

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number:
            if now - self._since > _SAME_REQUEST:
                raise KeyboardInterrupt
            return
        self.number, self._since = number, now
        log.info("stopping after this step; press Ctrl-C again to quit without saving")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def launch(
    program: Path, argv: Sequence[str], *, processes: int, device: str, restarts: int
) -> int:
    """Run `program` in several processes on this machine; return the exit code.

    The first process that fails ends the others, and its message comes last, on a line of its
    own; with `restarts` all start again that often.

    Raises:
        ConfigError: this machine has fewer GPUs.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and torch.cuda.device_count() < processes:
        raise ConfigError(
            f"gpus {processes}: this machine has {torch.cuda.device_count()} GPUs. "
            "Use as many, or `device cpu`."
        )
    # `_report` says in one line what torch would in many
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
        logs_specs=DefaultLogsSpecs(),
    )
    asked: list[int] = []  # by SIGUSR1: the launcher passes on SIGTERM, which stops as gently

    def terminate(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    if hasattr(signal, "SIGUSR1") and _in_main_thread():  # Windows has none
        signal.signal(signal.SIGUSR1, terminate)
    before = dict(os.environ)
    os.environ[_LAUNCHED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    try:  # the processes inherit these variables
        elastic_launch(config, entrypoint=sys.executable)(str(program), *argv)
    except SignalException as error:
        return 128 + int(asked[0] if asked else error.sigval)
    except ChildFailedError as error:
        return _report(error)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0


def exit_with_parent() -> None:
    """End this process, if `launch` started it, as soon as the launcher is killed.

    Nothing else would stop it, and the next run would share its folder.
    """
    launcher = os.environ.get(_LAUNCHED, "")
    if launcher.isdecimal() and started_by_launcher():
        threading.Thread(target=_watch, args=(int(launcher),), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGKILL)


def _report(error: ChildFailedError) -> int:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = ", probably out of memory" if name == "SIGKILL" else ""
        message = f"killed by {name}{hint}"
    elif isinstance(failure.message, dict):  # what the process recorded; torch says str
        message = str(failure.message["message"]).removeprefix(f"{UserError.__name__}: ")
        message = error_line(message.strip().partition("\n")[0])
    elif failure.exitcode - 128 in STOP_SIGNALS:
        name = signal.Signals(failure.exitcode - 128).name
        message = f"was asked to stop by {name}, so all stopped; continue with --resume auto"
    else:
        message = f"ended with exit code {failure.exitcode}; see its message above"
    print(f"error: rank {rank}: {message}", file=sys.stderr)
    return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode


def report_failure(error: Exception, line: str | None) -> int | None:
    """Report why this process of a run fails; return its exit code, None if Python shows the rest.

    Under `launch` the line is left to the launcher, which shows one of all processes' lines. A
    process that has only lost another one waits for the launcher to end it, so that the other's
    failure is the first.
    """
    if started_by_launcher() and line is None and lost_contact(error):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PATIENCE)
        line = error_line(f"lost another process: {error}")
        print(f"rank {rank_at_start()}: {line}", file=sys.stderr)
        return EXIT_LOST_CONTACT
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        get_error_handler().record_exception(error if line is None else UserError(line))
    if line is None:
        return None
    if _LAUNCHED not in os.environ:
        rank = f"rank {rank_at_start()}: " if started_by_launcher() else ""
        print(f"error: {rank}{line}", file=sys.stderr)
    return EXIT_USER_ERROR
