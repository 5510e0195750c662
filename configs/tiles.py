"""Options of `eval` and `predict` for images that are larger than what a model takes."""

from dataclasses import dataclass
from typing import Literal

from configs.options import Checked, option
from util.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TileOptions(Checked):
    """How images are cut into tiles."""

    tile: bool = option(False, "cut images into tiles, and merge what is found in them")
    tile_size: int | None = option(
        None, "side of a tile, pixels of the image (default: eval_scale, so nothing is scaled)",
        low=16, most=65536,
    )  # fmt: skip
    tile_overlap: float = option(
        0.2, "minimum share of its side that a tile has in common with the next; objects should "
        "be smaller than that", low=0, high=0.9,
    )  # fmt: skip
    tile_merge: Literal["iou", "ios"] = option(
        "iou", "of two boxes of a class in different tiles the better one stays, if this is over "
        "--tile_nms: iou, or the intersection over the smaller one", rare=True,
    )  # fmt: skip
    tile_nms: float = option(0.5, "see --tile_merge", above=0, high=1, rare=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        others = ("tile_size", "tile_overlap", "tile_merge", "tile_nms")
        if not self.tile and any(getattr(self, n) != getattr(TileOptions, n) for n in others):
            raise ConfigError(
                "`tile_size`, `tile_overlap`, `tile_merge` and `tile_nms` say how images are cut. "
                "Add `tile`."
            )
