"""Folders of a model: weights as safetensors, and JSON files that describe it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from util.errors import CheckpointError
from util.files import read_regular

WEIGHTS = "model.safetensors"
DESCRIPTION = "deformable_detr.json"
"""What our checkpoints say beside their weights; a folder for other programs has it, too."""
_LARGEST_JSON = 10_000_000  # bytes


def write_folder(folder: Path, tensors: Mapping[str, Tensor], files: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, and JSON files by their names.

    Raises:
        CheckpointError: they cannot be written.
    """
    # copies: the format has no tensors that share memory, as heads of all layers may
    apart = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(apart, folder / WEIGHTS, metadata={"format": "pt"})
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written: {error}. Free space or choose another."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(read_regular(path, _LARGEST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not a {type(content).__name__}.")
    return content
