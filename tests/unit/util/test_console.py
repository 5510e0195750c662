"""What is printed: names that a terminal would obey, errors of any length, streams nobody reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from util.console import console, error_line, in_line, log, printable

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;owned\x07cat", r"\x1b[2J\x1b]0;owned\x07cat"),
        ("a\rb\x9b31m\x7f", r"a\rb\x9b31m\x7f"),
        ("\u202egnp.exe\u2066\u2028", r"\u202egnp.exe\u2066\u2028"),
        ("Käse, 猫\u3000🐈\u200d⬛", "Käse, 猫\u3000🐈\u200d⬛"),
        ("first\n\tsecond", "first\n\tsecond"),
    ],
)
def test_terminal_control_characters_are_escaped(
    capsys: pytest.CaptureFixture[str], text: str, shown: str
) -> None:
    assert printable(text) == shown
    console(text)
    log.warning(text)
    assert capsys.readouterr().out == f"{shown}\nwarning: {shown}\n"


def test_a_name_stays_on_its_line() -> None:
    assert in_line("cat\ndog\t\x1b") == r"cat\ndog\t\x1b"
    assert in_line("\u202egnp.exe\u2028") == r"\u202egnp.exe\u2028"
    assert in_line("Käse, 猫🐈") == "Käse, 猫🐈"


def test_names_that_differ_by_what_is_invisible_are_shown_apart() -> None:
    assert in_line("cat\u200b") == r"cat\u200b"
    assert in_line("a\xa0b\udc80") == r"a\xa0b\udc80"


def test_an_error_is_one_line_of_500_characters_at_most() -> None:
    text = f"{'x' * 5000}\n\x1b: is too long. Shorten it."
    line = error_line(text)
    assert len(line) == 500
    assert line.startswith("xxx")
    assert line.endswith(r"x\n\x1b: is too long. Shorten it.")
    assert error_line("a: is wrong.") == "a: is wrong."


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="needs pipes without a reader")
@pytest.mark.parametrize("how", ["closed", "ended"])
def test_a_program_continues_when_nobody_reads_its_output(tmp_path: Path, how: str) -> None:
    code = (
        "import sys; from pathlib import Path; from util.console import *; keep_streams()\n"
        "show_messages()\n"
        "for i in range(20_000): console(f'line {i}')\n"
        "print('done', file=sys.stderr); Path(sys.argv[1]).write_text('finished')"
    )
    more = {"closed": ">&-", "ended": "| head -n 1"}[how]
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "$2" {more}', sys.executable, code, str(tmp_path / "end")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == "done\n"
    assert (tmp_path / "end").read_text() == "finished"
    assert done.stdout == {"closed": "", "ended": "line 0\n"}[how]
