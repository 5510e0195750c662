"""Where curves go: each tracker has the values that were logged, once, and none can end a run."""

import csv
import importlib
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from configs.schema import RunConfig
from engine.run_log import RunLog
from engine.trackers import TRACKERS, Tracker
from util.errors import ConfigError


def write_twice(folder: Path, name: str) -> None:
    """Log six steps, continue from the fourth, and log the others again."""
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "config.yaml").write_text("optim: {lr: 0.001}\n")
    with RunLog(folder / "run", log_to=(name,)) as log:
        log.truncate_after(-1, -1)
        for step in range(6):
            log.step(step, {"loss": float(step), "lr_backbone": 0.5})
        log.image("val/image_1", Image.new("L", (8, 6)), 5)
    with RunLog(folder / "run", log_to=(name,)) as log:
        log.truncate_after(3, 0)
        for step in range(4, 8):
            log.scalars(step, {"loss": 10.0 * step})


def test_a_table_has_each_step_once(tmp_path: Path) -> None:
    write_twice(tmp_path, "csv")
    with (tmp_path / "run" / "scalars.csv").open("a") as file:
        file.write("9,lo")  # killed while writing
    with RunLog(tmp_path / "run", log_to=("csv",)) as log:
        log.truncate_after(7, 0)
        log.scalars(8, {"loss": 1.0, 'a "name", with\nlines': 2.0})
    with (tmp_path / "run" / "scalars.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [(row["step"], float(row["value"])) for row in rows if row["name"] == "loss"]
    expected = [0, 1, 2, 3, 40, 50, 60, 70, 1]
    assert losses == [(str(step), value) for step, value in enumerate(expected)]
    assert rows[-1]["name"] == 'a "name", with\nlines'


def test_a_table_that_was_removed_begins_anew(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", log_to=("csv",)) as log:
        log.step(0, {"loss": 0.0})
        (tmp_path / "run" / "scalars.csv").unlink()
        for step in (1, 2):
            log.scalars(step, {"loss": float(step)})
    table = (tmp_path / "run" / "scalars.csv").read_text().splitlines()
    assert table == ["step,name,value", "1,loss,1.0", "2,loss,2.0"]


def test_a_table_whose_folder_was_removed_begins_anew(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", log_to=("csv",)) as log:
        log.step(0, {"loss": 0.0})
        shutil.rmtree(tmp_path / "run")
        for step in (1, 2):
            log.step(step, {"loss": float(step)})
    table = (tmp_path / "run" / "scalars.csv").read_text().splitlines()
    assert [table[0], table[-1]] == ["step,name,value", "2,loss,2.0"]


def test_mlflow_has_curves_options_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    write_twice(tmp_path, "mlflow")
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name("deformable-detr")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.lr": "0.001"}
    values = {(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")}
    assert values == {(s, float(s)) for s in range(6)} | {(s, 10.0 * s) for s in range(4, 8)}
    assert client.list_artifacts(run.info.run_id)


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_twice(tmp_path, "wandb")
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert runs
    assert len({path.stem for path in runs}) == 1, "the same run goes on"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"engine.trackers.to_{name}", raising=False)
    monkeypatch.delitem(TRACKERS._entries, name, raising=False)
    with pytest.raises(ConfigError, match=f"log_to {name}: .* pip install {name}"):
        RunLog(tmp_path / "run", log_to=(name,))
    with pytest.raises(ConfigError, match="Did you mean 'mlflow'"):
        RunLog(tmp_path / "run", log_to=("mlfow",))


def test_a_tracker_that_fails_ends_its_curves_but_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = importlib.import_module("engine.trackers.to_csv").Table

    class Unreachable(table):  # type: ignore[misc, valid-type]
        def scalars(self, step: int, values: object) -> None:
            raise RuntimeError("the server is away")

    def unreachable(folder: Path, since: int | None) -> Tracker:
        tracker: Tracker = Unreachable(folder, since)
        return tracker

    monkeypatch.setitem(TRACKERS._entries, "csv", unreachable)
    with RunLog(tmp_path / "run", log_to=("csv",)) as log:
        for step in range(3):
            log.step(step, {"loss": 1.0})
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().out.count("no more curves there: the server is away") == 1


def test_tensorboard_has_a_switch_of_its_own() -> None:
    assert RunConfig().trackers == ("tensorboard",)
    assert RunConfig(tensorboard=False).trackers == ()
    assert RunConfig(log_to=("csv", "tensorboard"), tensorboard=False).trackers == ("csv",)
