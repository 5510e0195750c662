"""Writing files so that a crash leaves the old content or the new, never half of it."""

import os
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Replace the content of `path` in one step, making its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
