"""Who may import whom, and how long files and functions may be."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("configs", "datasets", "engine", "models", "ops", "util")
MAY_IMPORT = {
    "util": {"util"},
    "ops": {"ops"},
    "configs": {"configs", "util"},
    "models": {"models", "ops", "util"},
    "datasets": {"datasets", "util"},
    "engine": {"engine", "util"},
    "engine/commands": set(ROOMS),  # where models, data and loops meet
}
# Options become constructors and loops here alone.
READ_THE_SCHEMA = {"main.py", "models/build.py", "datasets/build.py", "engine/optim.py"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 50


def source_files() -> list[str]:
    """Return every Python file of the tree that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(name for name in listed.stdout.splitlines() if (ROOT / name).exists())


def parse(name: str) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def imported_modules(tree: ast.Module, room: str) -> list[str]:
    """Return the full name of every module imported anywhere, inside functions too."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # `ops` is also a package of its own, under another name
                assert (room, node.level) == ("ops", 1), "relative imports hide the room"
                continue
            assert node.module is not None
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("name", source_files())
def test_imports_stay_within_the_table(name: str) -> None:
    room = "engine/commands" if name.startswith("engine/commands/") else name.split("/")[0]
    modules = imported_modules(parse(name), room)
    if name not in READ_THE_SCHEMA and room not in ("configs", "tests", "engine/commands"):
        assert not [m for m in modules if m.startswith("configs")]
    if room in MAY_IMPORT:
        ours = {m.split(".")[0] for m in modules} & {*ROOMS, "main", "tests"}
        allowed = MAY_IMPORT[room] | ({"configs"} if name in READ_THE_SCHEMA else set())
        assert ours <= allowed


@pytest.mark.parametrize("name", source_files())
def test_files_and_functions_stay_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(parse(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", sorted((ROOT / "ops" / "csrc").iterdir()), ids=lambda p: p.name)
def test_kernel_sources_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def test_every_room_is_in_the_table() -> None:
    rooms = {name.split("/")[0] for name in source_files() if "/" in name}
    assert rooms - {"tests", "docs", ".ci"} == {room.split("/")[0] for room in MAY_IMPORT}
