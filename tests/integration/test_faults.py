"""Failures that a run cannot prevent: one line, a good checkpoint, and a way to continue."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.dataset import CocoDetection
from engine.trainer import Trainer
from tests.integration.conftest import ROOT, read_log
from tests.integration.runs import Command, assert_same, assert_same_runs, errors, metrics, state_of

Options = tuple[str | Path, ...]

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's file systems and /proc")
POISONED = 5  # an image id of the training set
WEIGHT = "transformer.decoder.layers.0.linear1.weight"


def reports(folder: Path) -> list[dict[str, Any]]:
    """Return the records of skipped steps, which must be JSON as others read it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    files = sorted((folder / "nonfinite").glob("*.json"))
    return [json.loads(file.read_text(), parse_constant=refuse) for file in files]


def poison_a_weight() -> None:
    """Let a weight be NaN once a checkpoint is loaded."""
    load = Trainer.load_state_dict

    def poisoned(self: Trainer, *content: Any) -> None:
        load(self, *content)
        with torch.no_grad():
            self.detector.get_parameter(WEIGHT)[3, 4] = math.nan

    Trainer.load_state_dict = poisoned  # type: ignore[method-assign,assignment]


def test_nan_in_a_weight_stops_the_run_and_names_it(
    reference: Path, reference_options: Options, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(reference, tmp_path / "run"))
    source = torch.load(folder / "last.pth", weights_only=True)
    source["model"][WEIGHT][3, 4] = math.nan
    command = Command(
        folder, (*reference_options, "--resume", "auto", "--epochs", "4", "--max_nonfinite", "3")
    )
    output = command.run(code=2, prepare=poison_a_weight)
    assert len(errors(output)) == 1
    assert f"parameter {WEIGHT} is not finite" in errors(output)[0]
    assert "3 steps in a row" in errors(output)[0]
    assert "Traceback" not in output
    records = reports(command.folder)
    assert [record["in_a_row"] for record in records] == [1, 2, 3]
    assert all(len(record["image_ids"]) == 4 for record in records)
    assert all(record["losses"]["loss"] == "nan" for record in records)
    saved = state_of(folder / "last.pth")
    assert saved["progress"]["step"] > 12
    for key, value in source["model"].items():  # batch-norm statistics too
        assert torch.allclose(value, saved["model"][key], rtol=0, atol=0, equal_nan=True), key
    for number, moments in source["optimizer"]["state"].items():
        assert_same(moments, saved["optimizer"]["state"][number], f"moments of {number}")


def poison_a_image() -> None:
    """Let one image have pixels that no file can hold."""
    read = CocoDetection.__getitem__

    def poisoned(self: CocoDetection, turn: Any) -> Any:
        item = read(self, turn)
        if isinstance(item, tuple) and int(item[1]["image_id"]) == POISONED:
            item[0][1, 2, 3] = math.nan
        return item

    CocoDetection.__getitem__ = poisoned  # type: ignore[method-assign]


