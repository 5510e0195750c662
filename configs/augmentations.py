"""Recipes of augmentation."""

from collections.abc import Mapping
from typing import Any

# What --augment sets; options given besides it win.
AUGMENTATIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {"hflip": 0.0, "random_crop": False},
    "official": {},
    "strong": {
        "random_crop": False,
        "scale_jitter": (0.5, 1.5),
        "zoom_out": 0.15,
        "color_jitter": 0.5,
        "mosaic": 0.25,
        "mixup": 0.1,
    },
}
AUGMENTED = ("hflip", "random_crop", "scale_jitter", "zoom_out", "color_jitter", "mosaic", "mixup")
