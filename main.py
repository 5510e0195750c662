"""Deformable DETR from the command line."""

import io
import logging
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from configs.command_line import (
    OptionParser,
    arguments,
    read_command_line,
    with_dashes,
    with_underscores,
)
from engine.commands import COMMANDS, usage
from util.console import error_line, keep_streams, show_messages
from util.errors import EXIT_USER_ERROR, ConfigError, in_one_line, nearest_hint

ROOT = f"{__package__}." if __package__ else ""  # the installed package; empty in a checkout


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's error is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # names may have letters that a terminal or file lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if argv is None:
        argv = sys.argv[1:]
        keep_streams()
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else EXIT_USER_ERROR
    if argv[0] not in COMMANDS:
        hint = nearest_hint(argv[0], COMMANDS)
        line = error_line(f"command line: unknown command '{argv[0]}'. {hint}")
        print(f"error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    return run(argv)


def run(argv: Sequence[str]) -> int:
    """Run a command of the table in as many processes as its options say."""
    from engine.processes import exit_with_parent, launch, report_failure  # PyTorch, only now
    from ops import BackendError
    from util.distributed import rank_at_start, started_by_launcher, take_slurm_variables

    logging.getLogger("timm").setLevel(logging.ERROR)  # it lists heads it leaves out on purpose
    argv = [argv[0], *with_underscores(argv[1:])]
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
        given = read_command_line(parser, command, argv[1:])
        if hasattr(command, "processes") and not started_by_launcher():
            wanted = command.processes(given)
            if wanted.gpus > 1:
                from engine.plan import forget_saved_run

                forget_saved_run()  # the processes read the checkpoint themselves
                return launch(
                    Path(sys.argv[0]), argv, processes=wanted.gpus, device=wanted.device,
                    restarts=wanted.max_restarts,
                )  # fmt: skip
        return int(command.main(**arguments(command, given)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        line = str(error) if isinstance(error, BackendError) else in_one_line(error)
        if line is not None:
            line = with_dashes(line, parser.flags, about_option=isinstance(error, ConfigError))
            line = error_line(line)
        code = report_failure(error, line)
        if code is None or "--debug" in argv:
            raise
        return code


if __name__ == "__main__":
    sys.exit(main())
