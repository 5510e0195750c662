"""Imports run downwards, from the commands to the tools, and never in a circle."""

import ast
import graphlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {  # in addition to the room itself
    "main": {"configs", "engine", "ops", "util"},
    "engine": {"configs", "models", "datasets", "ops", "util"},
    "models": {"configs", "ops", "util"},
    "datasets": {"configs", "util"},
    "configs": {"util"},
    "ops": set(),
    "util": set(),
}


def product_files() -> list[str]:
    """Return every Python file of the seven rooms that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = sorted(name for name in listed.stdout.splitlines() if (ROOT / name).exists())
    return [name for name in names if room_of(name) in MAY_IMPORT]


def room_of(name: str) -> str:
    """Return the room of a file or module."""
    return name.removesuffix(".py").replace("/", ".").split(".")[0]


def module_of(name: str) -> str:
    """Return the module that a file is."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_module(name: str) -> bool:
    """Return whether a name is a module or package of the project, not a name inside one."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(name: str) -> set[str]:
    """Return the full name of all that a file imports, inside functions too."""
    package = name.removesuffix(".py").split("/")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            parts = {f"{module}.{alias.name}" for alias in node.names}
            submodules = {part for part in parts if is_module(part)}
            names |= submodules if parts == submodules else {module, *submodules}
    return names


def test_imports_never_go_up_a_layer() -> None:
    for name in product_files():
        room = room_of(name)
        rooms = {room_of(module) for module in imported(name)} & {*MAY_IMPORT, "tests"}
        assert rooms - {room} <= MAY_IMPORT[room], name


def test_options_stop_at_the_builders() -> None:
    """Below the files that build, nothing sees an option; a recipe declares its own."""
    for name in product_files():
        if room_of(name) in ("models", "datasets") and not name.endswith("/build.py"):
            allowed = {"configs.options"} if name.startswith("models/recipes/") else set()
            options = {module for module in imported(name) if room_of(module) == "configs"}
            assert options <= allowed, name


@pytest.mark.long
def test_pycocotools_is_imported_only_where_it_is_asked_for() -> None:
    for name in product_files():
        for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pycocotools" not in ast.unparse(node), name


def test_no_imports_run_in_a_circle() -> None:
    modules = {module_of(name): name for name in product_files()}
    graph = {
        module: {other for other in imported(name) if other in modules and other != module}
        for module, name in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle
