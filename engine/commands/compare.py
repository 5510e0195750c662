"""`main.py compare`: the curves, results and options of several runs on one page."""

from dataclasses import dataclass
from pathlib import Path

from configs.options import Checked, option
from engine.comparison import page, read_run, table
from util.console import console, printable
from util.errors import ConfigError
from util.files import make_output_dir, short_names, write_atomic
from util.plot import MOST_RUNS


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Checked):
    """Which runs are compared."""

    runs: tuple[str, ...] = option((), "folders of runs, as --output_dir of train")
    output_dir: str = option("", "folder for compare.html (default: only the table is printed)")


SECTIONS = {"compare": CompareOptions}


def main(options: CompareOptions) -> int:
    """Compare runs by their logs."""
    folders = [Path(run) for run in dict.fromkeys(options.runs)]
    if not 0 < len(folders) <= MOST_RUNS:
        raise ConfigError(f"runs: give the folders of one to {MOST_RUNS} runs.")
    names = short_names(folders)
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    console(printable(table(runs)))
    if options.output_dir:
        output = Path(options.output_dir) / "compare.html"
        make_output_dir(output.parent)
        write_atomic(output, page(runs), errors="backslashreplace")
        console(f"written: {output}")
    return 0
