"""What a reader of one training update has to open: a profiler counts in a real training run.

`python -m tests.benchmarks.reading_path [--tree DIR] [--two_stage]` trains the tests' tiny model
through the command line, with the data read by a loader process, and watches every Python function
that the main thread enters from one call of the model to the next: one update, with its logging and
the fetching of its batch. The model is the paper's plain one, or refines boxes in two stages.
Counted are this project's own files only: product code, whole files with all their lines, if one of
their functions is entered. Files that hold nothing but descriptions of data, such as
`models/queries.py`, have no function and do not count. Left out are `engine/guards/`, which watch a
run from beside the update.

`--tree` counts in another checkout, such as an older commit; the numbers of the review that led
to the redesign (10a4dea, two stages: 30 files, 3,888 lines, 10 frames) were counted alike.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parents[2]
WATCHED_CALL = 7  # of the model: the probe of the largest step makes the first, an epoch has four


class Watcher:
    """Collects the functions entered between two calls of the model, and the frames above one."""

    def __init__(self, root: Path) -> None:
        self._root = f"{root}{os.sep}"
        self._calls = 0
        self.functions: set[tuple[str, int]] = set()
        self.above: list[str] = []

    def own(self, frame: FrameType) -> str | None:
        """Return the file of a frame relative to the tree, None if it is not product code."""
        name = frame.f_code.co_filename
        if not name.startswith(self._root) or f"{os.sep}.venv{os.sep}" in name:
            return None
        name = name.removeprefix(self._root)
        return None if name.startswith("tests") else name

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Take in an event of `sys.setprofile`."""
        name = self.own(frame) if event == "call" else None
        if name is None:
            return
        function = (name, frame.f_code.co_firstlineno)
        if name == "models/deformable_detr.py" and frame.f_code.co_name == "forward":
            self._calls += 1
            if self._calls == WATCHED_CALL:
                self._keep_stack(frame.f_back)
        if self._calls == WATCHED_CALL:
            self.functions.add(function)

    def _keep_stack(self, frame: FrameType | None) -> None:
        while frame is not None:
            name = self.own(frame)
            if name is not None:
                self.above.append(f"{name}: {frame.f_code.co_name}")
                self.functions.add((name, frame.f_code.co_firstlineno))
            frame = frame.f_back


def watch(root: Path, data: Path, folder: Path, *, two_stage: bool) -> Watcher:
    """Train in this process, with a profiler that watches it."""
    import main

    watcher = Watcher(root)
    options = ["--config", f"{root}/tests/integration/tiny.yaml", "--num_workers", "1"]
    options += ["--device", "cpu", "--epochs", "3", "--eval_every", "3"]
    if not two_stage:
        options += ["--no_two_stage", "--no_with_box_refine"]
    sys.argv = ["main.py"]
    sys.setprofile(watcher)
    try:
        main.main(["train", *options, "--coco_path", str(data), "--output_dir", str(folder)])
    finally:
        sys.setprofile(None)
    return watcher


def report(root: Path, watcher: Watcher) -> None:
    """Print the counts and the files, the longest first."""
    files = {name for name, _ in watcher.functions if not name.startswith("engine/guards/")}
    lines = {name: len((root / name).read_text(encoding="utf-8").splitlines()) for name in files}
    print(f"own frames above the model's forward: {len(watcher.above)}")
    for frame in reversed(watcher.above):
        print(f"    {frame}")
    functions = [f for f in watcher.functions if f[0] in files]
    print(
        f"one update: {len(files)} files, {sum(lines.values())} lines, {len(functions)} functions"
    )
    for name in sorted(files, key=lambda n: -lines[n]):
        print(f"    {lines[name]:5} {name}")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tree", type=Path, default=HERE, help="checkout to count in")
    parser.add_argument("--two_stage", action="store_true", help="in place of the plain model")
    given = parser.parse_args()
    root = given.tree.resolve()
    if root != HERE:  # its modules have the names of ours: a process of its own
        argv = ["x", str(root), *["--two_stage"] * given.two_stage]
        code = f"import runpy, sys; sys.path.insert(0, {str(root)!r}); sys.argv = {argv!r}; "
        code += f"runpy.run_path({__file__!r}, run_name='__inside__')"
        raise SystemExit(subprocess.run([sys.executable, "-c", code], cwd=root).returncode)
    _count(root, two_stage=given.two_stage)


def _count(root: Path, *, two_stage: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shapes"
        make = "from pathlib import Path; from datasets.shapes import generate_shapes; "
        make += f"generate_shapes(Path({str(data)!r}), num_train=16, num_val=7, seed=0)"
        subprocess.run([sys.executable, "-c", make], cwd=root, check=True)
        report(root, watch(root, data, Path(folder) / "run", two_stage=two_stage))


if __name__ == "__main__":
    _main()
elif __name__ == "__inside__":
    _count(Path(sys.argv[1]), two_stage="--two_stage" in sys.argv)
