"""Logs of JSON lines, torn, foreign or hostile."""

import json
import os
from pathlib import Path

import pytest

from util.json_lines import json_lines


def test_lines_that_hold_an_object_come_back_as_they_are(tmp_path: Path) -> None:
    sound = ['{"epoch": 0, "loss": null}', '{"b": "\\u00e4"}', "{}"]
    odd = ['{"step": 3, "lo', "", "[1]", "7", "null", "[" * 100_000, "9" * 5000, "\x1b[2J", "\0"]
    mixed = [line for pair in zip(odd, [*sound] * 3, strict=True) for line in pair]
    (tmp_path / "log").write_bytes("\n".join(mixed).encode() + b"\n\xff\xfe{}\n")
    found = list(json_lines(tmp_path / "log"))
    assert [line for line, _ in found] == sound * 3
    assert [entry for _, entry in found] == [json.loads(line) for line in sound] * 3


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
def test_what_is_no_file_is_an_error_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="Not a regular file"):
        list(json_lines(tmp_path / "log"))
