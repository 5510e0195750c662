"""Checkpoints of a run: written whole or not at all, plain tensors and JSON values inside."""

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from util.console import log
from util.errors import CheckpointError, brief
from util.tensor_files import check_tensors, load_safely, save_whole

KEYS: Mapping[str, type] = {
    "model": dict,
    "optimizer": dict,
    "lr_scheduler": dict,
    "epoch": int,
    "classes": dict,
    "config": dict,
    "progress": dict,
    "best": dict,
    "versions": dict,
}
_LEAVES = (type(None), bool, int, float, str, Tensor, nn.Parameter)


def save_checkpoint(
    path: Path, content: Mapping[str, Any], *, before_replacing: Callable[[], None] = lambda: None
) -> None:
    """Replace `path` by `content` in one step, making its folder if needed; see `save_whole`.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the previous file is
            untouched.
        TypeError: a value would not load again (`load_safely` builds no foreign objects).
    """
    _check_plain(content, "checkpoint")
    save_whole(path, dict(content), before_replacing=before_replacing)


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
        raise TypeError(f"{place}: {kind} is neither a tensor nor a plain Python value")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote during a run, to continue it.

    Raises:
        CheckpointError: the file cannot be read, or does not hold a whole run. What it holds of
            the run's state is for `check_state` to look at.
    """
    content = load_safely(path)
    found = content if isinstance(content, dict) else {}
    missing = [key for key in KEYS if key not in found]
    if not missing:
        for key, kind in KEYS.items():
            if not isinstance(found[key], kind) or isinstance(found[key], bool):
                raise _unsound(path, f"{key} is {brief(found[key])}, not a {kind.__name__}")
        step = found["progress"].get("step")
        if type(step) is not int or step < 0:
            raise _unsound(path, f"progress['step'] is {brief(step)}, not a count")
        return found
    if "args" in found and "model" in found:
        raise CheckpointError(
            f"{path}: is an official checkpoint, which cannot be resumed. Use it with `finetune`, "
            "or in eval and predict."
        )
    raise CheckpointError(
        f"{path}: is not a checkpoint of a run: it lacks {', '.join(missing)}. "
        "Use weights alone with `finetune`."
    )


def _unsound(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: is not a checkpoint of a run: {what}. Use an earlier one.")


def saved_preprocessing(content: Mapping[str, Any], path: Path) -> Mapping[str, Sequence[float]]:
    """Return the mean and deviation of each channel that a run was trained with.

    Raises:
        CheckpointError: there are none.
    """
    found = content.get("preprocessing")
    values: list[Any] = []
    if isinstance(found, dict):
        values = [found.get(key) for key in ("mean", "std")]
    if not values or not all(
        isinstance(row, (list, tuple))
        and len(row) == 3
        and all(type(v) in (int, float) and abs(v) < 1e6 for v in row)
        for row in values
    ):
        raise _unsound(path, f"preprocessing is {brief(found)}")
    mean, std = values
    if min(std) <= 0:
        raise _unsound(path, f"preprocessing['std'] is {brief(std)}")
    return {"mean": mean, "std": std}


class CheckpointFolder:
    """The checkpoints of a run: `last.pth` and, as `step_N.pth`, those before it."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Keep `keep` files in all."""
        self.last = folder / "last.pth"
        self._folder, self._keep = folder, keep

    def remove_remains(self) -> None:
        """Delete what a killed process left half written."""
        for path in self._folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def save(self, content: Mapping[str, Any], *, best: bool = False) -> None:
        """Write a new `last.pth`; the present one stays beside it under its step's name.

        The `best` so far becomes `best.pth`, too.

        Raises:
            CheckpointError: it cannot be written; the present `last.pth` is untouched.
        """
        if best:
            save_checkpoint(self._folder / "best.pth", content)
        step = content["progress"]["step"]
        save_checkpoint(self.last, content, before_replacing=lambda: self._set_aside(step))
        for path in self._earlier()[self._keep - 1 :]:
            path.unlink(missing_ok=True)

    def _set_aside(self, next_step: int) -> None:
        if self._keep == 1 or not self.last.exists():
            return
        try:
            step = load_checkpoint(self.last)["progress"]["step"]
        except CheckpointError:
            return  # not worth keeping
        if step == next_step:
            return  # an epoch's end is saved before and after its evaluation
        aside = self._folder / f"step_{step:08d}.pth"
        aside.unlink(missing_ok=True)
        try:
            os.link(self.last, aside)
        except OSError:  # no hard links here: for a moment there is no last.pth
            os.replace(self.last, aside)

    def newest(self, count: int) -> list[Path]:
        """Return the newest checkpoints, at most `count`, the newest first."""
        return [p for p in (self.last, *self._earlier()) if p.exists()][:count]

    def _earlier(self) -> list[Path]:
        return sorted(self._folder.glob("step_*.pth"), reverse=True)

    def newest_sound(self) -> Path | None:
        """Return the newest checkpoint whose content is whole, naming the damaged ones.

        Raises:
            CheckpointError: there are some, but none is sound.
        """
        candidates = [p for p in (self.last, *self._earlier()) if p.exists()]
        for path in candidates:
            try:
                load_checkpoint(path)
                check_tensors(path)
            except CheckpointError as error:
                log.warning(error)
            else:
                return path
        if candidates:
            raise CheckpointError(
                f"{self._folder}: all {len(candidates)} checkpoints are damaged. "
                "Choose another `output_dir` for a new run."
            )
        return None


def check_same(
    what: str, saved: Mapping[str, Any], current: Mapping[str, Any], path: Path | str
) -> None:
    """Compare options of a checkpoint and of the run, both complete; `what` names them.

    Raises:
        CheckpointError: options differ; each is named with both values.
    """
    differing = [
        f"`{name}`: checkpoint {saved.get(name, 'unset')}, run {current.get(name, 'unset')}"
        for name in {**current, **saved}
        if name not in saved or name not in current or saved[name] != current[name]
    ]
    if differing:
        raise CheckpointError(
            f"{path}: was saved with different options for the {what} ({'; '.join(differing)}). "
            "Resume with the checkpoint's options, or start a new run with `finetune`."
        )


def check_classes(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Compare the classes of a checkpoint with those of the data, as `Classes.to_json` writes them.

    Raises:
        CheckpointError: they differ.
    """
    ids, names = saved.get("ids"), saved.get("names")
    if type(ids) is not list or type(names) is not list:
        raise _unsound(path, f"classes is {brief(saved)}")
    saved_classes = zip_longest(ids, names)
    data_classes = zip(current["ids"], current["names"], strict=True)
    for label, (old, new) in enumerate(zip_longest(saved_classes, data_classes)):
        if repr(old) != repr(new):  # as text: a tensor among them has no truth value
            raise CheckpointError(
                f"{path}: its {len(ids)} classes are not those of the data, which has "
                f"{len(current['ids'])}: number {label} is {_shown_class(old)} there and "
                f"{_shown_class(new)} here. Start a new run from it with `finetune`."
            )


def _shown_class(pair: tuple[Any, Any] | None) -> str:
    """Return the name and id of a class, which may be anything in a damaged file."""
    return "missing" if pair is None else f"{brief(pair[1])} (id {brief(pair[0])})"
