"""How the processes of a run find each other, and what is said while some have not come."""

import datetime
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from util.console import log
from util.errors import ConfigError, UserError

TIMEOUT = datetime.timedelta(minutes=30)  # of any exchange: rank 0 may be computing AP meanwhile
_PATIENCE = 5.0  # seconds without a word
_LOOK_EVERY = 0.05  # seconds
_SHORT = datetime.timedelta(seconds=5)
_MAX_SHOWN = 8


def meet(rank: int, size: int, attempt: str) -> Any:
    """Return the store of all processes, in which each has announced itself.

    After five seconds, a line says which ones have not come, and where they are waited for: from
    the first of those that have come, and from each that nobody answers.

    Raises:
        ConfigError: the port is not free.
        UserError: some have not come in half an hour.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the launcher has the store
    keys = [f"{attempt}/here/{i}" for i in range(size)]
    place, deadline = f"{address}:{port}", time.monotonic() + TIMEOUT.total_seconds()
    # meanwhile the main thread waits inside torch: rank 0 for others, these for its answer
    alone = threading.Timer(_PATIENCE, _report_alone, (rank, address, port, keys))
    alone.daemon = True
    alone.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
    except RuntimeError as error:  # torch 2.6 has no kind of its own for a port in use
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise ConfigError(
                f"MASTER_PORT {port}: another program of this machine listens there. Choose "
                "another port, the same for all processes."
            ) from error
        if agent or not isinstance(error, dist.DistNetworkError):
            raise
        raise UserError(
            f"rank {rank}: rank 0 could not be reached at {place}: {str(error).splitlines()[0]}. "
            "Check MASTER_ADDR and MASTER_PORT, and that rank 0 runs."
        ) from error
    finally:
        alone.cancel()
    store.set(keys[rank], "")
    if not agent:
        store.set(keys[0], "")  # it has answered, and waits inside torch
    _await(store, keys, rank, place, deadline)
    return store


def _await(store: Any, keys: Sequence[str], rank: int, place: str, deadline: float) -> None:
    """Wait until all have announced themselves."""
    started, silent = time.monotonic(), True
    while not store.check(list(keys)):
        now = time.monotonic()
        if silent and now - started > _PATIENCE:
            silent, missing = False, _missing(store, keys)
            if missing and rank == min(set(range(len(keys))).difference(missing)):
                _report_missing(missing, keys, place)
        if now > deadline:
            raise UserError(
                f"rank {rank}: {_ranks(_missing(store, keys))} did not come to {place} in half an "
                "hour. See their messages, and start all again."
            )
        time.sleep(_LOOK_EVERY)


def _report_alone(rank: int, address: str, port: int, keys: Sequence[str]) -> None:
    """Say what this process waits for before it has a store; a thread of its own runs this."""
    if rank:
        log.warning(f"waiting for rank 0 at {address}:{port}, where nothing answers")
        return
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, wait_for_workers=False, timeout=_SHORT
        )
        missing = [i for i in _missing(store, keys) if i != rank]
    except RuntimeError:
        missing = list(range(1, len(keys)))
    if missing:
        _report_missing(missing, keys, f"{address}:{port}")


def _report_missing(missing: Sequence[int], keys: Sequence[str], place: str) -> None:
    log.warning(f"waiting for {_ranks(missing)} of {len(keys)} processes to come to {place}")


def _missing(store: Any, keys: Sequence[str]) -> list[int]:
    return [i for i, key in enumerate(keys) if not store.check([key])]


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MAX_SHOWN]))
    more = f", ... ({len(ranks)})" if len(ranks) > _MAX_SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
