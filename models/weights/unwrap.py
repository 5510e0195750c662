"""Weights in files of other programs: inside dictionaries, and under prefixes of their modules."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from util.errors import CheckpointError

_MAX_DEPTH = 3
_MAX_SHOWN = 3
# Of two copies of one network, the one that its makers evaluate: averages, or what gradients train.
_AVERAGED = ("ema", "teacher")
_TRAINED = ("encoder_q", "base_encoder", "online")


@dataclass(frozen=True)
class FoundWeights:
    """A state dict, and where in the file it was; `place` is "" where nothing was unwrapped."""

    tensors: dict[str, Tensor]
    place: str


def find_weights(
    content: object, expected: Collection[str], source: str, *, ema: bool = True
) -> FoundWeights | None:
    """Return the tensors of a file whose names, without a prefix, are most of all those expected.

    Of two copies that fit alike, `ema` takes the averages. None if half of the names are missing.

    Raises:
        CheckpointError: several copies fit alike, and nothing says which is meant.
    """
    expected = frozenset(expected)
    fits: dict[tuple[tuple[str, ...], str], int] = {}
    states = dict(state_dicts(content))
    for path, tensors in states.items():
        counts = Counter(
            key[:start] for key in tensors for start in _starts(key) if key[start:] in expected
        )
        fits |= {(path, prefix): count for prefix, count in counts.items()}
    most = max(fits.values(), default=0)
    if 2 * most < len(expected):
        return None
    path, prefix = _choose([fit for fit, count in fits.items() if count == most], source, ema=ema)
    tensors = states[path]
    inside = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    return FoundWeights(inside, _place(path, prefix))


def largest_state_dict(content: object) -> Mapping[str, Tensor]:
    """Return the part of a file that holds most tensors; the first of equals, empty if none."""
    return max((tensors for _, tensors in state_dicts(content)), key=len, default={})


def keys_of(names: Collection[str]) -> str:
    """Return the first few names, and how many there are."""
    shown = ", ".join(f"'{str(name)[:80]}'" for name in list(names)[:_MAX_SHOWN])
    return f"{shown}, ... ({len(names)})" if len(names) > _MAX_SHOWN else shown or "(none)"


def state_dicts(
    content: object, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the tensors of each dictionary in a file, by the keys that lead there."""
    if not isinstance(content, Mapping) or len(path) > _MAX_DEPTH:
        return
    named: list[tuple[str, Any]] = [(k, v) for k, v in content.items() if isinstance(k, str)]
    tensors = {key: value for key, value in named if isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in named:
        if not key.startswith("optim"):
            yield from state_dicts(value, (*path, key))


def _starts(key: str) -> list[int]:
    """Return where in a key its parts begin."""
    return [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]


def _choose(
    fits: list[tuple[tuple[str, ...], str]], source: str, *, ema: bool
) -> tuple[tuple[str, ...], str]:
    if len(fits) == 1:
        return fits[0]

    def has(fit: tuple[tuple[str, ...], str], words: Collection[str]) -> bool:
        parts = ".".join([*fit[0], fit[1]]).split(".")
        return any(w == p or w in p.split("_") for p in parts for w in words)

    averaged = [fit for fit in fits if has(fit, _AVERAGED)]
    kept = averaged if ema else [fit for fit in fits if fit not in averaged]
    kept = kept or [fit for fit in fits if has(fit, _TRAINED)]
    if len(kept) != 1:
        kept = [fit for fit in kept or fits if has(fit, _TRAINED)]
    if len(kept) == 1:
        return kept[0]
    places = " and ".join(_place(*fit) or "the outside" for fit in fits[:_MAX_SHOWN])
    raise CheckpointError(
        f"{source}: holds {len(fits)} copies of the network: {places}. Save the one that you mean "
        "as a state dict of its own."
    )


def _place(path: tuple[str, ...], prefix: str) -> str:
    parts = [f"'{'.'.join(path)}'"] if path else []
    parts += [f"keys without '{prefix}'"] if prefix else []
    return ", ".join(parts)
