"""Every kind of flaw that the checks know: what it means, and what training does about it.

`python -m datasets.checks.kinds` prints the tables of docs/data.md.
"""

from dataclasses import dataclass
from itertools import groupby

IMAGES, FILE, BOXES, SPLITS = "Images", "Annotation file", "Boxes", "Splits and classes"


@dataclass(frozen=True)
class Kind:
    """A kind of flaw. `fix` is what a corrected copy does; a `note` is worth knowing, not wrong."""

    group: str
    title: str
    meaning: str
    training: str
    fix: str = ""
    note: bool = False


_OUT = "left out"
_GONE = "left out with its boxes"

KINDS: dict[str, Kind] = {
    "missing_image": Kind(
        IMAGES, "missing images", "the annotation file names a file that is not there",
        "skips them; in evaluation their boxes count as missed", _GONE,
    ),
    "unreadable_image": Kind(
        IMAGES, "unreadable images", "not an image, or larger than `max_pixels`",
        "skips them; in evaluation their boxes count as missed", _GONE,
    ),
    "truncated_image": Kind(
        IMAGES, "truncated or damaged images", "the file opens, but cannot be decoded to its end",
        "skips them; in evaluation their boxes count as missed", _GONE,
    ),
    "wrong_size": Kind(
        IMAGES, "images whose size differs from the stated one",
        "width and height in the annotation file are not those of the image file",
        "uses the file's size and takes boxes as pixels of the file", "the file's size is stated",
    ),
    "duplicate_image": Kind(
        IMAGES, "duplicate images", "the same bytes as another image of the split",
        "uses each copy", "of the copies, the one with the most boxes is kept",
    ),
    "similar_image": Kind(
        IMAGES, "images that look like another of the split", "scaled, saved again, mirrored or "
        "slightly cropped, or frames of one scene", "uses each", note=True,
    ),
    "exif_rotated": Kind(
        IMAGES, "EXIF-rotated images", "viewers turn them; the stated size shows which way the "
        "boxes were drawn", "turns an image if the stated size is that of the turned one",
        note=True,
    ),
    "exif_ambiguous": Kind(
        IMAGES, "EXIF-rotated images, boxes unclear", "viewers turn or mirror them, and the "
        "stated size does not show on which version the boxes were drawn",
        "uses the pixels as stored: look at them", note=True,
    ),
    "unused_file": Kind(
        IMAGES, "unused images", "an image in the folder that no checked split names",
        "does not use them", note=True,
    ),
    "unreadable_annotation": Kind(
        FILE, "annotation files or lines that cannot be read",
        "damaged XML, or a line that is not a box", "skips them", _OUT,
    ),
    "label_without_image": Kind(
        FILE, "label files without an image", "YOLO boxes of an image that is not there, or of a "
        "kind that is not read", "skips them", _OUT,
    ),
    "odd_layout": Kind(
        FILE, "unusual folder layout", "something that the format normally has is not there",
        "continues with what is there", note=True,
    ),
    "detected_format": Kind(
        FILE, "format of the data", "found out from what the folder holds",
        "reads it so; `data_format` says otherwise", note=True,
    ),
    "repaired_annotation": Kind(
        FILE, "XML files read in spite of a flaw", "an encoding that XML parsers lack, or an `&` "
        "that should be `&amp;`", "reads what is meant", note=True,
    ),
    "long_lines": Kind(
        FILE, "YOLO lines with more than a box", "polygons, key points, or other points in a box",
        "takes the box around a polygon, or the box before the points", note=True,
    ),
    "one_based_class": Kind(
        FILE, "class indices that seem to count from 1", "YOLO counts from 0, but no index is 0 "
        "and the last is past the names", "takes them as they are: every class is the next one, "
        "the last is skipped; subtract 1 in the label files",
    ),
    "pixel_values": Kind(
        FILE, "YOLO values above 1: pixels?", "larger than the whole image, as fractions",
        "refuses a set with mostly such boxes; skips single ones", _OUT,
    ),
    "size_corners": Kind(
        FILE, "VOC corners that seem to be width and height", "xmax and ymax are often below xmin "
        "and ymin, and all fit their images as sizes", "takes them as corners: boxes are wrong or "
        "skipped; set `voc_corners` to size",
    ),
    "shape_bbox": Kind(
        FILE, "objects without a box", "a polygon or a rotated box",
        "takes the upright box around it", note=True,
    ),
    "root_category": Kind(
        FILE, "categories that only hold the others", "without boxes, and every other category's "
        "`supercategory`", "leaves them out of the classes", _OUT, note=True,
    ),
    "missing_section": Kind(
        FILE, "missing sections", "`images`, `annotations` or `categories` is empty or not a list",
        "refuses the file",
    ),
    "bad_category": Kind(
        FILE, "categories without a unique id", "the id is missing, not whole, or repeated",
        "refuses the file", "the first category with an id is kept",
    ),
    "no_image_id": Kind(
        FILE, "images without an id", "no whole number under `id`", "skips them", _OUT
    ),
    "no_file_name": Kind(
        FILE, "images without a file name", "no text under `file_name`",
        "skips them with their boxes", _GONE,
    ),
    "outside_folder": Kind(
        FILE, "file names that lead out of the folder",
        "an absolute path or one with `..`, and no file of the folder fits it",
        "skips them with their boxes", _GONE,
    ),
    "matched_name": Kind(
        FILE, "file names written in another way",
        "there is no such file, but exactly one that the name can mean",
        "takes that file", "the file's name", note=True,
    ),
    "name_from_url": Kind(
        FILE, "images named by an address", "no `file_name`, but a `coco_url`",
        "looks for the file at the address's end", "the file's name", note=True,
    ),
    "text_number": Kind(
        FILE, "numbers written as text", "such as \"1\" for 1",
        "reads them as numbers", "numbers", note=True,
    ),
    "text_id": Kind(
        FILE, "ids that are text", "not just a number",
        "numbers them; result files have the text again", "the numbers of training", note=True,
    ),
    "no_name": Kind(
        FILE, "categories without a name", "nothing under `name`",
        "calls them by their ids", note=True,
    ),
    "repeated_image": Kind(
        FILE, "repeated image ids", "two entries with one id",
        "skips the second, or both with their boxes if their files differ", "as in training",
    ),
    "size_not_stated": Kind(
        FILE, "images without width and height", "missing, or less than 1",
        "reads them from the files", "the file's size is stated",
    ),
    "not_an_object": Kind(
        FILE, "annotations that are not objects", "not a JSON object", "skips them", _OUT
    ),
    "no_annotation_id": Kind(
        FILE, "annotations without an id", "no whole number under `id`",
        "gives them unused ids", "as in training",
    ),
    "repeated_annotation": Kind(
        FILE, "repeated annotation ids", "tools that look boxes up by id lose some",
        "gives the later ones unused ids", "as in training",
    ),
    "missing_key": Kind(
        FILE, "annotations without a valid area or iscrowd", "COCO's tools need both",
        "takes width x height, and not a crowd", "as in training",
    ),
    "unknown_image_id": Kind(
        FILE, "annotations of unknown images", "`image_id` is not in `images`", "skips them", _OUT
    ),
    "unknown_category_id": Kind(
        FILE, "annotations of unknown categories", "`category_id` is not in `categories`",
        "skips them", _OUT,
    ),
    "shifted_category": Kind(
        FILE, "category ids that seem to be one off", "some are not in `categories`, and all would "
        "be if each were one more, or one less", "takes them as they are: every object gets the "
        "neighbouring class, or is skipped; count both from the same number",
    ),
    "broken_bbox": Kind(
        BOXES, "broken boxes", "not four finite numbers (missing, NaN, text)", "skips them", _OUT
    ),
    "computed_bbox": Kind(
        BOXES, "boxes computed from masks", "no usable `bbox` beside polygons or an RLE",
        "takes the smallest box around the mask", "the computed box", note=True,
    ),
    "rotated_bbox": Kind(
        BOXES, "rotated boxes", "`attributes` state a rotation; `bbox` is the box before it",
        "takes the box before the rotation", note=True,
    ),
    "mostly_crowd": Kind(
        BOXES, "crowds instead of objects",
        "more than half of the annotations are crowds: `iscrowd` 1, or `ignore` 1",
        "learns nothing from crowds, and evaluation does not count them; if each is one object, "
        "set `crowd` to as_objects or `ignore_key` to keep",
    ),
    "crowd_as_object": Kind(
        BOXES, "crowds read as objects", "`iscrowd` is 1 and `crowd` is as_objects",
        "takes each as one object", "`iscrowd` 0", note=True,
    ),
    "ignored_as_crowd": Kind(
        BOXES, "annotations to ignore, read as crowds", "`ignore` is 1 and `ignore_key` is crowd",
        "learns nothing from them, and evaluation does not count them; `ignore_key` can be drop or "
        "keep", "`iscrowd` 1", note=True,
    ),
    "ignored_dropped": Kind(
        BOXES, "annotations to ignore, dropped", "`ignore` is 1 and `ignore_key` is drop",
        "skips them", _OUT, note=True,
    ),
    "ignored_kept": Kind(
        BOXES, "annotations to ignore, kept as objects", "`ignore` is 1 and `ignore_key` is keep",
        "takes them as objects", note=True,
    ),
    "zero_bbox": Kind(
        BOXES, "boxes without width or height", "one side is 0", "skips them", _OUT
    ),
    "negative_bbox": Kind(
        BOXES, "boxes of negative width or height", "corners in the wrong order",
        "skips them", _OUT,
    ),
    "outside_bbox": Kind(
        BOXES, "boxes outside their image", "no part of the box is in the image",
        "skips them; evaluation counts them as missed", _OUT,
    ),
    "past_edge": Kind(
        BOXES, "boxes that extend past their image", "by more than a pixel", "clips them",
        "clipped",
    ),
    "xyxy_bbox": Kind(
        BOXES, "corners (x, y, x, y) instead of x, y, width, height",
        "over the whole set, the numbers fit the images only as corners",
        "takes them as width and height: every box is wrong", "converted",
    ),
    "cxcywh_bbox": Kind(
        BOXES, "centres instead of top left corners",
        "over the whole set, the numbers fit the images only as centre and size",
        "takes them as corners: every box is shifted", "converted",
    ),
    "normalised_bbox": Kind(
        BOXES, "fractions instead of pixels", "all four numbers are between 0 and 1",
        "refuses a file with nothing else; single ones become specks in a corner",
        "multiplied by the image's size",
    ),
    "one_based": Kind(
        BOXES, "boxes that count pixels from 1", "over the whole set, edges of images are at 1 "
        "and nothing is at 0", "takes them as they are: one pixel off", "shifted by one pixel",
    ),
    "zero_based": Kind(
        BOXES, "boxes that start a pixel too early", "over the whole set, edges of images are at "
        "-1: counted from 0 and read as from 1",
        "takes them as they are: one pixel off; for VOC data, set `voc_corners` to edges",
        "shifted by one pixel",
    ),
    "corner_bbox": Kind(
        BOXES, "boxes that all lie top left", "over the whole set, none reaches past 60 % of its "
        "image: per cent, or pixels of a smaller version of the images?",
        "takes them as they are: look at them", note=True,
    ),
    "repeated_bbox": Kind(
        BOXES, "repeated boxes", "the same numbers and class as another box of the image",
        "keeps each, and so teaches two answers for one object", "the first is kept",
    ),
    "vanishing_bbox": Kind(
        BOXES, "boxes that vanish", "a side is under 1 pixel at the smallest training size",
        "keeps them, though nothing is left to see", _OUT,
    ),
    "small_bbox": Kind(
        BOXES, "boxes smaller than a feature cell",
        "a side is under 8 pixels at the smallest training size",
        "keeps them; they are hard to find", note=True,
    ),
    "too_many_boxes": Kind(
        BOXES, "images with more boxes than `num_queries`", "the model predicts one box per query",
        "can never find the rest: raise `num_queries`",
    ),
    "no_usable_box": Kind(
        BOXES, "splits without a usable box", "all are left out, or crowds, or there are none",
        "refuses to train on the split; evaluation has no numbers (n/a)",
    ),
    "no_boxes": Kind(
        BOXES, "images without boxes", "none, or none that can be used",
        "keeps them, as examples of background", note=True,
    ),
    "leak": Kind(
        SPLITS, "images of train that are also in val", "the same bytes: AP will be too high",
        "uses them", "left out of train",
    ),
    "copied_leak": Kind(
        SPLITS, "images of train that are copies of one in val", "scaled, saved again, mirrored, "
        "darker or lighter: AP will be too high",
        "uses them: leave one of the two out, or keep all copies in one split",
    ),
    "similar_leak": Kind(
        SPLITS, "images of train that look like one in val", "slightly cropped, or frames of one "
        "scene: AP says little about new scenes", "uses them: keep each scene in one split",
        note=True,
    ),
    "empty_class": Kind(
        SPLITS, "classes without boxes", "named in the file, but no box of it can be used",
        "keeps a logit for them; AP is n/a", note=True,
    ),
    "repeated_name": Kind(
        SPLITS, "classes that share a name", "two ids with the same name",
        "distinguishes them by id", note=True,
    ),
    "alike_name": Kind(
        SPLITS, "classes whose names differ in case, blanks or dashes alone",
        "two spellings of one class?", "learns each as a class of its own", note=True,
    ),
    "unknown_class": Kind(
        SPLITS, "classes of val's boxes that train does not have",
        "train has no class of that name, or of that id where names repeat",
        "refuses the two together: give both files the same `categories`",
    ),
    "unseen_class": Kind(
        SPLITS, "classes of val without boxes in train", "AP of these classes will be 0",
        "has nothing to learn them from", note=True,
    ),
}  # fmt: skip


def tables() -> str:
    """Return a table of each group's kinds in Markdown."""
    lines = []
    for group, kinds in groupby(KINDS.items(), key=lambda item: item[1].group):
        lines += [
            f"**{group}**",
            "",
            "| kind | what | training | a corrected copy |",
            "|---|---|---|---|",
            *(
                f"| `{name}`{' (note)' if kind.note else ''} "
                f"| {kind.title}: {kind.meaning} | {kind.training} "
                f"| {kind.fix or 'as it is'} |"
                for name, kind in kinds
            ),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
