"""Options of a loaded model that replace what its checkpoint says; None for what it says."""

from dataclasses import dataclass

from configs.options import Checked, option


@dataclass(frozen=True, kw_only=True)
class SizeOptions(Checked):
    """The size of images as the model sees them."""

    eval_scale: int | None = option(None, "short side, pixels", low=16, most=16384, unset=0)
    max_size: int | None = option(None, "maximum long side, pixels", low=16, most=65536, unset=0)


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(SizeOptions):
    """The size of images, and which detections are kept."""

    num_select: int | None = option(
        None, "detections kept per image, all classes together", low=1, most=100000
    )
    nms_iou: float | None = option(
        None, "NMS IoU threshold; 1 disables NMS", above=0, high=1, unset=0
    )


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(SelectionOptions):
    """The size of images, which detections are kept, and which files are read."""

    max_pixels: int | None = option(
        None, "pixels of the largest image that is read", low=1, rare=True
    )
