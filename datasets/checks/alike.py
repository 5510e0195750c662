"""Find images that look alike: scaled, saved again, mirrored, or frames of a film.

Candidates share most bits of a perceptual hash, the signs of the lowest frequencies of a small
grey version (pHash: the cosine transform is SciPy's). They count if the small versions agree, too.
The search is of bounded cost: it looks up parts of hashes in sorted lists and compares an image
with a limited number of others.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

from datasets.checks.findings import Partner, SplitReport
from datasets.images import SMALL_SIDE
from util.progress import progress

_FREQUENCIES = 8  # of each axis, the constant one left out: 63 bits
_BANDS, _BAND_BITS = 4, 16
_DISTANCE = 12  # bits that may differ
# Images with the same band that are looked at, those of the nearest hashes; and with one bit other.
_WINDOW, _NEAR_WINDOW = 64, 8
_CANDIDATES = 32  # of an image and of its mirror image that are compared
_CHUNK = 2048  # images whose candidates are held at once
_COMPARED = 512  # pairs whose small versions are
_FLAT = 8.0  # grey levels: with a smaller deviation there is nothing to compare
_ALIKE = 0.88  # correlation of the small versions
_COPY = 3.0  # grey levels that the small versions of copies differ by
# The largest difference of copies, as a multiple of that: where something has moved, it is larger.
_PEAK = 7.0
_NOISE = 0.5  # grey levels: rounding alone

Hashes = NDArray[np.uint64]
Small = NDArray[np.uint8]


@dataclass(frozen=True)
class Pair:
    """Two images by their positions, how alike they are (1 at most), and in what way."""

    first: int
    second: int
    likeness: float
    difference: float  # grey levels, root of the mean square, brightness and contrast aside
    peak: float  # grey levels, of the cell that differs most
    mirrored: bool

    @property
    def is_copy(self) -> bool:
        """Whether nothing but scale, coding, brightness or direction seems to differ."""
        even = self.peak <= _PEAK * max(self.difference, _NOISE)
        return self.difference <= _COPY and even


def check_alike(splits: Sequence[SplitReport]) -> None:
    """Report images that look like another of their split, or of another split."""
    places = [
        (report, i)
        for report in splits
        for i in np.flatnonzero(report.sound).tolist()
        if report.facts[i].small
    ]
    small = np.frombuffer(b"".join(r.facts[i].small for r, i in places), dtype=np.uint8)
    contents = {id(report): _Contents(report) for report in splits}
    best: dict[str, dict[int, Pair]] = {"inside": {}, "across": {}}
    copies: set[int] = set()  # images of pairs across splits
    for pair in find_alike(small.reshape(-1, SMALL_SIDE, SMALL_SIDE)):
        (one, i), (other, j) = places[pair.first], places[pair.second]
        if one.facts[i].digest == other.facts[j].digest:
            continue  # which is reported as a duplicate or leak
        found = best["inside" if one is other else "across"]
        row = pair.second if one is other else pair.first
        same = pair.is_copy and contents[id(one)].of(i) == contents[id(other)].of(j)
        if (row not in found) or (same, pair.likeness) > (row in copies, found[row].likeness):
            found[row] = pair
            if one is not other and same:
                copies.add(row)
    across = best["across"]
    copied = {row: pair for row, pair in across.items() if row in copies}
    similar = {row: pair for row, pair in across.items() if row not in copies}
    for report in splits:
        _report(report, "similar_image", places, best["inside"])
    _report(splits[0], "copied_leak", places, copied)
    _report(splits[0], "similar_leak", places, similar)


class _Contents:
    """How many objects of which class the images of a split show, as far as they are annotated.

    A still camera sees the same scene with another small object in it: too small a difference for
    pixels to tell.
    """

    def __init__(self, report: SplitReport) -> None:
        self._names = report.classes.names
        usable = report.annotations.select(report.trained)
        order = np.argsort(usable.image, kind="stable")
        self._labels, self._image = usable.labels[order], usable.image[order]

    def of(self, image: int) -> Counter[str]:
        """Return the number of boxes of each class, by its name."""
        first, end = np.searchsorted(self._image, [image, image + 1])
        return Counter(self._names[label] for label in self._labels[first:end].tolist())


def _report(
    report: SplitReport,
    kind: str,
    places: Sequence[tuple[SplitReport, int]],
    best: Mapping[int, Pair],
) -> None:
    details: dict[int, str] = {}
    partners: dict[int, Partner] = {}
    for row, pair in sorted(best.items()):
        if places[row][0] is not report:
            continue
        of_other, j = places[pair.first if row == pair.second else pair.second]
        name, image_id = of_other.images.file_names[j], int(of_other.images.ids[j])
        where = "" if of_other is report else f" of {of_other.split}"
        how = ", mirrored" if pair.mirrored else ""
        i = places[row][1]
        details[i] = f"like {name!r}{where}{how} ({pair.likeness:.3f})"
        partners[i] = Partner(of_other.split, name, image_id)
    report.report_images(kind, list(details), details.__getitem__, partner=partners.__getitem__)


def find_alike(small: Small) -> Iterator[Pair]:
    """Yield pairs of images that look alike, each once or more; of many alike, some of the pairs.

    Shape: small [N,S,S], grey.
    """
    structured = np.flatnonzero(small.std(axis=(1, 2)) >= _FLAT)
    if len(structured) < 2:
        return
    hashes, flipped = (_hashes(part) for part in (small[structured], small[structured, :, ::-1]))
    index = _Index(hashes)
    starts = range(0, len(structured), _CHUNK)
    bar = progress(total=len(structured), description="comparing", unit="image")
    with bar:
        for start in starts:
            rows = np.arange(start, min(start + _CHUNK, len(structured)))
            for mirrored, wanted in ((False, hashes), (True, flipped)):
                first, second = index.near(rows, wanted[rows])
                first, second = structured[first], structured[second]
                likeness, difference, peak = _compare(small, first, second, mirrored=mirrored)
                for k in np.flatnonzero(likeness >= _ALIKE).tolist():
                    yield Pair(
                        int(second[k]),
                        int(first[k]),
                        float(likeness[k]),
                        float(difference[k]),
                        float(peak[k]),
                        mirrored,
                    )
            bar.update(len(rows))


def _hashes(small: Small) -> Hashes:
    """Return a hash [N] of each image: a bit for each low frequency, whether above their median."""
    found = []
    for part in np.array_split(small, max(1, len(small) // 4096)):
        grey = part.astype(np.float32)
        low = dctn(grey, axes=(1, 2))[:, :_FREQUENCIES, :_FREQUENCIES]
        low = low.reshape(len(part), -1)[:, 1:]
        bits = low > np.median(low, axis=1, keepdims=True)
        packed = np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1)
        found.append(np.ascontiguousarray(packed).view(">u8")[:, 0].astype(np.uint64))
    return np.concatenate(found)


class _Index:
    """Hashes in an order for each band, of which the band is the beginning."""

    def __init__(self, hashes: Hashes) -> None:
        self._hashes = hashes
        turned = [_turned(hashes, band) for band in range(_BANDS)]
        self._orders = [np.argsort(keys, kind="stable") for keys in turned]
        self._keys = [keys[order] for keys, order in zip(turned, self._orders, strict=True)]

    def near(
        self, rows: NDArray[np.int64], hashes: Hashes
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return images `rows` [n] of these hashes, and earlier images with hashes near to theirs.

        All that differ in at most 7 bits are found, as then a band differs in at most one, unless
        so many have that band, or are as near, that some are left out.
        """
        shift = np.uint64(64 - _BAND_BITS)
        rest = np.uint64((1 << (64 - _BAND_BITS)) - 1)
        total = len(self._hashes)
        pairs = []
        for band in range(_BANDS):
            keys, order = self._keys[band], self._orders[band]
            own = _turned(hashes, band)
            for mask in (0, *(1 << bit for bit in range(_BAND_BITS))):
                wanted = own ^ (np.uint64(mask) << shift)
                low = np.searchsorted(keys, wanted & ~rest, "left")
                high = np.searchsorted(keys, wanted | rest, "right")
                window = _NEAR_WINDOW if mask else _WINDOW
                start = np.searchsorted(keys, wanted) - window // 2
                start = np.clip(start, low, np.maximum(low, high - window))
                count = np.minimum(high - low, window)
                which = np.repeat(np.arange(len(rows)), count)
                within = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
                other = order[np.repeat(start, count) + within]
                earlier = other < rows[which]
                pairs.append(which[earlier] * total + other[earlier])
        which, other = np.divmod(np.unique(np.concatenate(pairs)), total)
        distance = _distance(hashes[which], self._hashes[other])
        by_distance = np.lexsort((distance, which))
        rank = np.arange(len(which)) - np.searchsorted(which, which)  # `which` is in order
        chosen = by_distance[(rank < _CANDIDATES) & (distance[by_distance] <= _DISTANCE)]
        return rows[which[chosen]], other[chosen]


