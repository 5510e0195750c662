"""Build the one package `deformable_detr`; everything else about it is in pyproject.toml.

A checkout has its rooms (`models/`, `datasets/`, ...) at the top, under names that an installed
package must leave to others: Hugging Face's `datasets` is one. So the wheel has them below
`deformable_detr/`, with their imports and the commands that they mention rewritten.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

PACKAGE = "deformable_detr"
ROOMS = ("configs", "datasets", "engine", "models", "ops", "util")
ROOM = rf"(?P<room>{'|'.join(ROOMS)})\b"
INIT = '''\
"""Deformable DETR: train, evaluate and use detectors."""

from typing import TYPE_CHECKING

from deformable_detr.engine import __all__, __dir__, __getattr__, __version__

if TYPE_CHECKING:
    from deformable_detr.engine import *
'''
MAIN = '''\
"""`python -m deformable_detr`: the command line."""

import sys
from pathlib import Path

if not __package__:  # run by its path, as a launcher does: this folder must not be searched
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deformable_detr.main import main

if __name__ == "__main__":
    sys.exit(main())
'''


def rewritten(source: str) -> str:
    """Return a module's source as the installed package has it."""
    source = re.sub(rf"^(\s*)(from|import) {ROOM}", rf"\1\2 {PACKAGE}.\g<room>", source, flags=re.M)
    source = re.sub(rf"python -m {ROOM}", rf"python -m {PACKAGE}.\g<room>", source)
    return re.sub(r"(python )?\bmain\.py\b", "deformable-detr", source)


class BuildPackage(build_py):
    """Copy the rooms, rewrite them, and add what only the installed package has."""

    def run(self) -> None:
        """Build the package from nothing, so that no file of an earlier build stays."""
        if self.editable_mode:
            raise SetupError(
                "an editable install would take the names datasets, models, util, ... from other "
                "packages. Work in the checkout (python main.py ...), or install without -e."
            )
        package = Path(self.build_lib, PACKAGE)
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for path in package.rglob("*.py"):
            path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
        (package / "setup.py").unlink()  # a room's neighbour, as main.py is, but of no use there
        (package / "__init__.py").write_text(INIT, encoding="utf-8")
        (package / "__main__.py").write_text(MAIN, encoding="utf-8")
        (package / "py.typed").touch()


if __name__ == "__main__":
    rooms = find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")])
    setup(
        packages=[PACKAGE, *(f"{PACKAGE}.{room}" for room in rooms), f"{PACKAGE}.ops.csrc"],
        package_dir={PACKAGE: "."},
        cmdclass={"build_py": BuildPackage},
    )
