"""Whether the files of a data set are those of the last time, without reading them."""

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

_SETTLED = 2.0  # seconds: the coarsest times of a usual file system


class Stamp:
    """A hash of names, sizes and times of files, and of what else decides what is read.

    Of times, the last change of the content counts and that of the file's entry, which no program
    can set: a copy that keeps the former differs in the latter.
    """

    def __init__(self, *values: object) -> None:
        self.files = 0
        self._newest = 0
        self._hash = hashlib.sha256()
        self.add(*values)

    def add(self, *values: object) -> None:
        """Add values, whose `repr` must say all of them."""
        self._hash.update(f"{values!r}\n".encode("utf-8", "backslashreplace"))

    def add_files(self, paths: Iterable[Path]) -> None:
        """Add files in the order given; one that is not there is another one than if it were."""
        for path in map(str, paths):
            try:
                self._add_file(path, os.stat(path))
            except (OSError, ValueError):  # a name that no file can have
                self.add(path)

    def add_folder(self, folder: Path) -> None:
        """Add all that is in a folder, not what is below."""
        self.add(str(folder))
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    try:
                        self._add_file(entry.name, entry.stat())
                    except OSError:  # a link that leads nowhere
                        self.add(entry.name)
        except (OSError, ValueError):
            self.add(None)

    def _add_file(self, name: str, status: os.stat_result) -> None:
        self.files += 1
        times = status.st_mtime_ns, status.st_ctime_ns
        self._newest = max(self._newest, *times)
        self.add(name, status.st_mode, status.st_size, *times)

    @property
    def settled(self) -> bool:
        """Whether a change of any file from now on would show in its times."""
        return self._newest < (time.time() - _SETTLED) * 1e9

    def digest(self) -> str:
        """Return the hash."""
        return self._hash.hexdigest()
