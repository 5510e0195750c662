"""Deformable DETR from the command line."""

import errno
import io
import logging
import signal
import sys
import traceback
import typing
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from configs.load import Given, read_command_line
from configs.options import OptionParser, with_dashes
from configs.schema import Config
from util.errors import EXIT_USER_ERROR, UserError, nearest_hint

# Modules of engine/commands; one is imported only when it is chosen.
COMMANDS = {
    "train": "train on your data, or continue a run",
    "eval": "evaluate a checkpoint, or saved detections, on COCO-format data",
    "predict": "draw what a checkpoint finds in images, and write it as JSON",
    "check": "look for flaws in images and annotations",
    "preview": "write training images as the model sees them, with boxes",
    "convert": "write a data set as COCO, VOC or YOLO",
    "doctor": "report hardware and op backends, and test them",
}
ROOT = f"{__package__}." if __package__ else ""  # the installed package; empty in a checkout
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM,
               errno.EROFS, errno.EISDIR, errno.ENOTDIR)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's error is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # names may have letters that a terminal or file lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: main.py COMMAND [options]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:9}{what}")
        print("\n`main.py COMMAND --help` lists a command's options.")
        return 0 if argv else EXIT_USER_ERROR
    if argv[0] not in COMMANDS:
        hint = nearest_hint(argv[0], COMMANDS)
        print(f"error: command line: unknown command '{argv[0]}'. {hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    return run(argv)


def run(argv: Sequence[str]) -> int:
    """Run a command of the table in as many processes as its options say."""
    from engine.processes import exit_with_parent, launch, report_failure  # PyTorch, only now
    from util.console import show_messages
    from util.distributed import rank_at_start, started_by_launcher, take_slurm_variables

    logging.getLogger("timm").setLevel(logging.ERROR)  # it lists heads it leaves out on purpose
    parser = OptionParser(
        prog=f"main.py {argv[0]}",
        description=COMMANDS[argv[0]],
        all_help="--help_all" in argv,
    )
    try:
        exit_with_parent()
        take_slurm_variables()
        show_messages(rank_at_start())
        command = import_module(f"{ROOT}engine.commands.{argv[0]}")
        given = parse(parser, command, argv[1:])
        if hasattr(command, "processes") and not started_by_launcher():
            wanted = command.processes(given)
            if wanted.gpus > 1:
                return launch(
                    Path(sys.argv[0]), argv, processes=wanted.gpus, device=wanted.device,
                    restarts=wanted.max_restarts,
                )  # fmt: skip
        return int(command.main(**arguments(command, given)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        line = in_one_line(error)
        line = line and with_dashes(line, {flag.lstrip("-") for flag in parser.flags})
        code = report_failure(error, line)
        if code is None or "--debug" in argv:
            raise
        return code


def parse(parser: OptionParser, command: Any, argv: Sequence[str]) -> Given:
    """Read the options of a command, from a file too if it is one with the options of a run.

    Such a command has `RECIPES`, the classes of recipes' options by name.
    """
    parser.add_argument("--debug", action="store_true", help="show a traceback on user errors")
    for title, section in command.SECTIONS.items():
        parser.add_section(title, section)
    return read_command_line(parser, argv, getattr(command, "RECIPES", None))


def arguments(command: Any, given: Given) -> dict[str, Any]:
    """Build the options that a command's `main` takes, by the types of its parameters."""
    hints = typing.get_type_hints(command.main)
    titles = {section: title for title, section in command.SECTIONS.items()}
    built = {name: given.section(titles[t], t) for name, t in hints.items() if t in titles}
    built |= {name: given.config() for name, t in hints.items() if t is Config}
    return built | {name: given for name, t in hints.items() if t is Given}


def in_one_line(error: Exception) -> str | None:
    """Return what a user can fix in one line; None for a bug."""
    from ops import BackendError

    if isinstance(error, (UserError, BackendError)):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        what = f"{error.filename or 'output'}: cannot be used: {error.strerror}"
        return f"{what}. Free space or choose another --output_dir."
    first: BaseException | None = error
    while first is not None:  # it comes as a signal, and what it interrupts may fail in its turn
        if loader_ended(first):
            return (
                f"data loading: {' '.join(str(first).split())} The system probably ran out of "
                "memory: lower --num_workers, and continue with --resume auto."
            )
        first = first.__context__
    return None


def loader_ended(error: BaseException) -> bool:
    """Return whether a loader process was killed: while it worked, or handed a batch over."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    frames = traceback.walk_tb(error.__traceback__)
    names = {frame.f_globals.get("__name__") for frame, _ in frames}
    broken = isinstance(error, (ConnectionError, EOFError))
    return broken and "torch.utils.data.dataloader" in names


if __name__ == "__main__":
    sys.exit(main())
