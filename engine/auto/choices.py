"""From facts and measured seconds to options: a function without state, each choice with a reason.

docs/finetune.md states the rules.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from configs.load import Values
from configs.schema import Config
from engine.auto.facts import OVERLAP, Facts

SMALLEST_BOX = 16  # pixels: nine of ten boxes should have at least this side
VANISHED = 8  # pixels: a cell of the finest level; time never makes that many boxes smaller
EPOCHS = 10  # that a run needs to learn from its images
_STEP = 32  # pixels, between short sides that are considered
_SHORTEST, _LONGEST = 160, 2048  # pixels: short sides, where images are large enough
_ENLARGED = 2  # factor beyond which a larger image shows nothing more
_TRAINING = 0.85  # part of the time; the rest is for evaluations and checkpoints
_EVALUATIONS = 10  # in a run, where they are cheap
_QUERIES_PER_BOX, _FEWEST_QUERIES, _MOST_QUERIES = 1.5, 100, 1500
_CELLS = 8  # of the coarsest level, that nine of ten boxes should not exceed
_STRIDE = 32  # of the backbone's last map, the third level; each further level doubles it
_LEVELS = (3, 5)  # minimum and maximum that a plan takes
_NARROW = (0.9, 0.95, 1.0, 1.05, 1.1)  # factors on the size, where boxes are as small as may be
_LONG_TRAINING = 100_000  # images, after which duplicates are rare without NMS
_CROWDED = 0.01  # part of the boxes that NMS may remove wrongly
_MEMORY = {False: 0.5, True: 0.8}  # part of all that a step may take: of a CPU's, of a GPU's
_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Where a run computes: `memory` is in bytes, of each of its `processes`; 0: unknown."""

    gpu: bool
    bfloat16: bool
    memory: int
    processes: int = 1


@dataclass(frozen=True)
class SizeTrial:
    """What an image of `pixels` pixels costs in a training step: seconds, and bytes kept."""

    pixels: int
    seconds: float
    memory: float


@dataclass(frozen=True)
class Measurement:
    """Trial steps with images of two sizes, the larger last, and what comes with a step.

    `evaluation` and `loading` are seconds for an image of the larger size; loading is divided by
    the processes or cores that load. `fixed_memory` is in bytes: weights, gradients and moments.
    """

    trials: tuple[SizeTrial, SizeTrial]
    evaluation: float
    loading: float
    fixed_memory: float

    def at(self, pixels: float) -> tuple[float, float]:
        """Return what an image of that many pixels costs, in seconds and in bytes.

        Both lie on lines through the two trials, of which at least half of the larger one's cost
        grows with pixels, however the clock trembled.
        """
        small, large = self.trials
        costs = []
        for less, more in ((small.seconds, large.seconds), (small.memory, large.memory)):
            slope = max((more - less) / (large.pixels - small.pixels), more / large.pixels / 2)
            slope = min(slope, more / large.pixels)
            costs.append(more + (pixels - large.pixels) * slope)
        return costs[0], costs[1]


@dataclass(frozen=True)
class Choice:
    """Options that go together, by section and name, those `given` among them; and the reason."""

    options: Mapping[str, Mapping[str, Any]]
    given: frozenset[str]
    reason: str

    def line(self) -> str:
        """Return the choice in a line."""
        shown = [
            f"{name} {_shown(value)}{' (given)' if name in self.given else ''}"
            for entries in self.options.values()
            for name, value in entries.items()
        ]
        return f"{', '.join(shown)}: {self.reason}"


