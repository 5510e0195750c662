"""Deformable DETR from the command line."""

import argparse
import errno
import io
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from configs.options import OptionParser, Values, add_options, parse_flags
from configs.schema import (
    SECTIONS,
    CheckConfig,
    ConvertConfig,
    EvalConfig,
    EvalDataConfig,
    PredictConfig,
    PreviewConfig,
)
from engine.commands.check import check
from engine.commands.convert import convert_dataset
from engine.commands.doctor import doctor
from engine.commands.eval import evaluate_checkpoint
from engine.commands.predict import predict_images
from engine.commands.preview import preview
from engine.commands.train import train
from engine.processes import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    exit_with_parent,
    report_failure,
)
from ops import BackendError
from util.console import show_messages
from util.distributed import rank_at_start, take_slurm_variables
from util.errors import ConfigError, UserError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM,
               errno.EROFS, errno.EISDIR, errno.ENOTDIR)  # fmt: skip

COMMANDS: dict[str, tuple[Callable[[argparse.Namespace, Values], int], dict[str, type[Any]]]] = {
    "train": (train, dict(SECTIONS)),
    "eval": (evaluate_checkpoint, {"eval": EvalConfig, "data": EvalDataConfig}),
    "predict": (predict_images, {"predict": PredictConfig}),
    "convert": (convert_dataset, {"convert": ConvertConfig}),
    "check": (check, {**SECTIONS, "check": CheckConfig}),
    "preview": (preview, {**SECTIONS, "preview": PreviewConfig}),
    "doctor": (doctor, {}),
}


def parse_command_line(argv: Sequence[str]) -> tuple[str, argparse.Namespace, Values]:
    """Split a command line into the command, its own arguments, and options by section."""
    usage = "main.py {" + ",".join(COMMANDS) + "} [options]"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {usage}\n")
        for name, (function, _) in COMMANDS.items():
            print(f"  {name:9}{function.__doc__}")
        print("\n`main.py COMMAND --help` lists a command's options.")
        raise SystemExit(0 if argv else EXIT_USER_ERROR)
    if argv[0] not in COMMANDS:
        raise ConfigError(f"command line: unknown command '{argv[0]}'. Usage: {usage}")
    function, sections = COMMANDS[argv[0]]
    parser = OptionParser(
        prog=f"main.py {argv[0]}", description=function.__doc__, allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback on user errors")
    if argv[0] in ("train", "preview", "check"):
        parser.add_argument("--config", metavar="FILE", help="preset or YAML file of options")
    add_options(parser, sections)
    args, given = parse_flags(parser, argv[1:], sections)
    return argv[0], args, given


def main(argv: Sequence[str]) -> int:
    """Run a command; a user's error is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # names may have letters that a terminal or file lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("timm").setLevel(logging.ERROR)  # it lists heads it leaves out on purpose
    try:
        exit_with_parent()
        take_slurm_variables()
        show_messages(rank_at_start())
        command, args, given = parse_command_line(argv)
        return COMMANDS[command][0](args, given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        line = in_one_line(error)
        code = report_failure(error, line)
        if code is None or "--debug" in argv:
            raise
        return code


def in_one_line(error: Exception) -> str | None:
    """Return what a user can mend in one line; None for a mistake of ours."""
    if isinstance(error, (UserError, BackendError)):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        what = f"{error.filename or 'output'}: cannot be used: {error.strerror}"
        return f"{what}. Free space or choose another --output_dir."
    first: BaseException | None = error
    while first is not None:  # it comes as a signal, and what it interrupts may fail in its turn
        if isinstance(first, RuntimeError) and "DataLoader worker (pid" in str(first):
            return (
                f"data loading: {' '.join(str(first).split())} The system ends processes so when "
                "memory runs out: lower --num_workers, and go on with --resume auto."
            )
        first = first.__context__
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
