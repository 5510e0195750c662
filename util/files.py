"""Output folders, and files of which a crash leaves the old content or the new, never half."""

import os
from pathlib import Path

from util.errors import ConfigError


def make_output_dir(path: Path) -> None:
    """Make the folder of a run's results, if it is not there.

    Raises:
        ConfigError: a file is in the way, or the place is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output_dir {path}: expected a folder or a place to make one "
            f"({error.strerror}). Choose another."
        ) from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"--output_dir {path}: expected a folder to write to. Choose another.")


def write_atomic(path: Path, text: str, *, errors: str = "strict") -> None:
    """Replace the content of `path` in one step, making its folder if needed.

    `errors`: what becomes of characters that UTF-8 lacks, as in `str.encode`; for JSON and HTML
    "backslashreplace" loses nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors=errors) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
