"""Files of formats that are not read here, or not from where they were given: what they are."""

import re
from pathlib import Path

from datasets.formats.layout import mentions
from datasets.formats.voc_xml import is_cvat
from util.files import head_of

# By the end of a file's name, or by keys in it.
NAMES = {
    ".createml.json": "Create ML JSON", ".jsonl": "JSON lines", ".ndjson": "JSON lines",
    ".odgt": "JSON lines", ".manifest": "JSON lines", ".csv": "a table (CSV)",
    ".tfrecord": "TFRecord", ".record": "TFRecord", ".parquet": "Parquet",
}  # fmt: skip
_KEYS = {
    "Create ML JSON": ("image", "annotations", "coordinates"),
    "Label Studio's own JSON": ("from_name", "to_name"),
    "VGG Image Annotator (VIA) JSON": ("regions", "shape_attributes"),
    "Supervisely JSON": ("objects", "classTitle"),
    "FiftyOne's own JSON": ("samples", "_cls"),
    "Datumaro's own JSON": ("items", "categories", "label_id"),
    "V7 Darwin JSON": ("item", "annotations", "bounding_box"),
    "BDD100K JSON": ("labels", "box2d"),
}
# Text files, by their first line.
_NUMBER = r"-?\d+(\.\d+)?"
_LINES = {
    "labels of KITTI": re.compile(rf"[A-Za-z_]+( {_NUMBER}){{14,15}}"),
    "labels of DOTA": re.compile(rf"({_NUMBER} ){{8}}[A-Za-z]\S* [012]|imagesource:.*"),
    "a table of VisDrone or MOT": re.compile(rf"{_NUMBER}(,{_NUMBER}){{7,9}},?"),
}
# Of formats that are read, but from the folder of the whole set.
_OF_FOLDERS = {
    ".xml": "VOC's XML", ".txt": "a list or YOLO's labels", ".yaml": "YOLO's data.yaml",
    ".yml": "YOLO's data.yaml", ".data": "darknet's obj.data",
}  # fmt: skip
_LABELME = ("shapes", "imagePath")


def other_format(file: Path) -> str:
    """Return which format that is not read here a file has, "" if none of those known."""
    name = file.name.lower()
    for end, other in NAMES.items():
        if name.endswith(end):
            return other
    if name.endswith(".json"):
        return next((o for o, keys in _KEYS.items() if mentions(file, *keys)), "")
    if name.endswith(".txt"):
        line = head_of(file).partition(b"\n")[0].decode("utf-8", "replace").strip()
        return next((o for o, pattern in _LINES.items() if pattern.fullmatch(line)), "")
    return "CVAT's own XML" if name.endswith(".xml") and is_cvat(file) else ""


def looks_like(file: Path, *, lines: bool = False) -> str:
    """Return a sentence, after a blank, on what a file is that is none of COCO's; "" if unknown.

    `lines` says that there is more after a first JSON value.
    """
    other = other_format(file) or ("JSON lines" if lines else "")
    if other:
        return f" It looks like {other}, which is not read. Export the data as COCO, VOC or YOLO."
    read = _OF_FOLDERS.get(file.suffix.lower(), "")
    if file.suffix.lower() == ".json" and mentions(file, *_LABELME):
        read = "labelme's"
    return f" It looks like {read}: set `data_path` to the folder of the data set." if read else ""
