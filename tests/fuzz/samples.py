"""Sound files of every kind that is read."""

import io
import json
from typing import Any

from PIL import Image

COCO: dict[str, Any] = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (5, 9, 2)],
    "annotations": [
        {"id": i, "image_id": image, "category_id": 7, "bbox": [4, 6, 10.5, 12], "area": 126.0,
         "iscrowd": 0, "segmentation": [[4, 6, 14, 6, 14, 18]]}
        for i, image in enumerate((5, 9, 2))
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
}  # fmt: skip
# boxes that stand elsewhere: in run lengths, in a polygon, and in text
ODD_COCO: dict[str, Any] = {
    "images": [{"id": "a/b", "file_name": "sub\\5.png", "coco_url": "http://x/9.png"}],
    "annotations": [
        {"image_id": "a/b", "category_id": "7", "bbox": ["4", "6", "10", "12"], "iscrowd": "1"},
        {"image_id": "a/b", "category_id": "7", "ignore": 1,
         "segmentation": {"counts": [130, 12, 18, 12, 1028], "size": [30, 40]}},
        {"image_id": "a/b", "category_id": "7",
         "segmentation": {"counts": "Z46d0O1O1O1O001Oo`0", "size": [30, 40]}},
        {"image_id": "a/b", "category_id": "7", "bbox": [],
         "segmentation": [[4, 6, 14, 6, 14, 18], [1, 2, 3, 4]], "attributes": {"rotation": 30.0}},
    ],
    "categories": [{"id": "7", "name": ""}],
}  # fmt: skip
FOUND = [{"image_id": 5, "category_id": 7, "bbox": [4, 6, 10, 12], "score": 0.5}] * 3
NAMED = [
    {**FOUND[0], "image_id": i, "file_name": "sub\\5.png", "category_name": "dog"} for i in range(3)
]
LABELME: dict[str, Any] = {
    "version": "5.0", "imagePath": "1.png", "imageData": None, "imageHeight": 30, "imageWidth": 40,
    "shapes": [
        {"label": "cat", "shape_type": "rectangle", "points": [[4, 6], [14, 18]]},
        {"label": "dog", "shape_type": "circle", "points": [[14, 16], [18, 16]]},
        {"label": "cat", "shape_type": "polygon", "points": [[4, 6], [14, 6], [14, 18]]},
    ],
}  # fmt: skip
CONFIG = b"""base: shapes_tiny
model: &m {backbone: resnet18, num_queries: 30, nheads: 8, two_stage: false}
data: {train_scales: [64, 96], hflip: 0.5, augment: none}
optim: {lr: 1e-4, epochs: 3, lr_drop_epochs: [1, 2]}
"""
DATA_YAML = b"path: .\ntrain: images\nval: images\nnc: 2\nnames: {0: cat, 1: dog}\n"
POSE_YAML = b"train: [images/1.png, ./images]\nval: images\nkpt_shape: [2, 3]\nnames: [cat, dog]\n"
LABELS = (
    b"0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.5 0.9\n",
    b"0 0.5 0.5 0.2 0.4 0.45 0.4 2 0.55 0.6 1\n" * 4,
    b"\xef\xbb\xbf1 0.5 0.5 1e-1 .5\r\n",
)
LIST = b"./images/1.png\nimages\\2.png\n/elsewhere/images/2.png\n"
OBJ_DATA = b"classes = 2\ntrain = train.txt\nvalid = train.txt\nnames = obj.names\n"
XML = b"""<annotation><filename>1.png</filename><size><width>40</width><height>30</height></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>9</xmax>
<ymax>20</ymax></bndbox></object></annotation>
"""
_POLYGON = b"<polygon><x1>3</x1><y1>4</y1><x2>9</x2><y2>4</y2><x3>9</x3><y3>9</y3></polygon>"
_TURNED = b"<robndbox><cx>9</cx><cy>9</cy><w>6</w><h>4</h><angle>0.5</angle></robndbox>"
XMLS = (
    XML,
    b'<?xml version="1.0" encoding="gb2312"?>' + XML.replace(b"cat", "\u732b & co".encode("gbk")),
    XML.decode().encode("utf-16"),
    *(XML.replace(b"<xmax>9</xmax>", b"").replace(b"<bndbox>", part + b"<bndbox>")
      for part in (_POLYGON, _TURNED)),
)  # fmt: skip

# an orientation of 6
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def image_bytes(suffix: str, mode: str = "RGB", **options: Any) -> bytes:
    """Return an image file of 40 x 30 pixels."""
    buffer = io.BytesIO()
    image = Image.effect_noise((40, 30), 50).convert(mode)
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


PNG = image_bytes("png")
IMAGES = [
    PNG, image_bytes("png", "P", transparency=3), image_bytes("png", "I;16"),
    image_bytes("png", icc_profile=b"x" * 3000, exif=EXIF), image_bytes("jpeg", exif=EXIF),
    image_bytes("jpeg", progressive=True), image_bytes("jpeg", "CMYK"), image_bytes("jpeg", "L"),
    image_bytes("bmp"), image_bytes("bmp", "P"), image_bytes("tiff"), image_bytes("tiff", "F"),
    image_bytes("tiff", compression="tiff_lzw"), image_bytes("tiff", compression="jpeg"),
    image_bytes("tiff", compression="tiff_adobe_deflate"), image_bytes("webp"),
    image_bytes("gif"), image_bytes("gif", save_all=True, append_images=[Image.new("L", (40, 30))]),
    image_bytes("ppm"), image_bytes("tga", rle=True), image_bytes("pcx"), image_bytes("ico"),
    image_bytes("sgi"), image_bytes("dds"), image_bytes("im"), image_bytes("icns"),
    image_bytes("jpeg2000"), image_bytes("msp", "1"), image_bytes("xbm", "1"), image_bytes("mpo"),
]  # fmt: skip
LOG = b"\n".join(
    json.dumps(
        {"epoch": epoch, "step": epoch, "train_loss": 3.5, "train_lr": 1e-4, "loss": None,
         "train_loss_ce": 1, "test_coco_eval_bbox": [0.1, 0.2, None, *[-1.0] * 9], "n": 9}
    ).encode()
    for epoch in range(3)
) + b"\n"  # fmt: skip
