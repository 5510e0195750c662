"""Options of a loaded model that replace what its checkpoint says; None for what it says."""

from dataclasses import dataclass

from configs.options import Checked, option

# What `checkpoint` takes, by whether the command also runs exported files.
WEIGHTS = "our or official file, Hugging Face folder, or hf:NAME"
WEIGHTS_OR_EXPORTED = "our, official or exported file, Hugging Face folder, or hf:NAME"


@dataclass(frozen=True, kw_only=True)
class SizeOptions(Checked):
    """The size of images as the model sees them, and of the largest file that is read."""

    eval_scale: int | None = option(None, "short side, pixels", low=16, most=16384, unset=0)
    max_size: int | None = option(None, "maximum long side, pixels", low=16, most=65536, unset=0)
    max_pixels: int | None = option(
        None, "pixels of the largest image that is read", low=1, rare=True
    )


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(SizeOptions):
    """The size of images, and which detections are kept."""

    num_select: int | None = option(
        None, "detections kept per image, all classes together", low=1, most=100000
    )
    nms_iou: float | None = option(
        None, "NMS IoU threshold; 1 disables NMS", above=0, high=1, unset=0
    )
