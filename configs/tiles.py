"""Options for images that are larger than what a model takes."""

from dataclasses import dataclass, fields
from typing import Literal

from configs.options import Checked, option
from util.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TileOptions(Checked):
    """How images are cut into tiles."""

    tile: bool = option(False, "cut images into tiles, and merge what is found in them")
    tile_size: int | None = option(
        None,
        "side of a tile, pixels of the image (default: eval_scale, so nothing is scaled)",
        low=16,
        most=65536,
    )
    tile_overlap: float = option(
        0.2,
        "minimum share of its side that a tile has in common with the next; objects should "
        "be smaller than that",
        low=0,
        high=0.9,
    )
    tile_merge: Literal["iou", "ios", "wbf"] = option(
        "iou",
        "of two boxes of a class in different tiles the better one stays, if this is over "
        "--tile_nms: iou, or the intersection over the smaller one; wbf: where iou is over it, "
        "they become one, their mean weighted by scores",
        rare=True,
    )
    tile_nms: float = option(0.5, "see --tile_merge", above=0, high=1, rare=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(self):
            if not self.tile and getattr(self, f.name) != f.default:
                raise ConfigError(f"{f.name}: says how images are cut into tiles. Add `tile`.")


@dataclass(frozen=True, kw_only=True)
class TrainTileOptions(TileOptions):
    """How images are cut into tiles, and what a model learns of them."""

    tile_min_seen: float = option(
        0.5,
        "share of an object that a tile must show for it to be learned there; 0: any part. "
        "One that no tile shows so much of is learned where most of it is seen",
        low=0,
        high=1,
    )
    tile_empty: float = option(
        1.0, "share of the tiles without objects that are trained on, evenly spaced", low=0, high=1
    )
