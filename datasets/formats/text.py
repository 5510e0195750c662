"""Text files of whatever encoding: read where the file says which it is, otherwise named."""

import codecs
import re

from util.files import no_text

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_GUESSES = ("gb18030", "shift_jis", "euc_kr", "cp1252")
_LOOKED_AT = 100_000  # bytes from the first that is not UTF-8
_NOT_ASCII = re.compile(rb"[\x80-\xff][^\0-\x2f:<>\"{}\[\]]{0,11}")


def decode(data: bytes, declared: str = "") -> str:
    """Return the text of a file in UTF-8, in what its first bytes mark or in what it declares.

    Raises:
        ValueError: it is none of these; the message shows what common encodings make of it. Or it
            is no text at all, but packed, or what stands in the file's place.
    """
    if what := no_text(data):
        raise ValueError(f"it {what}")
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if declared and declared.lower() not in ("utf-8", "utf8"):
            return _decode_as(data, declared)
        raise ValueError(not_utf8(data, error.start)) from error


def _decode_as(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except LookupError as error:
        raise ValueError(f"unknown encoding {encoding!r:.40}") from error


def not_utf8(data: bytes, start: int) -> str:
    """Return what is wrong with bytes whose byte `start` is not UTF-8, and what they may be."""
    line = data.count(b"\n", 0, start) + 1
    while start and data[start - 1] >= 0x80:  # some pairs of other encodings are UTF-8 by chance
        start -= 1
    word = _NOT_ASCII.search(data, start)
    readings = []
    for encoding in _GUESSES:
        try:
            codecs.getincrementaldecoder(encoding)().decode(data[start : start + _LOOKED_AT])
            shown = (word.group() if word else b"").decode(encoding, "ignore")
        except UnicodeDecodeError:
            continue
        readings.append(f"as {encoding} it says {shown!r}")
    return (
        f"not in UTF-8 (line {line}): {'; '.join(readings) or 'in no common encoding either'}. "
        "Save it as UTF-8"
    )
