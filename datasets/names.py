"""Many strings in two arrays, which worker processes share without touching."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray


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
        return (self[i] for i in range(len(self)))
