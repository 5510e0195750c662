"""Read and write PASCAL VOC data: an XML file for each image, lists of splits in ImageSets.

PASCAL VOC counts pixels from 1 and xmax, ymax belong to the object (VOC2007 development kit, 5.1):
the box of xmin 1 and xmax 1 is one pixel wide and starts at 0. Tools such as labelImg write edges
into the same tags; voc_corners="edges" reads and writes those. voc_corners="size" is for tools that
put width and height into xmax and ymax.
An object marked `difficult` counts neither for nor against a detector in VOC's evaluation (3.3),
as a crowd in COCO's: it becomes one, so it trains nothing.
"""

import os
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from datasets.checks.findings import first_few
from datasets.formats.layout import (
    SPLITS,
    choose_split,
    files_below,
    folders,
    has_file,
    listings,
    split_names,
    subfolder,
    walk,
)
from datasets.formats.layout import files as files_in
from datasets.formats.registry import (
    FORMATS,
    Format,
    Placer,
    Source,
    Split,
    as_text,
    read_list,
    write_text,
)
from datasets.formats.stamps import Stamp
from datasets.formats.voc_xml import (
    CORNERS,
    is_cvat,
    look_like_sizes,
    objects,
    parse_files,
    shape_box,
    size_of,
    text_of,
)
from datasets.images import is_image
from util.errors import DataError
from util.files import make_output_dir, write_atomic

