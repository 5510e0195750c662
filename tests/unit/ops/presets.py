"""The deformable attention that the presets' models compute with, read from their options."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from configs.load import read_options
from models.recipes import KnownRecipes

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, order=True)
class Layer:
    """What a kernel is compiled for, of one layer; `form` as in `ops.call.Call`."""

    heads: int
    channels: int
    levels: int
    points: int
    form: int

    def __str__(self) -> str:
        kind = {2: "points", 4: "boxes"}[self.form]
        return f"{self.heads}x{self.channels}-{self.levels}x{self.points}-{kind}"


@cache
def layers() -> tuple[Layer, ...]:
    """Return the distinct layers of all presets."""
    found = set()
    for preset in sorted((ROOT / "configs").glob("*.yaml")):
        model = read_options(str(preset), {}, KnownRecipes()).config().model
        sizes = model.nheads, model.hidden_dim // model.nheads, model.num_feature_levels
        if "deformable" in model.encoder_attn:
            found.add(Layer(*sizes, model.enc_n_points, 2))
        if model.decoder_attn == "deformable":
            if not model.two_stage:  # the first layer, or all, begin at learned points
                found.add(Layer(*sizes, model.dec_n_points, 2))
            if model.with_box_refine:
                found.add(Layer(*sizes, model.dec_n_points, 4))
    return tuple(sorted(found))
