"""Messages to the console."""

import os

from tqdm import tqdm


def console(message: str, *, every_rank: bool = False) -> None:
    """Print a line without breaking a progress bar, in one process of a run or in every one."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        tqdm.write(message)
    elif every_rank:
        tqdm.write(f"rank {rank}: {message}")