@dataclass(frozen=True)
class Planner:
    """Chooses options on top of those of a preset, around those that are `given`.

    The run has `hours` of time, or `epochs` where these are None. Without a measurement it chooses
    as if time and memory had no end: what is to be measured.
    """

    facts: Facts
    machine: Machine
    preset: Config
    given: Values
    hours: float | None
    epochs: int
    measured: Measurement | None = None

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """The options of all choices, by section and name."""
        values: dict[str, dict[str, Any]] = {}
        for choice in self.choices:
            for section, entries in choice.options.items():
                values.setdefault(section, {}).update(entries)
        return values

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """All choices, those that others depend on first."""
        return (self.size(), *self.model(), self.batch(), *self.length(), self.suppression())

    def size(self) -> Choice:
        """Choose the sizes of images in training and evaluation."""
        side = self.side
        scales = {min(max(16, round(r * side / 16) * 16), 16384) for r in self.ratios}
        scales = self._fixed("data", "train_scales", tuple(sorted(scales)))
        longest = _round_up(max(*scales, side) * self.facts.aspect, 32)
        data = {"eval_scale": side, "train_scales": scales, "max_size": longest}
        official = self.preset.data
        if official.random_crop and self._fixed("data", "random_crop", True):
            factor = side / official.eval_scale
            for name in ("crop_scales", "crop_size"):
                sizes = getattr(official, name)
                data[name] = tuple(max(16, round(size * factor)) for size in sizes)
        return self._choice(self._size_reason(), data=data)

    @cached_property
    def side(self) -> int:
        """The short side in evaluation, pixels; training varies around it."""
        if (given := self._fixed("data", "eval_scale")) is not None:
            return int(given)
        if given := self._fixed("data", "train_scales"):
            return int(sorted(given)[len(given) // 2])
        minimum = min(_SHORTEST, self.wanted)
        seen = max(minimum, _round_up(VANISHED / max(self.facts.small, 1e-6), _STEP))
        sides = range(self.wanted, minimum, -_STEP)
        fitting = (s for s in sides if self._fits(s) and (s <= seen or self._in_time(s)))
        return next(fitting, minimum)

    @cached_property
    def wanted(self) -> int:
        """The short side without limits of time and memory."""
        needed = _round_up(SMALLEST_BOX / max(self.facts.small, 1e-6), _STEP)
        most = min(_round_down(_ENLARGED * self.facts.short_side, _STEP), _LONGEST)
        if (longest := self._fixed("data", "max_size")) is not None:
            most = min(most, _round_down(longest / self.facts.aspect, _STEP))
        return min(max(self.preset.data.eval_scale, needed), max(most, _STEP))

    @cached_property
    def ratios(self) -> Sequence[float]:
        """The factors on the size in training: the preset's, unless boxes would vanish."""
        data = self.preset.data
        ratios = [scale / data.eval_scale for scale in data.train_scales]
        spacious = self.facts.small * self.side * min(ratios) >= 0.9 * SMALLEST_BOX
        return ratios if spacious else _NARROW

    def _size_reason(self) -> str:
        preset, small = self.preset.data.eval_scale, self.facts.small
        box = f"nine of ten boxes are at least {small * self.side:.0f} pixels large"
        if any(self._fixed("data", name) is not None for name in ("eval_scale", "train_scales")):
            return f"as given; {box}"
        if self.side < self.wanted:
            return f"{self._limit()}; {box}"
        if self.side > preset:
            return f"{box}; at {preset} they would be {small * preset:.0f}"
        if self.side < preset:
            return f"images are small: more than twice their size shows nothing more; {box}"
        return f"the preset's; {box}"

    def _limit(self) -> str:
        """Return what keeps images smaller than wanted."""
        if not self._fits(self.wanted):
            return f"memory does not hold an image of {self.wanted}"
        epochs = self._epochs_at(self.wanted)
        return f"at {self.wanted}, {self.hours:g} hours hold {epochs:.2g} of {EPOCHS} epochs"

    def _in_time(self, side: int) -> bool:
        """Return whether the hours hold the epochs that a run needs."""
        return self.hours is None or self._epochs_at(side) >= EPOCHS

    def model(self) -> Iterator[Choice]:
        """Choose the number of queries, feature levels and, on a GPU, the number format."""
        most = self.facts.most_boxes
        queries = max(
            self.preset.model.num_queries,
            _FEWEST_QUERIES,
            min(_round_up(_QUERIES_PER_BOX * most, 50), _MOST_QUERIES),
        )
        reason = f"at least {_QUERIES_PER_BOX} times the most boxes in an image, {most}"
        queries = self._fixed("model", "num_queries", queries)
        yield self._choice(
            reason, model={"num_queries": queries}, data={"num_select": max(queries, 100)}
        )
        pixels = self.facts.large * self.side
        further = max(0, math.ceil(math.log2(max(pixels, 1) / (_CELLS * _STRIDE))))
        levels = min(max(_LEVELS[0] + further, self.preset.model.num_feature_levels), _LEVELS[1])
        if self._fixed("model", "dilation"):
            levels = 1
        yield self._choice(
            f"nine of ten boxes are at most {pixels:.0f} pixels large",
            model={"num_feature_levels": levels},
        )
        if self.machine.gpu and self.machine.bfloat16:
            yield self._choice("this GPU has it: faster", optim={"precision": "bf16"})

    def batch(self) -> Choice:
        """Choose the images of a step, and how many of them are computed at once."""
        effective, size = self._batch
        of = self.machine.memory / _GIB
        needed = self._memory_at(self.side)
        reason = "the preset's images a step"
        if needed and of:
            reason += f"; an image needs {needed / _GIB:.2f} of {of:.0f} GiB"
        return self._choice(reason, optim={"batch_size": size, "effective_batch_size": effective})

    @cached_property
    def _batch(self) -> tuple[int, int]:
        """The images of a step, and of one micro-batch."""
        optim, processes = self.preset.optim, self.machine.processes
        usual = optim.effective_batch_size or optim.batch_size
        effective = self._fixed("optim", "effective_batch_size") or _round_up(usual, processes)
        if (given := self._fixed("optim", "batch_size")) is not None:
            return effective, given
        own = max(effective // processes, 1)
        sizes = [size for size in range(own, 0, -1) if own % size == 0]
        return effective, next((s for s in sizes if self._fits(self.side, s)), 1)

    def length(self) -> Iterator[Choice]:
        """Choose the schedule and how often the run evaluates."""
        if self.measured is None:
            return
        epochs = self._epochs_at(self.side)
        seconds, steps = self._seconds_at(self.side), self.facts.images / self._batch[0]
        cost = f"{seconds:.2g} s an image, {steps:.0f} steps an epoch"
        if self.hours is None:
            hours = self._training_hours(self.side) * self.epochs / EPOCHS
            yield self._choice(f"{cost}, about {hours:.2g} hours", optim={"epochs": self.epochs})
        else:
            yield self._choice(
                f"about {epochs:.3g} epochs ({cost}); measured again while it trains",
                optim={"max_hours": self.hours},
            )
        yield self._choice("fits any length", optim={"lr_scheduler": "cosine"})
        one = self.measured.evaluation * (self._pixels(self.side) / self.measured.trials[1].pixels)
        one = max(one * self.facts.val_images / self._speed, 1e-6)
        total = epochs * self.facts.images * seconds / self._speed / _TRAINING
        count = min(max(int((1 - _TRAINING) * total / one), 1), _EVALUATIONS)
        every = max(1, math.ceil(epochs / count))
        yield self._choice(
            f"an evaluation takes {one:.2g} s; the best one is kept", run={"eval_every": every}
        )

    def suppression(self) -> Choice:
        """Choose whether duplicates are removed by non-maximum suppression."""
        share = self.facts.overlapping
        if share > _CROWDED:
            none = f"{100 * share:.0f} % of the boxes overlap another of their class by more"
            return self._choice(f"{none} than {OVERLAP}", data={"nms_iou": None})
        if self._epochs_at(self.side) * self.facts.images > _LONG_TRAINING:
            return self._choice("a long training unlearns duplicates", data={"nms_iou": None})
        return self._choice("so short a training leaves duplicates", data={"nms_iou": OVERLAP})

    def notices(self) -> Iterator[str]:
        """Yield a line on each thing that stays worse than it should be."""
        facts, side = self.facts, self.side
        box = facts.small * side
        if round(box) < SMALLEST_BOX:
            tile = max(64, round(facts.short_side * box / SMALLEST_BOX))
            more = ""
            if self.hours and side < self.wanted and self._fits(self.wanted):
                more = f", or give at least {self._training_hours(self.wanted):.2g} hours"
            yield (
                f"one box in ten is smaller than {box:.0f} pixels where the model sees it, and may "
                f"vanish. Cut images into parts of at most {tile} pixels a side (`tile`){more}."
            )
        if self.measured and self.hours and (epochs := self._epochs_at(side)) < EPOCHS:
            yield (
                f"{self.hours:g} hours hold {epochs:.2g} epochs of such images, less than "
                f"{EPOCHS}. Give at least {self._training_hours(side):.2g} hours, or fewer images."
            )
        if _QUERIES_PER_BOX * facts.most_boxes > _MOST_QUERIES:
            yield (
                f"an image has {facts.most_boxes} boxes, for which {_MOST_QUERIES} queries are "
                "few. Cut images into parts."
            )
        if not self._fits(side):
            yield (
                "memory may be too small for one image at a time. Try `activation_checkpointing`, "
                "a smaller `backbone` or smaller images."
            )

    def _pixels(self, side: int) -> float:
        """Return the mean pixels of a training image."""
        return self.facts.area * side**2

    def _seconds_at(self, side: int) -> float:
        """Return the seconds that an image of this size takes in training."""
        assert self.measured is not None
        computing, loading = self.measured.at(self._pixels(side))[0], self.measured.loading
        return max(computing, loading) if self.machine.gpu else computing + loading

    def _memory_at(self, side: int) -> float:
        """Return the bytes that the largest training image of this size takes; 0: unknown."""
        if self.measured is None:
            return 0.0
        return self.measured.at((max(_NARROW) * side) ** 2 * self.facts.aspect)[1]

    def _fits(self, side: int, images: int = 1) -> bool:
        """Return whether memory holds that many images of this size at once."""
        if self.measured is None or not self.machine.memory:
            return True
        needed = self.measured.fixed_memory + images * self._memory_at(side)
        return needed <= _MEMORY[self.machine.gpu] * self.machine.memory

    @property
    def _speed(self) -> int:
        """The processes that compute side by side; those of a CPU share its cores."""
        return self.machine.processes if self.machine.gpu else 1

    def _training_hours(self, side: int) -> float:
        """Return the hours that the epochs which a run needs take at a size."""
        images = EPOCHS * self.facts.images
        return images * self._seconds_at(side) / self._speed / _TRAINING / 3600

    def _epochs_at(self, side: int) -> float:
        """Return the epochs that the run has at a size."""
        if self.hours is None:
            return self.epochs
        if self.measured is None:
            return EPOCHS
        return EPOCHS * self.hours / self._training_hours(side)

    def _fixed(self, section: str, name: str, default: Any = None) -> Any:
        """Return the given value of an option."""
        return self.given.get(section, {}).get(name, default)

    def _choice(self, reason: str, **options: Mapping[str, Any]) -> Choice:
        given = {name for s, entries in options.items() for name in entries} & {
            name for s in options for name in self.given.get(s, {})
        }
        kept = {
            s: {name: self._fixed(s, name, value) for name, value in entries.items()}
            for s, entries in options.items()
        }
        return Choice(kept, frozenset(given), reason)


def _round_up(value: float, multiple: int) -> int:
    return multiple * math.ceil(value / multiple - 1e-9)


def _round_down(value: float, multiple: int) -> int:
    return multiple * math.floor(value / multiple + 1e-9)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
