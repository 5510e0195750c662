"""Images, annotations and names as flat arrays, which loader processes share without copies."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Names:
    """N strings as UTF-8 `data` [B] uint8; string i ends before `ends[i]` [N].

    A list would hold an object for each, whose reference count every reading process writes to:
    pages that a fork shares become its own one by one.
    """

    data: NDArray[np.uint8]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Names":
        """Pack strings; lone surrogates, which JSON can hold, are kept."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        ends = np.cumsum([len(part) for part in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: SupportsIndex) -> str:
        i = range(len(self))[index]
        start = self.ends[i - 1] if i else 0
        return self.data[start : self.ends[i]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        data, start = self.data.tobytes(), 0
        for end in self.ends.tolist():
            yield data[start:end].decode("utf-8", "surrogatepass")
            start = end


@dataclass(frozen=True, eq=False)
class Images:
    """Images in the file's order. Shape: ids [N]; sizes [N,2] (height, width), 0 = not stated.

    `texts` are the ids that the file has as text, by the numbers they got. `addresses` [N] are
    where images came from, several of one on lines of their own; empty once files were looked for.
    """

    ids: IntArray
    file_names: Names
    sizes: IntArray
    texts: Mapping[int, str] = field(default_factory=dict)
    addresses: Names = field(default_factory=lambda: Names.of(()))

    def select(self, keep: BoolArray) -> "Images":
        """Return those where `keep` [N] is true, without addresses."""
        names = Names.of(name for name, kept in zip(self.file_names, keep, strict=True) if kept)
        return Images(self.ids[keep], names, self.sizes[keep], self.texts)


@dataclass(frozen=True, eq=False)
class Annotations:
    """Boxes in the file's order.

    Shape: ids [A]; image [A], positions in `Images`; labels [A] in 0..K-1; xywh [A,4] in pixels,
    as in the file; area [A] in square pixels; crowd [A].
    """

    ids: IntArray
    image: IntArray
    labels: IntArray
    xywh: FloatArray
    area: FloatArray
    crowd: BoolArray

    def select(self, keep: BoolArray | IntArray) -> "Annotations":
        """Return those where `keep` [A] is true, or those at its positions, in their order."""
        if keep.dtype == np.bool_ and keep.all():
            return self  # a copy may take gigabytes
        return Annotations(*(getattr(self, f.name)[keep] for f in fields(self)))

    def with_area(self) -> "Annotations":
        """Return those whose width and height are positive, the ones that evaluation counts."""
        return self.select(np.asarray((self.xywh[:, 2:] > 0).all(axis=1)))
