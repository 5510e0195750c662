"""Means of named values, and the names that official logs give them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.criterion import SetCriterion


@dataclass
class Averages:
    """Running means of named values."""

    totals: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, float], count: int = 1) -> None:
        """Add the sums of `count` sets; start again if the names differ, as with other losses."""
        if list(self.totals) != list(values):
            self.totals, self.count = dict.fromkeys(values, 0.0), 0
        self.totals = {name: total + values[name] for name, total in self.totals.items()}
        self.count += count

    def means(self) -> dict[str, float]:
        """Return the mean of each value; empty when nothing was added."""
        return {name: total / self.count for name, total in self.totals.items()}


def official_log_values(values: Mapping[str, float], criterion: SetCriterion) -> dict[str, float]:
    """Name losses as official logs do: weighted under the bare name, raw under `_unscaled`."""
    named: dict[str, float] = {}
    for name, value in values.items():
        weight = criterion.weight(name)
        named[name] = value if weight is None else value * weight
        if weight is not None:
            named[f"{name}_unscaled"] = value
    return named
