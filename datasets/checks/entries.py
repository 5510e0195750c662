"""Check the entries of a COCO-format file one by one, as training does, but by every flaw."""

from collections.abc import Mapping
from itertools import count
from typing import Any

from datasets.checks.coco_json import image_fault, is_area, is_box, is_side, is_whole
from datasets.checks.kinds import KINDS
from datasets.checks.ledger import Box, CheckedImage, Ledger

_SECTIONS = ("images", "annotations", "categories")


def read_entries(ledger: Ledger) -> None:
    """Fill a ledger with the usable images, boxes and classes, and note all others."""
    for section in _SECTIONS:
        if not ledger.section(section):
            ledger.tell("missing_section", section)
    for finding in ledger.source.findings:
        kind = finding.kind if finding.kind in KINDS else "unreadable_annotation"
        reason, _, _ = finding.text.partition(":")
        for place in finding.places:
            ledger.tell(kind, place, reason)
        if not finding.places:  # of the set as a whole
            ledger.tell("odd_layout", ledger.source.place.name, finding.text)
    _read_categories(ledger)
    left_out = _read_images(ledger)
    _read_annotations(ledger, left_out)


def _read_categories(ledger: Ledger) -> None:
    for position, entry in enumerate(ledger.section("categories")):
        number = entry.get("id") if isinstance(entry, Mapping) else None
        if not is_whole(number) or number in ledger.class_names:
            ledger.tell("bad_category", f"categories[{position}]", f"id {number!r:.40}")
            ledger.drop("categories", position, "bad_category")
        else:
            name = str(entry.get("name") or int(number))
            ledger.class_names[int(number)] = _printable(name)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _read_images(ledger: Ledger) -> set[int]:
    """Fill in the images; return the ids of entries that are left out."""
    kept: dict[int, CheckedImage] = {}
    left_out: set[int] = set()
    for position, entry in enumerate(ledger.section("images")):
        number = entry.get("id") if isinstance(entry, Mapping) else None
        if not is_whole(number):
            ledger.tell("no_image_id", f"images[{position}]", f"id {number!r:.40}")
            ledger.drop("images", position, "no_image_id")
            continue
        number = int(number)  # 3.0 is one, too
        name = entry.get("file_name")
        fault = image_fault(name, number, kept)
        if fault is None:
            kept[number] = _image(ledger, position, entry)
            continue
        ledger.tell(fault, f"images[{position}]", f"file_name {name!r:.80}", image_id=number)
        ledger.drop("images", position, fault)
        if fault != "repeated_image":
            left_out.add(number)
        elif kept[number].name != name:
            ledger.drop("images", kept[number].position, fault)
            left_out.add(number)
    left_out -= {i for i, image in kept.items() if not _dropped(ledger, image)}
    ledger.images = [p for p in kept.values() if not _dropped(ledger, p)]
    return left_out


def _dropped(ledger: Ledger, image: CheckedImage) -> bool:
    return ledger.drops("images", image.position)


def _image(ledger: Ledger, position: int, entry: Mapping[str, Any]) -> CheckedImage:
    height, width = entry.get("height"), entry.get("width")
    stated = (int(height), int(width)) if is_side(height) and is_side(width) else None
    name = entry["file_name"]
    return CheckedImage(position, int(entry["id"]), name, ledger.source.image_dir / name, stated)


def _read_annotations(ledger: Ledger, left_out: set[int]) -> None:
    images = {image.id: image for image in ledger.images}
    entries = ledger.section("annotations")
    ids = {e["id"] for e in entries if isinstance(e, Mapping) and is_whole(e.get("id"))}
    unused = (number for number in count(1) if number not in ids)
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        place = f"annotations[{position}]"
        if not isinstance(entry, Mapping):
            ledger.tell("not_an_object", place, f"{entry!r:.60}")
            ledger.drop("annotations", position, "not_an_object")
            continue
        number = entry.get("id")
        if not is_whole(number) or number in seen:
            kind = "repeated_annotation" if is_whole(number) else "no_annotation_id"
            ledger.tell(kind, place, f"id {number!r:.40}")
            number = next(unused)
            ledger.change("annotations", position, kind, {"id": number})
        number = int(number)
        seen.add(number)
        _read_annotation(ledger, position, entry, number, images, left_out)


def _read_annotation(
    ledger: Ledger,
    position: int,
    entry: Mapping[str, Any],
    number: int,
    images: Mapping[int, CheckedImage],
    left_out: set[int],
) -> None:
    """Put an annotation with its image, or note why it has none."""
    image_id, category = entry.get("image_id"), entry.get("category_id")
    image = images.get(image_id) if is_whole(image_id) else None
    if image is None:
        kind = "unknown_image_id"
        if is_whole(image_id) and image_id in left_out:  # told with the image
            kind = "image_left_out"
        else:
            detail = f"image_id {image_id!r:.40}"
            ledger.tell(kind, f"annotations[{position}]", detail, annotation_id=number)
        ledger.drop("annotations", position, kind)
        return
    if not (is_whole(category) and category in ledger.class_names):
        ledger.tell(
            "unknown_category_id", image.name, f"category_id {category!r:.40}",
            image_id=image.id, annotation_id=number,
        )  # fmt: skip
        ledger.drop("annotations", position, "unknown_category_id")
        return
    area, crowd, bbox = entry.get("area"), entry.get("iscrowd"), entry.get("bbox")
    lacking = [key for key, valid in (("area", is_area(area)), ("iscrowd", crowd in (0, 1)))
               if not valid]  # fmt: skip
    if lacking:
        ledger.tell(
            "missing_key", image.name, ", ".join(lacking),
            image_id=image.id, annotation_id=number,
        )  # fmt: skip
        if "iscrowd" in lacking:
            ledger.change("annotations", position, "missing_key", {"iscrowd": 0})
    if not (isinstance(bbox, list) and is_box(bbox)):
        ledger.tell(
            "broken_bbox", image.name, f"bbox {bbox!r:.80}",
            image_id=image.id, annotation_id=number,
        )  # fmt: skip
        ledger.drop("annotations", position, "broken_bbox")
        return
    raw = (float(bbox[0]), float(bbox[1]), float(bbox[2]), float(bbox[3]))
    known_area = float(area) if is_area(area) else None
    image.boxes.append(Box(position, int(number), int(category), raw, raw, crowd == 1, known_area))
