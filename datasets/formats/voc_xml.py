"""What an XML file in PASCAL VOC's style says of an image, whoever wrote it."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets.formats.registry import DIGITS
from datasets.formats.text import decode
from util.files import read_regular

CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DECLARATION = re.compile(r"\s*<\?xml[^>]*\?>")
_ENCODING = re.compile(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)")
_ENTITY = re.compile(rb"<!ENTITY", re.IGNORECASE)
_STRAY = re.compile(r"&(?!#\d+;|#x[0-9a-fA-F]+;|(?:amp|lt|gt|quot|apos);)")
_LARGEST = 10_000_000  # bytes of a file
_START = 1000  # bytes that show what a file is
_FEW = 3  # boxes that show a habit


def parse_xml(data: bytes) -> tuple[ET.Element, str]:
    """Return a file's tree, and how it had to be read if not by the book.

    An encoding that the parser lacks is decoded here, and an `&` that starts nothing is text.

    Raises:
        ET.ParseError: it is not XML.
        ValueError: its encoding is unknown, it is not in the one that it declares, or it defines
            entities, with which a few bytes stand for many.
    """
    if _ENTITY.search(data.replace(b"\0", b"")):  # in UTF-16, every other byte is 0
        raise ValueError("defines entities, which annotations do not need")
    try:
        return ET.fromstring(data), ""
    except (ET.ParseError, LookupError, ValueError):
        declared = _ENCODING.match(data)
        encoding = declared.group(1).decode("ascii", "replace") if declared else ""
        text = decode(data, encoding)
        declaration = _DECLARATION.match(text)  # a search would take long in a file of blanks
        text = text[declaration.end() :] if declaration else text
    repaired, strays = _STRAY.subn("&amp;", text)
    try:
        return ET.fromstring(text), f"in the encoding {encoding or 'that it does not declare'}"
    except ET.ParseError:
        return ET.fromstring(repaired), f"with {strays} `&` taken as text"


def parse_files(
    files: dict[str, Path],
) -> tuple[dict[str, ET.Element], dict[str, tuple[str, str]], list[tuple[str, str]]]:
    """Return the trees, what is wrong with the files that are not XML, and which were repaired."""
    trees: dict[str, ET.Element] = {}
    damaged, repaired = {}, []
    for stem, path in files.items():
        try:
            trees[stem], how = parse_xml(read_regular(path, _LARGEST))
        except ET.ParseError as error:
            line, column = error.position
            what, *_ = str(error).split(":")
            damaged[stem] = (f"{path.name}:{line}", f"{what} at column {column + 1}")
        except (OSError, ValueError) as error:
            damaged[stem] = (f"{path.name}:1", str(error))
        else:
            repaired += [(path.name, how)] if how else []
    return trees, damaged, repaired


def text_of(element: ET.Element, path: str) -> str:
    """Return the text at a path, "" if there is none."""
    return (element.findtext(path) or "").strip()


def size_of(tree: ET.Element) -> dict[str, int]:
    """Return width and height; nothing where the file does not state both."""
    sides = {key: _number(text_of(tree, f"size/{key}")) for key in ("width", "height")}
    whole = {key: int(side) for key, side in sides.items() if side is not None and side >= 1}
    return whole if len(whole) == 2 else {}


def objects(tree: ET.Element, ids: dict[str, int], corners: str) -> Iterator[dict[str, Any]]:
    """Yield each object without its ids; a box that is not four numbers is None."""
    for found in tree.findall("object"):
        box = _box(_numbers(found), corners) or shape_box(found)
        yield {
            "category_id": ids.get(text_of(found, "name")),
            "bbox": box,
            "area": box[2] * box[3] if box else None,
            "iscrowd": int(text_of(found, "difficult") == "1"),
        }


def _numbers(found: ET.Element) -> list[float]:
    values = [_number(text_of(found, f"bndbox/{tag}")) for tag in CORNERS]
    return [value for value in values if value is not None]


def _box(numbers: list[float], corners: str) -> list[float] | None:
    """Return x, y, width and height in pixels of what the four tags hold."""
    if len(numbers) != 4:
        return None
    first = 1 if corners == "pixels" else 0
    left, top, right, bottom = numbers
    x, y = left - first, top - first
    width, height = (right, bottom) if corners == "size" else (right - x, bottom - y)
    return [round(v, DIGITS) for v in (x, y, width, height)]


def shape_box(found: ET.Element) -> list[float] | None:
    """Return the box around an object's polygon or rotated box, of one without four corners.

    Polygons are x1, y1, x2, ... or points of x and y; rotated boxes are those of roLabelImg.
    """
    if len(_numbers(found)) == 4:
        return None
    turned = [_number(text_of(found, f"robndbox/{tag}")) for tag in ("cx", "cy", "w", "h", "angle")]
    sides = [value for value in turned if value is not None]
    if len(sides) == 5:
        cx, cy, w, h, angle = sides
        cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
        w, h = w * cos + h * sin, w * sin + h * cos
        return [round(v, DIGITS) for v in (cx - w / 2, cy - h / 2, w, h)]
    polygon = found.find("polygon")
    if polygon is None:
        return None
    xs, ys = (
        [
            value
            for tag in polygon.iter()
            if re.fullmatch(rf"{axis}\d*", str(tag.tag))
            and (value := _number((tag.text or "").strip())) is not None
        ]
        for axis in "xy"
    )
    if len(xs) < 3 or len(xs) != len(ys):
        return None
    box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
    return [round(v, DIGITS) for v in box]


def look_like_sizes(trees: Iterable[ET.Element]) -> str:
    """Return why xmax and ymax seem to hold width and height, "" if they do not.

    Then some are left of or above xmin and ymin, and all fit their images as sizes.
    """
    boxes = inverted = 0
    for tree in trees:
        size = size_of(tree)
        for found in tree.findall("object"):
            numbers = _numbers(found)
            if len(numbers) != 4:
                continue
            x, y, width, height = numbers
            boxes += 1
            inverted += width < x or height < y
            if size and (x + width > size["width"] + 1 or y + height > size["height"] + 1):
                return ""
    if inverted < _FEW or inverted < boxes / 10:
        return ""
    return f"{inverted} of {boxes} boxes have xmax or ymax below xmin or ymin"


def is_cvat(path: Path) -> bool:
    """Return whether a file is CVAT's, which holds all images, not one as VOC's do."""
    try:
        with path.open("rb") as file:
            return b"<annotations>" in file.read(_START)
    except OSError:
        return False


def _number(text: str) -> float | None:
    """Return a finite number, None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < 1e9 else None
