"""Lines in a log in place of a progress bar."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from util.console import log

_LINE_EVERY = 30.0  # seconds


class ProgressLines(tqdm):  # type: ignore[misc]  # it comes without types
    """Stands in for a bar and logs a line every half minute."""

    def __init__(self, iterable: Iterable[Any] | None, *, disable: Any, **options: Any) -> None:
        super().__init__(iterable, disable=True, **options)
        self._enabled = not disable
        self.desc, self.unit, self._first = options["desc"] or "", options["unit"], self.n
        self.postfix: str | None = None
        self._start = self._last = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """Count, and log a line if the last one was long ago."""
        self.n += int(n or 0)
        now = time.monotonic()
        if self._enabled and now - self._last >= _LINE_EVERY:
            self._last = now
            log.info(self._line(now - self._start))
        return None

    def _line(self, seconds: float) -> str:
        rate = (self.n - self._first) / seconds
        of = f" of {self.total} ({self.n / self.total:.0%})" if self.total else ""
        parts = [f"{self.unit} {self.n}{of}", f"{rate:.3g} a second"]
        if self.total and rate:
            parts.append(f"{tqdm.format_interval((self.total - self.n) / rate)} to go")
        parts += [self.postfix] if self.postfix else []
        name = self.desc.removesuffix(": ")  # which tqdm adds
        return ": ".join([*([name] if name else []), ", ".join(parts)])
