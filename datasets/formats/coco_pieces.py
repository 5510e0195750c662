"""A large COCO-format file, parsed a piece at a time: as objects it takes ten times its size.

The result is that of the whole file. Where a piece cannot be had alone (entries that are no
objects, JSON that is none, another encoding), `Unsuitable` says so, and the file is parsed as a
whole.
"""

import contextlib
import gc
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, overload

from util.files import open_regular

T = TypeVar("T")
_PIECE = 1 << 23  # bytes
_LONGEST = 1 << 28  # bytes of one that is tried
_BLOCK = 1 << 20
_TRIES = 4  # ends of a piece that are tried: a list of objects in an entry has ends of its own
_SPACE = re.compile(rb"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class Unsuitable(Exception):
    """The file must be parsed as a whole."""


class Pieces(Sequence[Any], Generic[T]):
    """The entries of a list in a file. One that is asked for is parsed again, with its piece.

    `parts` are what was made of the pieces while they were there.
    """

    def __init__(
        self, path: Path, spans: Sequence[tuple[int, int, int]], length: int, parts: list[T]
    ) -> None:
        """Take where each piece begins and ends (bytes) and which entry is its first."""
        self._path, self._spans, self._length, self.parts = path, spans, length, parts
        self._piece: tuple[int, list[Any]] = (-1, [])

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, row: int) -> Any: ...
    @overload
    def __getitem__(self, row: slice) -> list[Any]: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        number = bisect_right(self._spans, row, key=itemgetter(2)) - 1
        return self._entries(number)[row - self._spans[number][2]]

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self._spans)):
            yield from self._entries(number)

    def _entries(self, number: int) -> list[Any]:
        if self._piece[0] != number:
            start, end, _ = self._spans[number]
            with open_regular(self._path) as file:
                file.seek(start)
                text = file.read(end - start).decode()
            self._piece = (number, json.loads(f"[{text}]"))
        return self._piece[1]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_pieces(path: Path, key: str, use: Callable[[list[Any]], T]) -> dict[str, Any]:
    """Return the object that a file holds, with `Pieces` under a key in place of the list.

    `use` makes a part of the entries of each piece, and may find them `Unsuitable`.

    Raises:
        Unsuitable: see there.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file, without_collection():
        reader = _Reader(file, os.fstat(file.fileno()).st_size)
        content: dict[str, Any] = {}
        at, mark = reader.after_space(0)
        if mark != b"{":
            raise Unsuitable
        while mark != b"}":  # a comma, after the first
            name, at = reader.key(at + 1)
            if name in content:
                raise Unsuitable
            if reader.after_space(at)[1] != b"[":
                content[name], at = reader.value(at)
            elif name == key:
                content[name], at = _read_list(reader, at, path, use)
            else:
                content[name] = []
                for _, end, entries in reader.pieces(at):
                    content[name] += entries
                    at = end  # which `pieces` does not see
                at = reader.after(at, b"]")
            at, mark = reader.after_space(at)
            if mark not in (b",", b"}"):
                raise Unsuitable
        if reader.after_space(at + 1)[1]:
            raise Unsuitable
    return content


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Parse JSON without looking for circles of objects, of which it makes none.

    Looking takes two fifths of the time, as millions of objects are made.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_list(
    reader: "_Reader", at: int, path: Path, use: Callable[[list[Any]], T]
) -> tuple[Pieces[T], int]:
    """Return the list that begins at or after a byte, and where it ends."""
    spans, parts, row = [], [], 0
    for start, end, entries in reader.pieces(at):
        if entries:
            spans.append((start, end, row))
            parts.append(use(entries))
            row += len(entries)
        at = end
    return Pieces(path, spans, row, parts), reader.after(at, b"]")


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def _read(self, start: int, length: int) -> bytes:
        self._file.seek(start)
        return self._file.read(length)

    def after_space(self, at: int) -> tuple[int, bytes]:
        """Return where the next character that is no space is, and it; b"" at the end."""
        while block := self._read(at, 64):
            found = _SPACE.match(block)
            assert found is not None
            at += found.end()
            if found.end() < len(block):
                return at, block[found.end() : found.end() + 1]
        return at, b""

    def after(self, at: int, mark: bytes) -> int:
        """Return where a character ends that must be the next one."""
        at, found = self.after_space(at)
        if found != mark:
            raise Unsuitable
        return at + 1

    def key(self, at: int) -> tuple[str, int]:
        """Return the name of a member and where its colon ends."""
        name, at = self.value(at)
        if not isinstance(name, str):
            raise Unsuitable
        return name, self.after(at, b":")

    def value(self, at: int) -> tuple[Any, int]:
        """Return the value that begins at or after a byte, and where it ends."""
        at, _ = self.after_space(at)
        length = 4096
        while True:
            block = self._read(at, length)
            try:
                text = _decode(block)
                value, end = _DECODER.raw_decode(text)
            except (ValueError, RecursionError):
                pass
            else:
                if end < len(text):  # otherwise a number may go on
                    return value, at + len(text[:end].encode())
            if at + len(block) >= self._size or length >= _LONGEST:
                raise Unsuitable
            length *= 16

    def pieces(self, at: int) -> Iterator[tuple[int, int, list[Any]]]:
        """Yield where pieces of a list of objects begin and end, and their entries.

        The list's own end is the next character after the last piece.
        """
        at, first = self.after(at, b"["), True
        while True:
            entries, end, over = self._piece(at)
            if not entries and not (first and over):
                raise Unsuitable
            yield at, end, entries
            if over:
                return
            at, mark = self.after_space(end)
            if mark == b"]":
                return
            if mark != b",":
                raise Unsuitable
            at, first = at + 1, False

    def _piece(self, at: int) -> tuple[list[Any], int, bool]:
        """Return entries from a byte on, where they end, and whether the list ends there."""
        length = _PIECE
        while True:
            block = self._read(at, length)
            cut = len(block)
            for _ in range(_TRIES):
                # Text up to a brace is a part of the list if it makes a list itself: within an
                # entry, brackets or quotes would be left open.
                cut = block.rfind(b"}", 0, cut) + 1
                if not cut:
                    break
                try:
                    text = block[:cut].decode()
                    entries, end = _DECODER.raw_decode(f"[{text}]")
                except (ValueError, RecursionError):
                    cut -= 1
                    continue
                if end == len(text) + 2:
                    return entries, at + cut, False
                inside = text[: end - 2]  # without the bracket that is added and the list's own
                return entries, at + len(inside.encode()), True
            if at + len(block) >= self._size or length >= _LONGEST:
                raise Unsuitable
            length *= 2


def _decode(block: bytes) -> str:
    """Return the text of a block, the end of which may be within a character."""
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        return block[: error.start].decode()
