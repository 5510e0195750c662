"""What was repaired or left out of a data set: told in a line, and kept for the report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMED = 3  # examples in a line
_LONGEST = 180  # characters of one: a name may be anything, a whole file in base64 too


def _no_ids() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Finding:
    """One kind of flaw and all that have it.

    `ids` [N] are of what `of` says, "image" or "annotation"; `places` name files (and lines) where
    there is no id. `text` is the line a user reads.
    """

    kind: str
    count: int
    text: str
    of: str = "image"
    ids: NDArray[np.int64] = field(default_factory=_no_ids)
    places: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a report."""
        ids = {f"{self.of}_ids": self.ids.tolist()} if len(self.ids) else {}
        places = {"places": list(self.places)} if self.places else {}
        return {"kind": self.kind, "count": self.count, "text": self.text, **ids, **places}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Finding":
        """Read what `to_json` wrote."""
        of = "annotation" if "annotation_ids" in value else "image"
        ids = np.array(value.get(f"{of}_ids", []), dtype=np.int64)
        places = tuple(value.get("places", ()))
        return cls(value["kind"], value["count"], value["text"], of, ids, places)


def at_places(kind: str, text: str, places: Sequence[str]) -> list[Finding]:
    """Return the finding of flaws at `places`, none where there is no place."""
    if not places:
        return []
    shown = f"{text}: {len(places)} ({first_few(places)})"
    return [Finding(kind, len(places), shown, places=tuple(places))]


def first_few(names: Iterable[str], total: int | None = None) -> str:
    """Return the first names of many, with dots where there are more."""
    listed = list(names)
    more = ", ..." if (len(listed) if total is None else total) > NAMED else ""
    shown = [n if len(n) <= _LONGEST else f"{n[:_LONGEST]}…" for n in listed[:NAMED]]
    return ", ".join(shown) + more
