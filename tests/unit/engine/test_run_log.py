"""Log files of a run: one line per entry, valid JSON, no duplicates after a resume."""

import json
import math
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from engine.run_log import RunLog
from util.console import console, log, show_messages
from util.errors import ConfigError
from util.files import write_atomic

JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(s, parse_constant=refuse) for s in path.read_text("utf-8").splitlines()]


def without_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [without_non_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: without_non_finite(v) for k, v in value.items()}
    return value


def write_run(folder: Path, steps: range, epochs: range, **options: int) -> None:
    with RunLog(folder) as log:
        if options:
            log.truncate_after(options["step"], options["epoch"])
        for step in steps:
            log.step(step, {"loss": 1 / (step + 1)})
        for epoch in epochs:
            log.epoch({"train_loss": 1.0, "epoch": epoch})


def test_lines_are_there_before_the_log_is_closed(tmp_path: Path) -> None:
    with RunLog(tmp_path / "new" / "run") as log:
        log.step(1, {"loss": 0.5})
        log.epoch({"epoch": 0, "test_coco_eval_bbox": [0.1, -1.0]})
        assert read(tmp_path / "new" / "run" / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
        assert read(tmp_path / "new" / "run" / "log.txt")[0]["test_coco_eval_bbox"] == [0.1, -1.0]
    assert not (tmp_path / "new" / "run" / "tensorboard").exists()


@given(values=st.dictionaries(st.text(), JSON_VALUES, max_size=4))
def test_any_values_come_back_from_one_line(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    entry = {**values, "epoch": 3}
    with RunLog(folder) as log:
        log.epoch(entry)
    assert read(folder / "log.txt") == [without_non_finite(entry)]


@given(done=st.integers(0, 12), saved=st.integers(0, 12))
def test_resumed_run_leaves_the_files_of_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, done: int, saved: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    write_run(folder / "whole", range(1, 13), range(4))
    saved_epoch = min(done, saved) // 3 - 1
    write_run(folder / "cut", range(1, done + 1), range(done // 3))
    with (folder / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    last = min(done, saved)
    write_run(
        folder / "cut", range(last + 1, 13), range(saved_epoch + 1, 4), step=last, epoch=saved_epoch
    )
    for name in ("metrics.jsonl", "log.txt"):
        assert (folder / "cut" / name).read_text() == (folder / "whole" / name).read_text()
    assert sorted(p.name for p in (folder / "cut").iterdir()) == ["log.txt", "metrics.jsonl"]


def test_a_long_log_is_cut_without_being_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = f'"loss": 0.5, "losses": [{", ".join(["0.123456789"] * 400)}]}}\n'
    path.write_text("".join(f'{{"step": {step}, {line}' for step in range(300)))
    whole = path.read_text()
    with RunLog(tmp_path) as log:
        tracemalloc.start()
        log.truncate_after(249, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert path.read_text() == whole[: whole.index('{"step": 250,')]
    assert peak < len(whole) / 5


@pytest.mark.long
def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, log_to=("tensorboard",)) as log:
        for step in range(1, 7):
            log.step(step, {"loss": float(step)})
        log.image("val/image", Image.new("L", (8, 6)), 2)
    time.sleep(1.1)  # files of curves go by the second in their names: no process resumes faster
    with RunLog(tmp_path, log_to=("tensorboard",)) as log:
        log.truncate_after(4, 0)
        for step in (5, 6):
            log.scalars(step, {"loss": 10.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("loss")]
    assert points == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60)]
    image = events.Images("val/image")[0]
    assert (image.width, image.height) == (8, 6)


def test_epoch_needs_its_number(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log, pytest.raises(ValueError, match="'epoch'"):
        log.epoch({"train_loss": 1.0})


def test_file_in_place_of_the_folder_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="output_dir .*run: the folder cannot be made") as caught:
        RunLog(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    write_atomic(path, "old")
    write_atomic(path, "new é")
    assert path.read_text("utf-8") == "new é"
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half \ud800")
    assert path.read_text("utf-8") == "new é"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_console_line_stands_apart_from_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with tqdm(total=2, ascii=True) as bar:
        bar.update()
        console("epoch 1: AP 0.5")
    assert capsys.readouterr().out == "epoch 1: AP 0.5\n"


def test_where_another_process_writes_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunLog(folder, log_to=("tensorboard",), enabled=False) as run_log:
        run_log.truncate_after(0, 0)
        run_log.step(1, {"loss": 1.0})
        run_log.epoch({"epoch": 0})
        run_log.scalars(1, {"loss": 1.0})
        run_log.image("one", Image.new("L", (8, 6)), 1)
    assert not folder.exists()


def test_the_main_process_prints_everything_and_others_only_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in (0, 1):
        show_messages(rank)
        log.info("of the run")
        log.warning("of a process")
    assert capsys.readouterr().out.splitlines() == [
        "of the run", "warning: of a process", "rank 1: warning: of a process"
    ]  # fmt: skip


def test_lines_follow_the_file_that_has_the_name(tmp_path: Path) -> None:
    """An editor replaces a file when it saves."""
    path = tmp_path / "metrics.jsonl"
    with RunLog(tmp_path) as log:
        log.step(0, {"loss": 1.0})
        write_atomic(path, path.read_text())
        log.step(1, {"loss": 2.0})
        path.unlink()
        log.step(2, {"loss": 3.0})
        assert [entry["step"] for entry in read(path)] == [2]
        log.truncate_after(1, 0)
        log.step(2, {"loss": 4.0})
    assert read(path) == [{"step": 2, "loss": 4.0}]


def test_a_folder_removed_during_the_run_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with RunLog(folder) as log:
        log.step(0, {"loss": 1.0})
        shutil.rmtree(folder)
        log.step(1, {"loss": 2.0})
        log.step(2, {"loss": 3.0})
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert capsys.readouterr().out.count("removed during the run") == 1