def _turned(hashes: Hashes, band: int) -> Hashes:
    """Return hashes with the bits of a band at the beginning."""
    if not band:
        return hashes
    bits = band * _BAND_BITS
    return (hashes << np.uint64(bits)) | (hashes >> np.uint64(64 - bits))


_ONES = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


def _distance(first: Hashes, second: Hashes) -> NDArray[np.int64]:
    """Return in how many bits hashes differ [n]."""
    differing = (first ^ second).view(np.uint8).reshape(-1, 8)
    return np.asarray(_ONES[differing].sum(axis=1, dtype=np.int64))


def _compare(
    small: Small, first: NDArray[np.int64], second: NDArray[np.int64], *, mirrored: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the correlation of pairs [n], and the grey levels by which they differ: rms, most.

    The first of each pair may be mirrored. Brightness and contrast make no difference.
    """
    likeness, difference, peak = (np.zeros(len(first)) for _ in range(3))
    for start in range(0, len(first), _COMPARED):
        part = slice(start, start + _COMPARED)
        one, other = small[first[part]], small[second[part]]
        one = one[:, :, ::-1] if mirrored else one
        values = [v.reshape(len(v), -1).astype(np.float32) for v in (one, other)]
        values = [v - v.mean(axis=1, keepdims=True) for v in values]
        spread = [np.sqrt((v**2).mean(axis=1)) for v in values]
        likeness[part] = (values[0] * values[1]).mean(axis=1) / (spread[0] * spread[1])
        unlike = np.sqrt(np.clip(1 - likeness[part] ** 2, 0, None))
        lower = np.minimum(*spread)
        difference[part] = lower * unlike
        # what is left of the one with less contrast when the other, fitted to it, is taken away
        one, other = (v / s[:, None] for v, s in zip(values, spread, strict=True))
        slope = likeness[part, None]
        left = np.where((spread[0] <= spread[1])[:, None], one - slope * other, other - slope * one)
        peak[part] = lower * np.abs(left).max(axis=1)
    return likeness, difference, peak
