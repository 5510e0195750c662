"""Packages that only exported files need."""

import importlib
from typing import Any

from util.errors import ConfigError


def needed(name: str) -> Any:
    """Import a package that only exported files need.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"export: the package {name} cannot be imported ({error}). Install it: "
            "pip install onnx onnxscript onnxruntime openvino"
        ) from error
