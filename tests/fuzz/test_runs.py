"""Options, and what a run finds in its folder, nearly sound."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import Given, load_file
from configs.schema import SECTIONS, Config
from engine.data_report import write_data_report
from engine.run_log import RunLog
from tests.fuzz.mutations import (
    EXAMPLES,
    ODD_VALUES,
    exchanged,
    fuzzed,
    mutated,
    only_refused,
)
from tests.fuzz.samples import CONFIG, LOG
from util.plot import plot_curves


@fuzzed
@given(data=st.data())
def test_files_of_options(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(data.draw(mutated([CONFIG])))
    with only_refused():
        values = load_file(path, SECTIONS, Path("configs"))
        assert isinstance(Given(values).config(), Config)


@fuzzed
@given(data=st.data())
def test_values_of_options(tmp_path: Path, data: st.DataObject) -> None:
    """Such as a checkpoint holds: of any type."""
    sound = {"model": {"num_queries": 30, "backbone": "resnet18"}, "optim": {"lr": 1e-4,
             "lr_drop_epochs": [1, 2]}, "data": {"train_scales": [64], "hflip": 0.5}}  # fmt: skip
    with only_refused():
        assert isinstance(Given({}).saved(data.draw(exchanged(sound, ODD_VALUES)), "x").config(),
                          Config)  # fmt: skip


@settings(fuzzed, max_examples=max(5, EXAMPLES // 5))  # each draws curves
@given(data=st.data())
def test_logs_of_a_run(tmp_path: Path, data: st.DataObject) -> None:
    for name in ("metrics.jsonl", "log.txt"):
        lines = [json.loads(line) for line in LOG.splitlines()]
        values = [value for value in ODD_VALUES if value != 10**5000]
        text = "\n".join(map(json.dumps, data.draw(exchanged(lines, values)))).encode()
        content = text if data.draw(st.booleans()) else data.draw(mutated([LOG]))
        (tmp_path / name).write_bytes(content)
    with only_refused(), RunLog(tmp_path) as log:
        log.truncate_after(1, 1)
        log.step(2, {"loss": 1.0})
        log.epoch({"epoch": 2, "train_loss": 1.0})
    with only_refused():
        plot_curves(tmp_path / "log.txt", tmp_path / "curves.png")


@fuzzed
@given(data=st.data())
def test_reports_on_the_data_of_a_run(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "data_report.json"
    sound = {
        "train": {"images": 3, "unreadable_in_training": [{"image_id": 1, "path": "x"}]},
        "val": {},
    }
    values = [value for value in ODD_VALUES if value != 10**5000]
    text = json.dumps(data.draw(exchanged(sound, values))).encode()
    path.write_bytes(text if data.draw(st.booleans()) else data.draw(mutated([text])))
    with only_refused():
        write_data_report(tmp_path, sound, continued=True)
