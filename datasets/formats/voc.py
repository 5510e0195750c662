"""Read PASCAL VOC data: an XML file for each image, splits listed in ImageSets/Main.

PASCAL VOC counts pixels from 1 and xmax, ymax belong to the object (VOC2007 development kit, 5.1):
the box of xmin 1 and xmax 1 is one pixel wide and starts at 0. Tools such as labelImg write edges
into the same tags; corners="edges" reads those.
An object marked `difficult` counts neither for nor against a detector in VOC's evaluation (3.3),
as a crowd in COCO's: it becomes one, so it trains nothing.
"""

import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from datasets.checks.findings import Finding, at_places, first_few
from datasets.images import is_image
from util.errors import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FLAG = re.compile(r"\s+-?[01]$")  # lists of one class say after each name whether it is there
_DIGITS = 6  # of a pixel; hides the rounding of a number written in decimal


def read_voc(
    root: Path, split: str, corners: str = "pixels"
) -> tuple[dict[str, Any], Path, list[Finding]]:
    """Return the content of a split as a COCO-format file, the image folder and findings.

    The split is ImageSets/Main/SPLIT.txt, or, with a finding, all of Annotations/ without lists.
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
                f"{root}: expected a VOC folder with Annotations/ and JPEGImages/, "
                f"found no {needed.name}/. Check --data_path."
            )
    files = {path.stem: path for path in sorted(folder.glob("*.xml"))}
    stems = _listed(root, split, files)
    trees, damaged = _parse(files)
    categories = sorted({name for tree in trees.values() for name in _names(tree)})
    if not categories:
        raise DataError(f"{folder}: expected XML files with named objects, found none.")
    ids = {name: number for number, name in enumerate(categories, 1)}
    there = _names_by_stem(images)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
    for number, stem in enumerate(sorted(stems & trees.keys()), 1):
        tree = trees[stem]
        name = _image_name(tree, stem, there)
        content["images"].append({"id": number, "file_name": name, **_size(tree)})
        for entry in _objects(tree, ids, corners):
            entry.update(id=len(content["annotations"]) + 1, image_id=number)
            content["annotations"].append(entry)
    if not content["images"]:
        raise DataError(
            f"{root}: expected XML files for the split '{split}' in Annotations/, got none for its "
            f"{len(stems)} names ({first_few(map(repr, sorted(stems)), len(stems))}). "
            "Check its list in ImageSets/Main/."
        )
    findings = [*_without_lists(root, len(stems)), *_lost(stems, files, damaged)]
    return content, images, findings


def _list_folder(root: Path) -> Path:
    return root / "ImageSets" / "Main"


def _without_lists(root: Path, count: int) -> list[Finding]:
    """Return the finding of a set that is not split."""
    if _list_folder(root).is_dir():
        return []
    line = f"no lists in ImageSets/Main/: every split is all {count} files, train as val"
    return [Finding("no_lists", count, line)]


def _names_by_stem(folder: Path) -> Mapping[str, list[str]]:
    """Return the images of a folder by their names without suffix."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if is_image(path):
            found[path.stem].append(path.name)
    return found


def _image_name(tree: "ET.Element", stem: str, there: Mapping[str, list[str]]) -> str:
    """Return the image named like its XML file; of several, that which the file names."""
    stated = (tree.findtext("filename") or "").strip()
    names = there.get(stem) or [stated or f"{stem}.jpg"]
    return stated if stated in names else names[0]


def _lost(stems: set[str], files: dict[str, Path], damaged: dict[str, str]) -> list[Finding]:
    """Return the findings of listed images whose annotations cannot be read."""
    return [
        *at_places(
            "damaged_xml",
            "annotation files that are not XML, their images left out",
            [damaged[stem] for stem in sorted(stems & damaged.keys())],
        ),
        *at_places(
            "missing_xml",
            "images listed without an annotation file, left out",
            [f"{stem}.xml" for stem in sorted(stems - files.keys())],
        ),
    ]


def _listed(root: Path, split: str, files: dict[str, Path]) -> set[str]:
    """Return the names of a split's images, without suffix."""
    lists = _list_folder(root)
    if not lists.is_dir():
        return set(files)
    path = lists / f"{split}.txt"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in lists.glob("*.txt"))) or "none"
        raise DataError(
            f"{path}: expected the list of the split '{split}', found none. "
            f"Lists there: {known}. Choose with --train_split and --val_split."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a list in UTF-8, got {error.reason}.") from error
    return {_stem(line.strip(), files) for line in lines if line.strip()}


def _stem(name: str, files: dict[str, Path]) -> str:
    """Return what a line of a list names, which may stand with a flag, a suffix or a folder."""
    plain = _FLAG.sub("", name)
    return next((s for s in (name, plain, PurePath(plain).stem) if s in files), plain)


def _parse(files: dict[str, Path]) -> tuple[dict[str, "ET.Element"], dict[str, str]]:
    """Return the trees of the files, and of those that are not XML where and why."""
    trees, damaged = {}, {}
    for stem, path in files.items():
        try:
            trees[stem] = ET.parse(path).getroot()
        except ET.ParseError as error:
            line, column = error.position
            damaged[stem] = f"{path.name}:{line}: {str(error).split(':')[0]} at column {column + 1}"
        except (OSError, LookupError, ValueError) as error:  # unreadable, or an unknown encoding
            damaged[stem] = f"{path.name}:1: {error}"
    return trees, damaged


def _names(tree: "ET.Element") -> Iterator[str]:
    for found in tree.findall("object"):
        name = (found.findtext("name") or "").strip()
        if name:
            yield name


def _size(tree: "ET.Element") -> dict[str, int]:
    """Return width and height; nothing where the file does not state both."""
    sides = {key: _number(tree.findtext(f"size/{key}")) for key in ("width", "height")}
    whole = {key: int(side) for key, side in sides.items() if side is not None and side >= 1}
    return whole if len(whole) == 2 else {}


def _objects(tree: "ET.Element", ids: dict[str, int], corners: str) -> Iterator[dict[str, Any]]:
    """Yield each object without its ids; a box that is not four numbers is None."""
    first = 1 if corners == "pixels" else 0
    for found in tree.findall("object"):
        values = [_number(found.findtext(f"bndbox/{tag}")) for tag in _CORNERS]
        box, numbers = None, [value for value in values if value is not None]
        if len(numbers) == 4:
            left, top, right, bottom = numbers
            left, top = left - first, top - first
            box = [round(v, _DIGITS) for v in (left, top, right - left, bottom - top)]
        name = (found.findtext("name") or "").strip()
        yield {
            "category_id": ids.get(name),
            "bbox": box,
            "area": box[2] * box[3] if box else None,
            "iscrowd": int((found.findtext("difficult") or "0").strip() == "1"),
        }


def _number(text: str | None) -> float | None:
    """Return a finite number, None for anything else."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e9 else None
