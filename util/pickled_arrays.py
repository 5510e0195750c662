"""Pickles of numpy arrays, read without making anything but numbers, text and their containers.

Unpickling calls whatever a file names. Here every name leads to a stand-in of our own that only
notes what it is given; arrays are made afterwards, of bytes that are in the file.
"""

import math
import mmap
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

_NUMBERS = frozenset(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"])
_MAX_TUPLES = 20_000  # nested, more of them would exhaust the stack when one is a key
_TUPLES = frozenset(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"))
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_OPCODES = _TUPLES | _PUTS | {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "EMPTY_LIST", "APPEND", "APPENDS",
    "LIST", "EMPTY_TUPLE", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL",
    "REDUCE", "BUILD", "GET", "BINGET", "LONG_BINGET", "MEMOIZE",
}  # fmt: skip
# The first bytes of what torch.save wrote before it wrote zip archives.
_TORCH_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def is_plain_pickle(head: bytes) -> bool:
    """Return whether a file that begins so is a pickle, but neither a zip nor one of torch."""
    return head[:1] in b"\x80(}c]" and not head.startswith((b"PK", _TORCH_START))


def load_arrays(file: BinaryIO) -> Any:
    """Read a pickle of any protocol, of Python 2 as well; arrays and numpy's numbers are tensors.

    Raises:
        pickle.UnpicklingError: it asks for something else, "GLOBAL module.name", or is malformed.
        ValueError: it is cut, or an array has other bytes than its shape and type need.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        _check_opcodes(whole)
        size = len(whole)
        whole.seek(0)
        content = _Reader(whole, encoding="latin1").load()
    return _Maker(size).finished(content)


def _check_opcodes(whole: mmap.mmap) -> None:
    """Refuse what no pickle of arrays has, and tables far longer than what is put into them."""
    tuples = 0
    for count, (opcode, value, _) in enumerate(pickletools.genops(cast(BinaryIO, whole))):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"{opcode.name}, which no pickle of arrays has")
        tuples += opcode.name in _TUPLES
        if tuples > _MAX_TUPLES or (opcode.name in _PUTS and int(value or 0) > count):
            raise pickle.UnpicklingError("more entries than the file has room for")


class _Array:
    """What a file says of an array."""

    __slots__ = ("state",)

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __setstate__(self, state: Any) -> None:
        _, *rest = state  # a version
        self.state = tuple(rest)


class _Type:
    """What a file says of a type of numbers."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Function:
    """Stands in for a function or class that a pickle names; it cannot be changed."""

    __slots__ = ("call",)
    call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "call", call)

    def __call__(self, *values: Any) -> Any:
        return self.call(*values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a function is to be changed")


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    if axes is not None:
        raise pickle.UnpicklingError("an array with its axes in another order")
    return _Array(shape, kind, order == "F", data)


def _scalar(kind: Any, data: Any = b"") -> _Array:
    return _Array((), kind, False, data)


def _encoded(text: Any, encoding: Any) -> bytes:
    """Return bytes as Python 3 writes them for Python 2."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError("text in an encoding that no array needs")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Return what Python 3 calls `bytes` for in old protocols: none."""
    return b""


_NUMPY: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": lambda *_: _Array(),
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
}
_FUNCTIONS = {
    "numpy.ndarray": _Function(lambda *_: _Array()),
    "numpy.dtype": _Function(_Type),
    "collections.OrderedDict": _Function(dict),
    "_codecs.encode": _Function(_encoded),
    "builtins.bytes": _Function(_no_bytes),
    "__builtin__.bytes": _Function(_no_bytes),
    **{
        f"numpy.{core}.{name}": _Function(call)
        for name, call in _NUMPY.items()
        for core in ("core", "_core")
    },
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name.

        Raises:
            pickle.UnpicklingError: there is none.
        """
        found = _FUNCTIONS.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module[:100]}.{name[:100]}")
        return found


class _Maker:
    """Makes tensors of what was noted, together not larger than the file."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._made: dict[int, Any] = {}  # by identity: one object may be in several places

    def finished(self, content: Any) -> Any:
        """Return what was read, with tensors in dictionaries, lists and tuples.

        Containers are filled one after the other: a file can be nested arbitrarily deep.
        """
        result: list[Any] = [content]
        waiting: list[tuple[Any, Any]] = [(result, 0)]
        while waiting:
            place, key = waiting.pop()
            value = place[key]
            if isinstance(value, _Array):
                place[key] = self._tensor(value)
            elif isinstance(value, (_Function, _Type)):
                raise pickle.UnpicklingError("a type in place of a value")
            elif isinstance(value, (dict, list, tuple)) and id(value) not in self._made:
                # a tuple, which cannot be filled, becomes a list
                inner = list(value) if isinstance(value, tuple) else value
                self._made[id(value)] = (value, inner)  # held, so that no other gets its identity
                self._made[id(inner)] = (inner, inner)
                place[key] = inner
                keys = list(inner) if isinstance(inner, dict) else range(len(inner))
                waiting += [(inner, k) for k in keys]
            elif isinstance(value, tuple):
                place[key] = self._made[id(value)][1]
        return result[0]

    def _tensor(self, array: _Array) -> Tensor:
        if id(array) in self._made:
            tensor: Tensor = self._made[id(array)][1]
            return tensor
        try:
            shape, kind, by_columns, data = array.state
            code = str(kind.code).lstrip("<>=|")
            raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        except (AttributeError, TypeError, ValueError) as error:
            raise pickle.UnpicklingError("an array that is not one of numbers") from error
        sides = shape if isinstance(shape, tuple) else (shape,)
        if code not in _NUMBERS or not all(type(side) is int and side >= 0 for side in sides):
            raise pickle.UnpicklingError(f"an array of the type {code[:20]!r}")
        if math.prod(sides) * int(code[1:]) != len(raw):
            raise ValueError(f"an array of {len(raw)} bytes for the shape {str(sides)[:60]}")
        self._left -= len(raw)
        if self._left < 0:
            raise ValueError("arrays of more bytes than the file has")
        order = kind.order if kind.order in ("<", ">") else "="
        values = np.frombuffer(raw, np.dtype(f"{order}{code}"))
        values = values.reshape(sides, order="F" if by_columns else "C")
        native = np.array(values, dtype=code, order="C")  # a copy that may be written to
        made = torch.from_numpy(native)
        self._made[id(array)] = (array, made)
        return made
