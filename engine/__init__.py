"""The public face: `Detector`, `train` and `evaluate`, each imported when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

import util  # noqa: F401  before torch
from util.errors import UserError
from util.version import __version__

if TYPE_CHECKING:
    from engine.api import evaluate, train
    from engine.detector import Box, Detector

__all__ = ["Box", "Detector", "UserError", "__version__", "evaluate", "train"]

_MODULES = {"Box": ".detector", "Detector": ".detector", "evaluate": ".api", "train": ".api"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"no '{name}' here; there are {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
