"""The annotations that saved detections are compared with; the images may be elsewhere."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from pycocotools.coco import COCO

from configs.schema import DataConfig
from datasets.build import build_dataset, read_split
from datasets.formats.coco import coco_layout
from datasets.index import CocoIndex


def validation_truth(
    data: DataConfig,
) -> tuple[COCO, Callable[[int], Image.Image | None] | None, list[str]]:
    """Return validation annotations, a reader of images if they are at hand, and notices.

    Raises:
        DataError: no option says where the data lies, or they cannot be read.
    """
    annotations = Path(data.val_annotations) if data.val_annotations else None
    if annotations is None and data.coco_path and not data.data_path:
        folder, annotations = coco_layout(Path(data.coco_path), "val")
        alone = not folder.is_dir()
    else:
        alone = annotations is not None and not data.val_images
    if alone and annotations is not None:
        index = CocoIndex.load(annotations, None, need_boxes=False)
        return index.coco_gt, None, index.notices
    index = CocoIndex.from_source(read_split(data, "val"), need_boxes=False)
    dataset = build_dataset(data, index, train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    return index.coco_gt, dataset.read_image, index.notices
