"""Read and write PASCAL VOC data: an XML file for each image, splits listed in ImageSets/Main.

PASCAL VOC counts pixels from 1 and xmax, ymax belong to the object (VOC2007 development kit, 5.1):
the box of xmin 1 and xmax 1 is one pixel wide and starts at 0. Tools such as labelImg write edges
into the same tags; voc_corners="edges" reads and writes those.
An object marked `difficult` counts neither for nor against a detector in VOC's evaluation (3.3),
as a crowd in COCO's: it becomes one, so it trains nothing.
"""

import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from datasets.checks.findings import first_few
from datasets.formats.registry import (
    DIGITS,
    FORMATS,
    Format,
    Placer,
    Source,
    Split,
    as_text,
    read_list,
    write_text,
)
from datasets.images import is_image
from util.errors import DataError
from util.files import make_output_dir, open_regular, write_atomic

_LARGEST = 10_000_000  # bytes of an XML file
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FLAG = re.compile(r"\s+-?[01]$")  # lists of one class say after each name whether it is there
# What XML 1.0 cannot hold, and line breaks, which end a name in a list.
_NOT_IN_XML = re.compile(r"[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def read_voc(root: Path, split: str, *, voc_corners: str = "pixels") -> Source:
    """Read a split: ImageSets/Main/SPLIT.txt, or all of Annotations/ if there are no lists.

    Classes are the names found in all of Annotations/, sorted, with ids from 1, so that every split
    has the same. Images are numbered from 1 by name.

    Raises:
        DataError: a folder or the list of the split is missing, it has no annotation file, or no
            object has a name.
    """
    folder, images = root / "Annotations", root / "JPEGImages"
    for needed in (folder, images):
        if not needed.is_dir():
            raise DataError(
                f"{root}: not a VOC folder with Annotations/ and JPEGImages/: there is no "
                f"{needed.name}/. Check `data_path`."
            )
    files = {path.stem: path for path in sorted(folder.glob("*.xml"))}
    lists = root / "ImageSets" / "Main"
    stems = _listed(lists / f"{split}.txt", split, files) if lists.is_dir() else set(files)
    trees, damaged = _parse(files)
    named = {_text(found, "name") for tree in trees.values() for found in tree.findall("object")}
    ids = {name: number for number, name in enumerate(sorted(named - {""}), 1)}
    if not ids:
        raise DataError(f"{folder}: there are no XML files with named objects.")
    there: dict[str, list[str]] = defaultdict(list)
    for path in sorted(images.iterdir()):
        if is_image(path):
            there[path.stem].append(path.name)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
    for number, stem in enumerate(sorted(stems & trees.keys()), 1):
        tree = trees[stem]
        stated = _text(tree, "filename")
        names = there.get(stem) or [stated or f"{stem}.jpg"]
        name = stated if stated in names else names[0]  # of several, the one that the file names
        content["images"].append({"id": number, "file_name": name, **_size(tree)})
        for entry in _objects(tree, ids, voc_corners):
            entry.update(id=len(content["annotations"]) + 1, image_id=number)
            content["annotations"].append(entry)
    if not content["images"]:
        raise DataError(
            f"{root}: Annotations/ has no XML files for the split '{split}', of {len(stems)} names "
            f"({first_few(map(repr, sorted(stems)), len(stems))}). "
            "Check its list in ImageSets/Main/."
        )
    lost = [damaged[stem] for stem in sorted(stems & damaged.keys())]
    lost += [(f"{stem}.xml", "no such file") for stem in sorted(stems - files.keys())]
    findings = {"unreadable_annotation": lost}
    if not lists.is_dir():
        findings["odd_layout"] = [
            (
                root.name,
                f"no lists in ImageSets/Main/: every split is all {len(stems)} files, train as val",
            )
        ]
    return Source(content, images, root, findings)


def _listed(path: Path, split: str, files: dict[str, Path]) -> set[str]:
    """Return the names of a split's images, without suffix, from its list."""
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise DataError(
            f"{path}: the split '{split}' has no list. Lists there: {known}. "
            "Choose with `train_split` and `val_split`."
        )
    # a line may have a flag, a suffix or a folder
    lines = [(line, _FLAG.sub("", line)) for line in read_list(path)]
    return {
        next((name for name in (line, plain, PurePath(plain).stem) if name in files), plain)
        for line, plain in lines
    }


def _parse(
    files: dict[str, Path],
) -> tuple[dict[str, ET.Element], dict[str, tuple[str, str]]]:
    """Return the trees of the files, and what is wrong with those that are not XML."""
    trees, damaged = {}, {}
    for stem, path in files.items():
        try:
            with open_regular(path, _LARGEST) as file:
                trees[stem] = ET.parse(file).getroot()
        except ET.ParseError as error:
            line, column = error.position
            what, *_ = str(error).split(":")
            damaged[stem] = (f"{path.name}:{line}", f"{what} at column {column + 1}")
        except (OSError, LookupError, ValueError) as error:  # unreadable, or an unknown encoding
            damaged[stem] = (f"{path.name}:1", str(error))
    return trees, damaged


def _text(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _size(tree: ET.Element) -> dict[str, int]:
    """Return width and height; nothing where the file does not state both."""
    sides = {key: _number(_text(tree, f"size/{key}")) for key in ("width", "height")}
    whole = {key: int(side) for key, side in sides.items() if side is not None and side >= 1}
    return whole if len(whole) == 2 else {}


def _objects(tree: ET.Element, ids: dict[str, int], corners: str) -> Iterator[dict[str, Any]]:
    """Yield each object without its ids; a box that is not four numbers is None."""
    first = 1 if corners == "pixels" else 0
    for found in tree.findall("object"):
        values = [_number(_text(found, f"bndbox/{tag}")) for tag in _CORNERS]
        box, numbers = None, [value for value in values if value is not None]
        if len(numbers) == 4:
            left, top, right, bottom = numbers
            x, y = left - first, top - first
            box = [round(v, DIGITS) for v in (x, y, right - x, bottom - y)]
        yield {
            "category_id": ids.get(_text(found, "name")),
            "bbox": box,
            "area": box[2] * box[3] if box else None,
            "iscrowd": int(_text(found, "difficult") == "1"),
        }


def _number(text: str) -> float | None:
    """Return a finite number, None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < 1e9 else None


def write_voc(
    splits: Sequence[Split], output_dir: Path, placer: Placer, *, voc_corners: str = "pixels"
) -> list[list[str]]:
    """Write splits; classes are known by name alone, and a crowd is a difficult object.

    Raises:
        DataError: names of classes would not come back.
    """
    for split in splits:
        names = [name.strip() for name in split.class_names]
        for name in names:
            if names.count(name) > 1 or not name or _NOT_IN_XML.search(name):
                raise DataError(
                    f"{output_dir}: VOC knows classes only by name, and {name!r} is empty, "
                    "repeated or cannot be written in XML. Rename the classes."
                )
    make_output_dir(output_dir)
    first = 1 if voc_corners == "pixels" else 0
    for split in splits:
        stems = []
        for image in split.images:
            flat = _NOT_IN_XML.sub("_", image.name.replace("/", "_"))
            name = placer.free(flat, output_dir, split.name)
            placer.put(image, output_dir / "JPEGImages" / name)
            root = ET.Element("annotation")
            ET.SubElement(root, "filename").text = name
            if all(image.size):
                size = ET.SubElement(root, "size")
                for key, side in zip(("height", "width"), image.size, strict=True):
                    ET.SubElement(size, key).text = str(side)
            for label, box, crowd in zip(image.labels, image.xywh, image.crowd, strict=True):
                written = ET.SubElement(root, "object")
                ET.SubElement(written, "name").text = split.class_names[label]
                ET.SubElement(written, "difficult").text = str(int(crowd))
                tags = ET.SubElement(written, "bndbox")
                x, y, width, height = box
                ends = (x + first, y + first, x + width, y + height)
                for key, value in zip(_CORNERS, ends, strict=True):
                    ET.SubElement(tags, key).text = as_text(value)
            ET.indent(root)
            file = output_dir / "Annotations" / f"{PurePath(name).stem}.xml"
            write_text(file, ET.tostring(root, encoding="unicode"))
            stems.append(f"{file.stem}\n")
        write_atomic(output_dir / "ImageSets" / "Main" / f"{split.name}.txt", "".join(stems))
    return [[] for _ in splits]


FORMATS.register("voc")(Format(read_voc, write_voc, options=("voc_corners",)))
