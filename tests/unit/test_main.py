"""The command line itself: what it prints where the terminal lacks letters, and of errors."""

import io
import sys

import pytest

from main import in_one_line, main


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "cp1252", errors="strict"))
    assert main(["细胞 \udce9"]) == 2
    sys.stderr.flush()
    assert rb"unknown command '\u7ec6\u80de \udce9'" in written.getvalue()


def test_a_dead_loader_is_told_whatever_it_interrupts() -> None:
    """PyTorch raises it wherever the main process is, in `torch.save` too, whose end then fails."""
    death = "DataLoader worker (pid 7) is killed by signal: Killed. "
    failure = RuntimeError("unexpected pos 132544 vs 132432")
    assert in_one_line(failure) is None
    failure.__context__ = RuntimeError(death)
    line = in_one_line(failure)
    assert line is not None
    assert line.startswith(f"data loading: {death.strip()} The system")
