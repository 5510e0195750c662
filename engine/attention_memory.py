"""What encoders with other attention than the paper's need, checked before the first step."""

from collections.abc import Sequence
from typing import cast

from configs.schema import Config
from datasets.dataset import CocoDetection
from engine.probe import total_memory
from models.backbones import Backbone
from models.deformable_detr import DeformableDETR
from models.encoders.attention import DEFORMABLE, JOINING, EncoderAttention
from util.console import log
from util.errors import ConfigError

_GIB = 2**30
_NUMBER = 4  # bytes, also under autocast: softmax is exact


def check_attention(
    config: Config, model: DeformableDETR, dataset: CocoDetection, batch_size: int
) -> None:
    """Warn if levels never meet in the encoder; refuse attention weights that fit no memory.

    Raises:
        ConfigError: those of the largest images take more than there is.
    """
    kind, levels = config.model.encoder_attn, config.model.num_feature_levels
    if levels > 1 and JOINING.isdisjoint(kind.split("+")):
        log.warning(
            f"encoder_attn {kind}: no layer joins the {levels} feature levels; each sees itself "
            f"alone. Use {kind}+{DEFORMABLE} to join them."
        )
    sizes = [dataset.transform.largest_size(*size) for size in dataset.image_sizes() if all(size)]
    if not sizes:
        return
    size = max(h for h, _ in sizes), max(w for _, w in sizes)
    again = "encoder" in config.optim.activation_checkpointing
    kept = batch_size * attention_bytes(model, level_shapes(model, size), recomputed=again)
    total = total_memory(next(model.parameters()).device)
    if total and kept > total:
        fewer = "a larger `dat_stride`, " if "dat" in kind.split("+") else ""
        raise ConfigError(
            f"encoder_attn {kind}: its attention weights take {kept / _GIB:.1f} GiB for "
            f"{batch_size} images of {size[0]} x {size[1]}, and there are {total / _GIB:.1f}. Use "
            f"smaller images, a smaller `batch_size`, {fewer}mswin or deformable in its place, or "
            "`activation_checkpointing encoder`."
        )


def level_shapes(model: DeformableDETR, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (H, W) of each level for images of (height, width) pixels."""
    height, width = size
    strides = cast(Backbone, model.backbone[0]).strides
    shapes = [(-(-height // stride), -(-width // stride)) for stride in strides]
    while len(shapes) < len(model.input_proj):
        height, width = shapes[-1]
        shapes.append((-(-height // 2), -(-width // 2)))
    return shapes


def attention_bytes(
    model: DeformableDETR, shapes: Sequence[tuple[int, int]], *, recomputed: bool
) -> int:
    """Return the bytes of attention weights that the backward pass of one image needs at once.

    `recomputed`: those of one layer are there at a time, not those of all.
    """
    layers = [
        sum(
            attention.kept(*shape)
            for attention in layer.modules()
            if isinstance(attention, EncoderAttention)
            for shape in shapes
        )
        for layer in model.transformer.encoder.get_submodule("layers").children()
    ]
    return _NUMBER * (max(layers, default=0) if recomputed else sum(layers))
