"""A network of timm that gives feature maps; see `timm_build` for how it is made."""

from typing import Any

from timm.layers.format import Format
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from models.layers import checkpointed

Triple = tuple[float, float, float]


class TimmBackbone(nn.Module):
    """A `features_only` network whose batch norms learn with `train_norm` alone.

    `mean` and `std` are those of the images that it was trained on.
    """

    checkpointing = False

    def __init__(self, body: Any, *, mean: Triple, std: Triple, train_norm: bool) -> None:
        super().__init__()
        self.body = body
        self.channels = tuple(int(c) for c in body.feature_info.channels())
        self.strides = tuple(int(r) for r in body.feature_info.reduction())
        self.mean, self.std = mean, std
        self.train_norm = train_norm
        if not train_norm:
            for norm in self._norms():
                norm.requires_grad_(False)

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, (nn.BatchNorm2d, BatchNormAct2d))]

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set training mode; norms that do not learn stay in evaluation mode."""
        super().train(mode)
        if not self.train_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: [N,3,H,W] -> maps [N,C,H/stride,W/stride], finest first."""
        maps = list(checkpointed(self.body, images, enabled=self.checkpointing))
        if getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return maps
