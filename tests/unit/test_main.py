"""The command line itself: what it prints where the terminal lacks letters."""

import io
import sys

import pytest

from main import main


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "cp1252", errors="strict"))
    assert main(["细胞 \udce9"]) == 2
    sys.stderr.flush()
    assert rb"unknown command '\u7ec6\u80de \udce9'" in written.getvalue()
