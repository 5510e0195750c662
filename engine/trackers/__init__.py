"""Where the curves of a run can go, in addition to its own logs."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml
from PIL import Image

from util.console import log
from util.files import read_regular, write_atomic
from util.registry import Registry
from util.yaml_files import read_yaml

_IDS = "trackers.json"  # in the folder of a run: what others call it, by tracker
_LARGEST_IDS = 2**20  # bytes


class Tracker(Protocol):
    """Takes values by step. Whatever it raises ends the curves there, never the run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add points to curves."""

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Add an image."""

    def close(self) -> None:
        """Finish what is still to be written."""


Factory = Callable[[Path, int | None], Tracker]
"""Begins or continues in a run's folder. Values from the given step on are to be replaced; from 0,
it is a new run."""

TRACKERS: Registry[Factory] = Registry(
    "log_to",
    __name__,
    {
        "tensorboard": ".to_tensorboard",
        "csv": ".to_csv",
        "wandb": ".to_wandb",
        "mlflow": ".to_mlflow",
    },
)


class GuardedTracker:
    """A tracker that is opened when the first value comes, and whose errors do not matter."""

    def __init__(self, name: str, folder: Path) -> None:
        """Import what it needs.

        Raises:
            ConfigError: there is no such tracker, or its package is missing.
        """
        self._name, self._factory, self._folder = name, TRACKERS[name], folder
        self._tracker: Tracker | None = None
        self._ended = False
        self.since: int | None = None  # step from which on earlier values are replaced

    def __call__(self, write: Callable[[Tracker], None]) -> None:
        """Write something; a tracker whose files were removed begins anew."""
        if self._ended:
            return
        try:
            if self._tracker is None:
                self._tracker = self._factory(self._folder, self.since)
            write(self._tracker)
        except FileNotFoundError:
            self._tracker = None
        except Exception as error:  # of packages and servers of others, so of any kind
            self._ended = True
            log.warning(f"log_to {self._name}: no more curves there: {error}")

    def close(self) -> None:
        """Close the tracker, if it is open."""
        if self._tracker is not None:
            self(lambda tracker: tracker.close())
            self._tracker = None


def kept_id(folder: Path, name: str) -> str | None:
    """Return what a tracker called the run before, None if it does not know it."""
    found = _ids(folder).get(name)
    return found if isinstance(found, str) else None


def keep_id(folder: Path, name: str, run_id: str) -> None:
    """Keep what a tracker calls the run, so that a resumed run is continued there."""
    write_atomic(folder / _IDS, json.dumps({**_ids(folder), name: run_id}) + "\n")


def _ids(folder: Path) -> dict[str, Any]:
    try:
        ids = json.loads(read_regular(folder / _IDS, _LARGEST_IDS))
    except (OSError, ValueError, RecursionError):
        ids = None
    return ids if isinstance(ids, dict) else {}


def options_of(folder: Path) -> dict[str, Any]:
    """Return the options of the run by section, as its `config.yaml` has them."""
    try:
        content = read_yaml(folder / "config.yaml")
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    return content if isinstance(content, dict) else {}