def test_one_image_that_is_not_finite_costs_one_step(shapes: Path, tmp_path: Path) -> None:
    command = Command(tmp_path / "run", ("--coco_path", shapes, "--epochs", "3",
                                         "--ema_decay", "0.9", "--no_tensorboard"))  # fmt: skip
    train = json.loads((shapes / "annotations" / "instances_train2017.json").read_text())
    assert POISONED in {image["id"] for image in train["images"]}
    val = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    if POISONED in {image["id"] for image in val["images"]}:
        pytest.skip("the sets share image ids")
    command.run(prepare=poison_a_image)
    records = reports(command.folder)
    assert len(records) == 3  # once an epoch
    for record in records:
        assert POISONED in record["image_ids"]
        assert "pixels that are not finite" in record["first_nonfinite"]
    assert [line["train_skipped_steps"] for line in read_log(command.folder)] == [1, 2, 3]
    steps = {record["step"] for record in records}
    assert {line["step"] for line in metrics(command.folder) if line["loss"] is None} == steps
    saved = state_of(command.folder / "last.pth")
    for weights in (saved["model"], saved["ema"]["model"]):
        assert all(value.isfinite().all() for value in weights.values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free; return the file that takes them."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**20, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return ballast


@pytest.mark.slow
@linux
def test_a_disk_that_becomes_full(
    small_disk: Path, reference: Path, reference_options: Options
) -> None:
    folder = small_disk / "run"
    command = Command(folder, (*reference_options, "--resume", "auto"))
    running = command.start()
    running.wait_until(lambda: len(metrics(folder)) >= 2)
    os.kill(running.pid, signal.SIGSTOP)
    ballast = fill(small_disk)
    os.kill(running.pid, signal.SIGCONT)
    code = running.end()
    assert code == 2, running.output
    assert len(errors(running.output)) == 1
    assert "No space left on device" in errors(running.output)[0]
    assert "Traceback" not in running.output
    ballast.unlink()
    command.run()
    assert_same_runs(folder, reference)


@pytest.fixture
def lockable(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A folder, and what makes it unwritable, also to the superuser, and writable again."""
    folder = tmp_path / "run"
    root = sys.platform == "linux" and os.geteuid() == 0

    def change(word: str, mode: int) -> None:
        if root:
            subprocess.run(["chattr", word, str(folder)], check=True, capture_output=True)
        else:
            folder.chmod(mode)

    if root:
        (tmp_path / "probe").mkdir()
        tried = subprocess.run(
            ["chattr", "+i", str(tmp_path / "probe")], check=False, capture_output=True
        )
        if tried.returncode:
            pytest.skip("the superuser may write everywhere on this file system")
        subprocess.run(["chattr", "-i", str(tmp_path / "probe")], check=True)
    yield folder, lambda: change("+i", 0o500), lambda: change("-i", 0o700)
    if folder.exists():
        change("-i", 0o700)


@linux
def test_a_folder_that_becomes_unwritable(
    lockable: tuple[Path, Callable[[], None], Callable[[], None]],
    reference: Path,
    reference_options: Options,
) -> None:
    folder, lock, unlock = lockable
    command = Command(folder, (*reference_options, "--resume", "auto"))
    running = command.start()
    running.wait_until(lambda: len(metrics(folder)) >= 2)
    lock()
    assert running.end() == 2, running.output
    assert len(errors(running.output)) == 1
    assert "cannot be" in errors(running.output)[0]
    assert "Traceback" not in running.output
    unlock()
    command.run()
    assert_same_runs(folder, reference)


@linux
def test_a_loader_process_that_is_killed(
    reference: Path, reference_options: Options, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = Command(folder, (*reference_options, "--num_workers", "1", "--resume", "auto"))
    running = command.start()
    running.wait_until(lambda: len(metrics(folder)) >= 1)
    os.kill(running.children[0], signal.SIGKILL)
    assert running.end() == 2, running.output
    assert len(errors(running.output)) == 1
    assert "--num_workers" in errors(running.output)[0]
    assert "Traceback" not in running.output
    command.run()
    assert_same_runs(folder, reference)


@linux
@pytest.mark.parametrize("tensorboard", [False, True])
def test_an_output_folder_that_is_removed(
    reference: Path, shapes: Path, tmp_path: Path, tensorboard: bool
) -> None:
    """What was logged is lost, but not the run, which may have taken days."""
    folder = tmp_path / "run"
    options = ("--coco_path", shapes, "--epochs", "3", "--dropout", "0.1", "--ema_decay", "0.9")
    command = Command(folder, options if tensorboard else (*options, "--no_tensorboard"))
    running = command.start()
    running.wait_until(lambda: len(metrics(folder)) >= 2)
    os.kill(running.pid, signal.SIGSTOP)
    shutil.rmtree(folder)
    os.kill(running.pid, signal.SIGCONT)
    assert running.end() == 0, running.output
    # not even once if a checkpoint made it again before the next step was logged
    assert running.output.count("the folder was removed during the run") <= 1
    # TensorBoard writes in a thread of its own, which may print how it ends
    assert tensorboard or "Traceback" not in running.output
    assert list((folder / "tensorboard").glob("events*")) if tensorboard else True
    assert_same(state_of(folder / "last.pth"), state_of(reference / "last.pth"), "last.pth")
    assert metrics(folder)[-1]["step"] == metrics(reference)[-1]["step"]


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="needs pipes without a reader")
@pytest.mark.parametrize("more", [">&- 2>&-", "2>&1 | head -n 1"])
def test_a_command_whose_output_nobody_reads(shapes: Path, tmp_path: Path, more: str) -> None:
    words = [sys.executable, "main.py", "check", "--coco_path", str(shapes), "--output_dir",
             str(tmp_path / "out"), "--num_workers", "0"]  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {more}', "bash", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "check.json").read_text())["check"] == 1


def test_a_corrupt_image_and_more_boxes_than_queries_are_reported(
    shapes: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    victim = sorted((data / "train2017").iterdir())[7]
    victim.write_bytes(victim.read_bytes()[:200])
    command = Command(tmp_path / "run", ("--coco_path", data, "--num_queries", "3"))
    output = command.run()
    warnings = [line for line in output.splitlines() if str(victim) in line]
    assert len(warnings) == 1
    assert "cannot be read" in warnings[0]
    assert [line["train_unreadable_images"] for line in read_log(command.folder)] == [1, 1]
    assert "num_queries" in output.partition("largest step")[0].partition("instances_train")[2]


def limit_memory() -> None:
    """Leave the process a little more memory than it holds by now."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + 700 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@linux
@pytest.mark.parametrize("probe", ["--probe", "--no_probe"])
def test_a_step_that_does_not_fit_into_memory(shapes: Path, tmp_path: Path, probe: str) -> None:
    command = Command(
        tmp_path / "run",
        (
            "--coco_path",
            shapes,
            "--batch_size",
            "16",
            "--train_scales",
            "700",
            "--max_size",
            "1000",
            probe,
        ),
    )
    output = command.run(code=2, prepare=limit_memory)
    assert len(errors(output)) == 1
    line = errors(output)[0]
    assert "16 x 700 x " in line
    for option in ("--batch_size 8", "--activation_checkpointing", "--train_scales"):
        assert option in line
    assert "Traceback" not in output
