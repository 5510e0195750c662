"""Class identity: category ids and names of the data, labels of the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Classes:
    """Label i of the model is the category `ids[i]`, called `names[i]`.

    Data sets give contiguous labels in order of category id. An official COCO checkpoint has
    91 logits indexed by raw category id: `ids` is then 0..90, with unused ids unnamed (""). Where
    no class has a name at all, each goes by its id. `texts` are the ids that the data has as text,
    "" where it has a number; empty where all are numbers.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.names):
            raise ValueError(f"{len(self.ids)} category ids but {len(self.names)} names")
        if self.texts and len(self.texts) != len(self.ids):
            raise ValueError(f"{len(self.ids)} category ids but {len(self.texts)} texts of them")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("category ids repeat")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def label_of(self) -> dict[int, int]:
        """Category id -> label."""
        return {category: label for label, category in enumerate(self.ids)}

    def in_use(self, label: int) -> bool:
        """Return whether a label stands for a category."""
        return self.names[label] != "" or not any(self.names)

    def shown(self, label: int) -> str:
        """Return a label's name, or its category id where it has none."""
        return self.names[label] or str(self.ids[label])

    def given_id(self, label: int) -> int | str:
        """Return a label's category id as the data has it."""
        return (self.texts and self.texts[label]) or self.ids[label]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a checkpoint or a result file."""
        texts = {"texts": list(self.texts)} if self.texts else {}
        return {"ids": list(self.ids), "names": list(self.names), **texts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Classes":
        """Read what `to_json` wrote."""
        return cls(
            tuple(int(i) for i in value["ids"]),
            tuple(str(n) for n in value["names"]),
            tuple(str(t) for t in value.get("texts", ())),
        )
