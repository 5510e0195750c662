"""Curves at an MLflow server or in a store of its files."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from engine.trackers import TRACKERS, keep_id, kept_id, options_of
from util.errors import ConfigError

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
except ImportError:
    raise ConfigError(
        "log_to mlflow: its package is not installed. Install it: pip install mlflow"
    ) from None

_EXPERIMENT = "deformable-detr"
_LONGEST_PARAM = 500  # characters
_PARAMS_AT_ONCE = 100


@TRACKERS.register("mlflow")
class MLflow:
    """A run of the experiment in MLFLOW_EXPERIMENT_NAME, where MLFLOW_TRACKING_URI says.

    A resumed run is continued. Steps that it repeats are there twice.
    """

    def __init__(self, folder: Path, since: int | None) -> None:
        self._client = MlflowClient()
        known = kept_id(folder, "mlflow") if since else None
        self._id = known or self._begin(folder)
        keep_id(folder, "mlflow", self._id)

    def _begin(self, folder: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run_id: str = self._client.create_run(
            experiment, run_name=folder.resolve().name
        ).info.run_id
        params = [
            Param(f"{section}.{key}", str(value)[:_LONGEST_PARAM])
            for section, entries in options_of(folder).items()
            for key, value in (entries.items() if isinstance(entries, dict) else ())
        ]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(run_id, params=params[start : start + _PARAMS_AT_ONCE])
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        metrics: list[Any] = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """See `Tracker`."""
        self._client.log_image(self._id, image.convert("RGB"), key=name, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id)
