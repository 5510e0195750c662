"""Every kind of flaw that the check knows: what it means, and what training does about it."""

from dataclasses import dataclass

IMAGES, FILE, BOXES, SPLITS = "Images", "Annotation file", "Boxes", "Splits and classes"
GROUPS = (IMAGES, FILE, BOXES, SPLITS)


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
        IMAGES, "unreadable images", "not an image, or larger than is safe to decode",
        "skips them; in evaluation their boxes count as missed", _GONE,
    ),
    "truncated_image": Kind(
        IMAGES, "truncated or damaged images", "opens, but cannot be decoded to its end",
        "skips them; in evaluation their boxes count as missed", _GONE,
    ),
    "wrong_size": Kind(
        IMAGES, "mis-sized images", "width and height are stated other than the file's",
        "uses the file's size and takes boxes as pixels of the file", "the file's size is stated",
    ),
    "duplicate_image": Kind(
        IMAGES, "duplicate images", "the same bytes as another image of the split",
        "sees each copy", "of the copies, the one with the most boxes is kept",
    ),
    "exif_rotated": Kind(
        IMAGES, "EXIF-rotated images", "viewers turn them; the stated size tells which way the "
        "boxes were drawn", "turns an image where the stated size is that of the turned one",
        note=True,
    ),
    "exif_ambiguous": Kind(
        IMAGES, "EXIF-rotated images, boxes unclear", "viewers turn or mirror them, and the "
        "stated size cannot tell what the boxes were drawn on",
        "uses the pixels as stored: look at them", note=True,
    ),
    "unused_file": Kind(
        IMAGES, "unused images", "an image in the folder that no checked split names",
        "does not see them", note=True,
    ),
    "unreadable_annotation": Kind(
        FILE, "annotation files or lines that cannot be read", "damaged XML, a line that is no box",
        "leaves them out", _OUT,
    ),
    "label_without_image": Kind(
        FILE, "label files without an image", "YOLO's boxes of an image that is not there",
        "does not see them", _OUT,
    ),
    "odd_layout": Kind(
        FILE, "things about the whole folder", "what its format has elsewhere is not there",
        "goes on with what there is", note=True,
    ),
    "missing_section": Kind(
        FILE, "missing sections", "`images`, `annotations` or `categories` is not a list or empty",
        "refuses the file",
    ),
    "bad_category": Kind(
        FILE, "categories without an id of their own", "the id is missing, not whole, or repeated",
        "refuses the file", "the first of an id is kept",
    ),
    "no_image_id": Kind(
        FILE, "images without an id", "no whole number under `id`", "leaves them out", _OUT
    ),
    "no_file_name": Kind(
        FILE, "images without a file name", "no text under `file_name`", "leaves them out", _GONE
    ),
    "outside_folder": Kind(
        FILE, "file names that lead out of the folder", "an absolute path, or one that goes up",
        "leaves them out", _GONE,
    ),
    "repeated_image": Kind(
        FILE, "image ids that repeat", "two entries with one id",
        "leaves the second out, both if their files differ", "as in training",
    ),
    "size_not_stated": Kind(
        FILE, "images without width and height", "missing, or less than 1",
        "reads them from the files", "the file's size is stated",
    ),
    "not_an_object": Kind(
        FILE, "annotations that are not objects", "not a JSON object", "leaves them out", _OUT
    ),
    "no_annotation_id": Kind(
        FILE, "annotations without an id", "no whole number under `id`",
        "numbers all annotations anew", "they get a number of their own",
    ),
    "repeated_annotation": Kind(
        FILE, "annotation ids that repeat", "tools that look boxes up by id lose some",
        "numbers all annotations anew", "the later ones get a number of their own",
    ),
    "missing_key": Kind(
        FILE, "annotations without a valid area or iscrowd", "COCO's tools need both",
        "takes width x height, and not a crowd", "as in training",
    ),
    "unknown_image_id": Kind(
        FILE, "annotations of unknown images", "`image_id` is not in `images`", "leaves them out",
        _OUT,
    ),
    "unknown_category_id": Kind(
        FILE, "annotations of unknown categories", "`category_id` is not in `categories`",
        "leaves them out", _OUT,
    ),
    "broken_bbox": Kind(
        BOXES, "broken boxes", "not four finite numbers (missing, NaN, text)", "leaves them out",
        _OUT,
    ),
    "zero_bbox": Kind(
        BOXES, "boxes without width or height", "one side is 0", "leaves them out", _OUT
    ),
    "negative_bbox": Kind(
        BOXES, "boxes of negative width or height", "corners in the wrong order",
        "leaves them out", _OUT,
    ),
    "outside_bbox": Kind(
        BOXES, "boxes outside their image", "no part of it is in the image",
        "does not train on them; evaluation counts them as missed", _OUT,
    ),
    "past_edge": Kind(
        BOXES, "boxes that reach past their image", "by more than a pixel", "clips them",
        "clipped",
    ),
    "xyxy_bbox": Kind(
        BOXES, "corners (x, y, x, y) where x, y, width, height are meant",
        "over the whole set, the numbers fit the images only as corners",
        "takes them as width and height: every box is wrong", "converted",
    ),
    "cxcywh_bbox": Kind(
        BOXES, "centres where the top left corner is meant",
        "over the whole set, the numbers fit the images only as centre and size",
        "takes them as corners: every box is shifted", "converted",
    ),
    "normalised_bbox": Kind(
        BOXES, "fractions where pixels are meant", "all four numbers are between 0 and 1",
        "refuses a file with nothing else; single ones become specks in a corner",
        "multiplied by the image's size",
    ),
    "one_based": Kind(
        BOXES, "boxes that count pixels from 1", "over the whole set, edges of images are at 1 "
        "and nothing is at 0", "takes them as they are: one pixel off", "shifted by one pixel",
    ),
    "zero_based": Kind(
        BOXES, "boxes that begin a pixel too early", "over the whole set, edges of images are at "
        "-1: counted from 0 and read as from 1",
        "takes them as they are: one pixel off; for VOC data give --voc_corners edges",
        "shifted by one pixel",
    ),
    "repeated_bbox": Kind(
        BOXES, "boxes given twice", "the same numbers and class as another box of the image",
        "keeps each, and so teaches two answers to one object", "the first is kept",
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
        BOXES, "images with more boxes than --num_queries", "the model gives one box a query",
        "can never find the rest: raise --num_queries",
    ),
    "no_boxes": Kind(
        BOXES, "images without boxes", "none, or none that is usable",
        "keeps them, as examples of background", note=True,
    ),
    "leak": Kind(
        SPLITS, "images of train that are in val too", "the same bytes: AP will be too good",
        "sees them", "left out of train",
    ),
    "empty_class": Kind(
        SPLITS, "classes without boxes", "named in the file, with no usable box",
        "keeps a logit for them; AP is n/a", note=True,
    ),
    "repeated_name": Kind(
        SPLITS, "classes of one name", "two ids with the same name",
        "keeps them apart by id", note=True,
    ),
    "unknown_class": Kind(
        SPLITS, "classes of val's boxes that train does not have",
        "train has no class of that name, or of that id where names repeat",
        "refuses the two together: let `categories` of both files be the same",
    ),
    "unseen_class": Kind(
        SPLITS, "classes of val without boxes in train", "AP of these classes will be 0",
        "has nothing to learn them from", note=True,
    ),
}  # fmt: skip
