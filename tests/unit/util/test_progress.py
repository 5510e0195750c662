"""Progress: a bar on a terminal, lines in a file."""

import io
import sys

import pytest

from util.console import show_messages
from util.progress import progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Return that it is one."""
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless its only item is changed."""
    now = [100.0]
    monkeypatch.setattr("util.progress_lines.time.monotonic", lambda: now[0])
    return now


def test_a_file_gets_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    show_messages()
    with progress(total=200, done=100, unit="step", leave=True) as bar:
        bar.set_description("epoch 2/4", refresh=False)
        bar.set_postfix({"loss": "0.5"}, refresh=False)
        for _ in range(40):
            clock[0] += 1
            bar.update(1)
    out, err = capsys.readouterr()
    line = "epoch 2/4: step 130 of 200 (65%), 1 a second, 01:10 to go, loss=0.5"
    assert (out.splitlines(), err) == ([line], "")


def test_a_file_gets_lines_of_a_loop(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    show_messages()
    for _ in progress(range(8), unit="batch", description="evaluate"):
        clock[0] += 20
    out = capsys.readouterr().out
    assert "evaluate: batch 2 of 8 (25%), 0.05 a second, 02:00 to go" in out
    assert len(out.splitlines()) == 4


def test_short_or_disabled_progress_prints_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    show_messages()
    assert list(progress(iter("ab"), unit="batch")) == ["a", "b"]
    for _ in progress(range(3), unit="batch", enabled=False):
        clock[0] += 100
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress(range(3), unit="batch", description="evaluate"):
        pass
    assert "evaluate:" in stream.getvalue()
    assert "\r" in stream.getvalue()
    before = stream.tell()
    assert list(progress(range(3), unit="batch", enabled=False)) == [0, 1, 2]
    assert stream.tell() == before
