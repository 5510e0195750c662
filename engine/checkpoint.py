"""Checkpoints of a run: written whole or not at all, plain tensors and JSON values inside."""

import random
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from util.errors import CheckpointError
from util.safe_load import load_safely, save_whole

KEYS = (
    "model",
    "optimizer",
    "lr_scheduler",
    "epoch",
    "classes",
    "config",
    "progress",
    "best",
    "versions",
)
_LEAVES = (type(None), bool, int, float, str, Tensor, nn.Parameter)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content` in one step, making its folder if needed.

    A crash at any moment leaves the previous file or the new one.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the previous file is
            untouched.
        TypeError: a value would not load again (`load_safely` builds no foreign objects).
    """
    _check_plain(dict(content), "checkpoint")
    save_whole(path, dict(content))


def _check_plain(value: Any, place: str) -> None:
    # Exact types: numpy's float64 is a float to isinstance, and would not load again.
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"key of {place}")
            _check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{place}[{i}]")
    elif type(value) not in _LEAVES:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{place}: expected a tensor or a plain Python value, got {kind}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote during a run, to continue it.

    Raises:
        CheckpointError: the file cannot be read, or does not hold a whole run.
    """
    content = load_safely(path)
    missing = [key for key in KEYS if not (isinstance(content, dict) and key in content)]
    if not missing:
        return dict(content)
    if isinstance(content, dict) and "args" in content and "model" in content:
        raise CheckpointError(
            f"{path}: expected a checkpoint of a run, got an official checkpoint, which cannot be "
            "resumed. Use it with --finetune, or in eval and predict."
        )
    raise CheckpointError(
        f"{path}: expected a checkpoint of a run, got a file without {', '.join(missing)}. "
        "Use weights alone with --finetune."
    )


def check_same(
    what: str, saved: Mapping[str, Any], current: Mapping[str, Any], path: Path | str
) -> None:
    """Compare options of a checkpoint and of the run, both complete; `what` names them.

    Raises:
        CheckpointError: options differ; each is named with both values.
    """
    differing = [
        f"{name}: checkpoint {saved.get(name, 'unset')}, run {current.get(name, 'unset')}"
        for name in {**current, **saved}
        if name not in saved or name not in current or saved[name] != current[name]
    ]
    if differing:
        raise CheckpointError(
            f"{path}: expected the {what} of this run, got other ({'; '.join(differing)}). "
            "Resume with the checkpoint's options, or start anew with --finetune."
        )


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator as tensors and JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned; GPUs beyond those saved or present are left alone."""
    torch.set_rng_state(state["torch"])
    for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state, device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
