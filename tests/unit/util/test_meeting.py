"""What processes say while they wait for others."""

import datetime
import socket
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from util import meeting
from util.console import show_messages
from util.errors import ConfigError, UserError
from util.meeting import meet

KEYS = [f"attempt_0/here/{i}" for i in range(4)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_PATIENCE", 0.1)
    show_messages()


@pytest.fixture
def port() -> int:
    """A port that is free."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def store() -> Any:
    """A store in which ranks 1 and 3 have announced themselves."""
    shared = dist.HashStore()  # type: ignore[attr-defined]
    for i in (1, 3):
        shared.set(KEYS[i], "")
    return shared


def test_the_first_rank_to_arrive_names_the_missing(
    store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [threading.Timer(0.4, store.set, (KEYS[i], "")) for i in (0, 2)]
    for other in others:
        other.start()
    meeting._await(store, KEYS, 1, "node:29500", time.monotonic() + 60)
    line = "warning: waiting for ranks 0, 2 of 4 processes to come to node:29500"
    assert capsys.readouterr().out.splitlines() == [line]


def test_one_process_alone_prints(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="rank 3: ranks 0, 2 did not come to node:29500 in half"):
        meeting._await(store, KEYS, 3, "node:29500", time.monotonic() + 0.3)
    assert capsys.readouterr().out == ""


def test_the_host_of_the_store_names_the_missing(
    port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server = dist.TCPStore(  # type: ignore[attr-defined]
        "localhost", port, is_master=True, wait_for_workers=False,
        timeout=datetime.timedelta(seconds=5),
    )  # fmt: skip
    server.set(KEYS[2], "")
    meeting._report_alone(0, "localhost", port, KEYS)
    line = f"warning: waiting for ranks 1, 3 of 4 processes to come to localhost:{port}"
    assert capsys.readouterr().out.splitlines() == [line]


@pytest.mark.long
def test_a_rank_without_an_answer_names_the_address(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "TIMEOUT", datetime.timedelta(seconds=1))
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(UserError, match=f"rank 1: rank 0 could not be reached at localhost:{port}"):
        meet(1, 2, "attempt_0")
    line = f"warning: waiting for rank 0 at localhost:{port}, where nothing answers"
    assert capsys.readouterr().out.splitlines() == [line]


def test_a_port_in_use_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        with pytest.raises(ConfigError, match=f"MASTER_PORT {port}: another program of this mac"):
            meet(0, 2, "attempt_0")


def test_many_ranks_are_counted() -> None:
    assert meeting._ranks([5]) == "rank 5"
    assert meeting._ranks(range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (20)"
