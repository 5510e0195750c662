"""Results of the parts: JSON lines that are on the disk as soon as they are known."""

import json
import os
import time
from pathlib import Path
from typing import Any

RESULTS = "GPU_RESULTS"  # the file of JSON lines
DEADLINE = "GPU_DEADLINE"  # seconds since the epoch


def emit(part: str, **values: Any) -> None:
    """Print a result and append it to the file of results, where there is one."""
    line = json.dumps({"part": part, **values})
    print(line, flush=True)
    if RESULTS in os.environ:
        with Path(os.environ[RESULTS]).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def remaining() -> float:
    """Return the seconds that this part still has."""
    return float(os.environ.get(DEADLINE, "inf")) - time.time()
