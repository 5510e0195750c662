"""Files as a stranger might send them: sound ones with parts cut, doubled, exchanged or made up."""

import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from util.console import error_line
from util.errors import UserError

SECONDS = 10.0  # that a file may take
BYTES = 1_000_000_000  # that all files of a test may add to the most the process has taken
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES < 1000,  # the suite tries the same files every time
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

_WORDS = (
    b"", b"\0", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"null", b"true", b'"', b"'", b"[",
    b"{", b"]", b"}", b",", b":", b"<", b">", b"&x;", b"<!DOCTYPE x [", b"\n", b"\t", b"\x1b[2J",
    b"\xff\xfe",
    b"\\ud800", b"../" * 9, b"/dev/zero", b"9" * 400, b"9" * 5000, b"[" * 2000, b"x" * 70000,
    b"*a", b"&a ", b"<<: ", b"!!python/object:os.system ", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff",
    b" " * 100_000, b"0x" + b"f" * 6000, b"1e99999999", b"<?xml" * 9000, b"2001-99-99", b"-" * 9000,
    b"<!ENTITY x 'yy'>", b"'" * 3000, b"{a: " * 900, b"\r", b"\xe2\x80\xae",
    b"data:,", b"~", b"$HOME",
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, sound: Sequence[bytes]) -> bytes:
    """Draw one of some sound files and change it in a few places."""
    content = draw(st.sampled_from(list(sound)))
    for _ in range(draw(st.integers(1, 4))):
        start = int(draw(st.floats(0, 1)) * len(content))
        end = min(len(content), start + draw(st.sampled_from((0, 1, 2, 4, 16, 200, 10**9))))
        kind = draw(st.sampled_from(("cut", "put", "double", "flip", "noise")))
        part = content[start:end]
        if kind == "cut":
            part = b""
        elif kind == "put":
            part = draw(st.sampled_from(_WORDS))
        elif kind == "double":
            part *= draw(st.integers(2, 20)) if len(part) < 1000 else 1
        elif kind == "flip" and part:
            part = bytes([part[0] ^ (1 << draw(st.integers(0, 7)))]) + part[1:]
        elif kind == "noise":
            part = draw(st.binary(max_size=40))
        content = content[:start] + part + content[end:]
    return content


ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2, 10**6, 10**30, 10**5000, -0.5, "1e99999999", "0x10", 2.5,
    float("nan"), float("inf"), "", "1", "\x1b]0;x\x07",
    "x" * 5000, "../../etc/passwd", [], [[]], [1, 2, 3], {}, {"a": 1}, {1: 2},
    [float("inf")] * 4, ["1", None, {}, []], [1e308, 1e308, 1e308, 1e308],
)  # fmt: skip
ODD_TENSORS = (
    torch.zeros(0), torch.zeros(1), torch.full((2, 3), float("nan")), torch.zeros(3).long(),
    torch.zeros(2, dtype=torch.complex64), torch.zeros(1).expand(5, 7), torch.zeros(5056).byte(),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of keys to everything in nested values."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:6])
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def exchanged(draw: st.DrawFn, content: Any, values: Sequence[Any]) -> Any:
    """Draw nested values of which some are exchanged for others, left out, or under odd keys."""
    content = _copied(content)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            break
        *above, key = draw(st.sampled_from(found))
        inner = content
        for step in above:
            inner = inner[step]
        kind = draw(st.sampled_from(("exchange", "exchange", "remove", "add")))
        if kind == "exchange":
            inner[key] = _copied(draw(st.sampled_from(list(values))))
        elif kind == "remove":
            del inner[key]
        elif isinstance(inner, dict):
            inner[draw(st.sampled_from(("", "\x1b", "x" * 3000, "id")))] = inner[key]
    return content


def _copied(value: Any) -> Any:
    """Return containers anew, around the same leaves."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


class TooLongError(BaseException):
    """No reader may catch it."""


def _too_long(*_: object) -> None:
    raise TooLongError(f"more than {SECONDS} s of processor time")


@contextmanager
def only_refused(*others: type[BaseException]) -> Iterator[None]:
    """Allow what a user is told in one line, and `others`; no hang, and bounded memory."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    usual = signal.signal(signal.SIGPROF, _too_long)  # what never ends would never be measured
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except UserError as error:
        line = error_line(str(error))
        if len(line) > 500 or not line:
            raise AssertionError(f"no line for a user: {line}") from error
    except others:
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, usual)
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