_ANNOTATIONS = ("Annotations", "annotation", "xmls")
_IMAGES = ("JPEGImages", "images", "image", "imgs", "img", "data")
# Lists of one class say after each name whether it is there. Matched from the first blank of a row
# on, or a long row would be tried from each of them.
_FLAG = re.compile(r"(?<!\s)\s+-?[01]$")
# What XML 1.0 cannot hold, and line breaks, which end a name in a list.
_NOT_IN_XML = re.compile(r"[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def read_voc(root: Path, split: str, *, voc_corners: str = "pixels") -> Source:
    """Read a split: its list, a folder of the split, or all if there is neither.

    Lists are ImageSets/Main/SPLIT.txt, or in ImageSets/ itself.

    Classes are the names found in the files of all splits, sorted, with ids from 1, so that every
    split has the same. Images are numbered from 1 by name.

    Raises:
        DataError: a folder or the list of the split is missing, it has no annotation file, or no
            object has a name.
    """
    place = find_voc(root, split)
    files = {_key(path, place.annotations): path for path in place.files}
    stems = _listed(place.lists, split, files) if place.lists else set(files)
    trees, damaged, repaired = parse_files(files)
    others, _, _ = parse_files({str(path): path for path in place.other_files})
    every = (*trees.values(), *others.values())
    named = {text_of(found, "name") for tree in every for found in tree.findall("object")}
    ids = {name: number for number, name in enumerate(sorted(named - {""}), 1)}
    if not ids:
        raise DataError(f"{place.annotations}: there are no XML files with named objects.")
    image_name = _ImageNames(place.images)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
    shaped = []
    for number, stem in enumerate(sorted(stems & trees.keys()), 1):
        tree = trees[stem]
        name = image_name(stem, text_of(tree, "filename"))
        content["images"].append({"id": number, "file_name": name, **size_of(tree)})
        for entry in objects(tree, ids, voc_corners):
            entry.update(id=len(content["annotations"]) + 1, image_id=number)
            content["annotations"].append(entry)
        shaped += [(files[stem].name, "") for found in tree.findall("object") if shape_box(found)]
    if not content["images"]:
        raise DataError(
            f"{root}: {place.annotations.name}/ has no XML files for the split '{split}', of "
            f"{len(stems)} names ({first_few(map(repr, sorted(stems)), len(stems))}). "
            f"{f'Check its list in {place.lists}.' if place.lists else 'Check its files.'}"
        )
    lost = [damaged[stem] for stem in sorted(stems & damaged.keys())]
    lost += [(f"{stem}.xml", "no such file") for stem in sorted(stems - files.keys())]
    findings = {
        "unreadable_annotation": lost,
        "repaired_annotation": repaired,
        "shape_bbox": shaped,
    }
    if place.every_split:
        findings["odd_layout"] = [
            (
                root.name,
                f"no lists in ImageSets/: every split is all {len(stems)} files, train as val",
            )
        ]
    sizes = "" if voc_corners == "size" else look_like_sizes(trees[s] for s in stems & trees.keys())
    findings["size_corners"] = [(root.name, sizes)] if sizes else []
    return Source(content, place.images, root, findings)


def stamp_voc(root: Path, split: str, stamp: Stamp) -> None:
    """Add what decides what `read_voc` returns: XML files, lists, and the names of images."""
    place = find_voc(root, split)
    stamp.add(str(place.annotations), str(place.images), str(place.lists), place.every_split)
    stamp.add_files(place.files)
    stamp.add(len(place.files))
    stamp.add_files(place.other_files)
    stamp.add_files(sorted(place.lists.glob("*.txt")) if place.lists else ())
    for folder, names in sorted(listings(place.images)):
        stamp.add(str(folder), sorted(names))


@dataclass(frozen=True)
class _Place:
    """Where a split's files are: those of the other splits too, for the names of classes."""

    annotations: Path
    images: Path
    files: list[Path]
    other_files: list[Path] = field(default_factory=list)
    lists: Path | None = None
    every_split: bool = False


def find_voc(root: Path, split: str) -> _Place:
    """Return where a split's XML files and images are: VOC's folders, or those of a split.

    Raises:
        DataError: there are no such files, or no folder of images.
    """
    folder = _annotations_in(root)
    if folder:
        return _find_in_voc(root, folder, split)
    own = {name: place for name in SPLITS if (place := _split_folder(root, name))}
    chosen = own.get(split) or _split_folder(root, split)
    if chosen:
        others = [p for s, place in own.items() if place != chosen for p in walk(place[0], ".xml")]
        return _Place(*chosen, walk(chosen[0], ".xml"), others)
    if own:
        raise DataError(
            f"{root}: there are no XML files of the split '{split}'. Splits there: "
            f"{', '.join(own)}. {choose_split(split)}"
        )
    if has_file(root, ".xml"):
        images = subfolder(root, *_IMAGES) or root
        return _Place(root, images, sorted(files_in(root, ".xml")), every_split=True)
    raise DataError(
        f"{root}: not a VOC folder with Annotations/ and JPEGImages/: there is no Annotations/, "
        "nor are there XML files beside images. Check `data_path`."
    )


def _find_in_voc(root: Path, folder: Path, split: str) -> _Place:
    images = subfolder(root, *_IMAGES)
    if images is None:
        raise DataError(
            f"{root}: not a VOC folder with Annotations/ and JPEGImages/: there is no "
            "JPEGImages/. Check `data_path`."
        )
    folder = folder if has_file(folder, ".xml") else subfolder(folder, "xmls") or folder
    files, sets = walk(folder, ".xml"), root / "ImageSets"
    lists = sets / "Main"
    if not has_file(lists, ".txt") and _has_lists(sets, split):
        lists = sets
    if os.path.isdir(lists):
        return _Place(folder, images, files, lists=lists)
    own = subfolder(folder, *split_names(split))
    if own:
        chosen = [path for path in files if own in path.parents]
        return _Place(folder, images, chosen, [p for p in files if own not in p.parents])
    return _Place(folder, images, files, every_split=True)


def _has_lists(folder: Path, split: str) -> bool:
    """Return whether there are lists of splits: other texts stand beside Main/, too."""
    names = (name for each in (split, *SPLITS) for name in split_names(each))
    return any(os.path.isfile(folder / f"{name}.txt") for name in names)


def _split_folder(root: Path, split: str) -> tuple[Path, Path] | None:
    """Return the folders of a split's XML files and images, if it has one of its own."""
    own = subfolder(root, *split_names(split))
    inner = own and _annotations_in(own)
    for folder in (inner, own):
        if own and folder and has_file(folder, ".xml"):
            return folder, subfolder(own, *_IMAGES) or own
    return None


def _annotations_in(root: Path) -> Path | None:
    """Return the folder of XML files; FiftyOne calls it labels, as others call that of YOLO."""
    labels = subfolder(root, "labels")
    return subfolder(root, *_ANNOTATIONS) or (labels if labels and _has_xml(labels) else None)


def _has_xml(folder: Path) -> bool:
    """Return whether there are XML files in a folder or in one of its subfolders."""
    return any(has_file(f, ".xml") for f in (folder, *folders(folder)))


def has_voc(root: Path) -> str:
    """Return what shows that a folder holds VOC data, "" if nothing does."""
    folder = _annotations_in(root)
    if folder and _has_xml(folder):
        return f"XML files in {folder.name}/"
    found = next((place for split in SPLITS if (place := _split_folder(root, split))), None)
    if found:
        return f"XML files in {found[0].relative_to(root).as_posix()}/"
    first = next(files_in(root, ".xml"), None)
    return "XML files" if first and not is_cvat(first) else ""


def _key(path: Path, folder: Path) -> str:
    """Return the name of a file in its folder, without suffix."""
    return path.relative_to(folder).as_posix()[: -len(path.suffix)]


class _ImageNames:
    """Finds the image of an XML file: of its name, in the same subfolder or the only one."""

    def __init__(self, folder: Path) -> None:
        self._by_key: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for path in sorted(files_below(folder)):
            if is_image(path):
                name = path.relative_to(folder).as_posix()
                self._by_key[_key(path, folder)].append(name)
                self._by_stem[path.stem].append(name)

    def __call__(self, key: str, stated: str) -> str:
        """Return the name; of several, the one that the file states."""
        names = self._by_key.get(key, [])
        if not names:
            found = self._by_stem.get(PurePath(key).name, [])
            names = found if len({PurePath(name).parent for name in found}) == 1 else []
        if not names:
            return stated or f"{key}.jpg"
        return next((name for name in names if PurePath(name).name == stated), names[0])


def _listed(lists: Path, split: str, files: dict[str, Path]) -> set[str]:
    """Return the names of a split's images, without suffix, from its list."""
    named = (lists / f"{name}.txt" for name in split_names(split))
    path = next((path for path in named if os.path.isfile(path)), lists / f"{split}.txt")
    if not os.path.isfile(path):
        known = ", ".join(sorted(p.stem for p in lists.glob("*.txt"))) or "none"
        raise DataError(
            f"{path}: the split '{split}' has no list. Lists there: {known}. {choose_split(split)}"
        )
    by_stem: dict[str, list[str]] = defaultdict(list)
    for key in files:
        by_stem[PurePath(key).name].append(key)
    return {_listed_key(line, files, by_stem) for line in read_list(path)}


def _listed_key(line: str, files: dict[str, Path], by_stem: dict[str, list[str]]) -> str:
    """Return which file a line names; it may have a flag, a suffix or a folder."""
    plain = _FLAG.sub("", line).replace("\\", "/")
    path = PurePath(plain)
    for name in (line, plain, path.with_suffix("").as_posix() if path.name else plain, path.stem):
        if name in files:
            return name
    alone = by_stem.get(path.stem) or by_stem.get(path.name) or []
    return alone[0] if len(alone) == 1 else plain


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
                right, bottom = (0, 0) if voc_corners == "size" else (x, y)
                ends = (x + first, y + first, right + width, bottom + height)
                for key, value in zip(CORNERS, ends, strict=True):
                    ET.SubElement(tags, key).text = as_text(value)
            ET.indent(root)
            file = output_dir / "Annotations" / f"{PurePath(name).stem}.xml"
            write_text(file, ET.tostring(root, encoding="unicode"))
            stems.append(f"{file.stem}\n")
        write_atomic(output_dir / "ImageSets" / "Main" / f"{split.name}.txt", "".join(stems))
    return [[] for _ in splits]


FORMATS.register("voc")(Format(read_voc, write_voc, options=("voc_corners",), stamp=stamp_voc))
