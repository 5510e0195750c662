"""Any timm network that gives feature maps."""

from pathlib import Path
from typing import Any

import timm
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from models.backbones.registry import Backbone, BackboneOptions, register_backbone
from util.errors import CheckpointError, ConfigError, nearest_hint

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TimmBackbone(nn.Module):
    """A timm `features_only` network that returns its last map or its last three."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(self, options: BackboneOptions) -> None:
        super().__init__()
        self.train_norm = options.train_norm
        self.body: Any = _create_body(options, 1 if options.single_level else 3)
        self.channels = tuple(int(c) for c in self.body.feature_info.channels())
        self.strides = tuple(int(r) for r in self.body.feature_info.reduction())
        config: Any = timm.get_pretrained_cfg(options.variant)
        self.mean = tuple(config.mean) if config else IMAGENET_MEAN
        self.std = tuple(config.std) if config else IMAGENET_STD
        self._freeze(options.frozen_stages)
        if not options.train_norm:
            for norm in self._norms():
                norm.requires_grad_(False)

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, (nn.BatchNorm2d, BatchNormAct2d))]

    def _freeze(self, stages: int) -> None:
        # "stem" ends at stride 2, the first stage at stride 4; 5 stages are everything
        if stages == 0:
            return
        names = [name for name, _ in self.body.named_parameters()]
        limit = {1: 2, 2: 4}.get(stages, 10**9)
        frozen = [i["module"] for i in self.body.feature_info.info if i["reduction"] <= limit]
        prefixes = tuple(p for m in frozen for p in (f"{m}.", f"{m.replace('.', '_')}."))
        ends = [i for i, name in enumerate(names) if name.startswith(prefixes)]
        last = len(names) - 1 if stages > 2 else max(ends, default=-1)
        for _, parameter in list(self.body.named_parameters())[: last + 1]:
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set training mode; norms that do not learn stay in evaluation mode."""
        super().train(mode)
        if not self.train_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: [N,3,H,W] -> maps [N,C,H/stride,W/stride], finest first."""
        maps = list(self.body(images))
        if maps[0].shape[1] != self.channels[0]:  # some networks put channels last
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return maps


def _create_body(options: BackboneOptions, count: int) -> Any:
    name, weights = options.variant, options.weights
    if not timm.is_model(name):
        raise ConfigError(
            f"--backbone timm/{name}: timm has no such model. "
            f"{nearest_hint(name, timm.list_models())}"
        )
    if options.dilation:
        raise ConfigError(f"--dilation: not for timm/{name}. Use a torchvision ResNet.")
    overlay = None
    if weights not in ("none", "imagenet"):
        if not Path(weights).is_file():
            raise CheckpointError(f"--backbone_weights {weights}: no such file.")
        overlay = {"file": weights}
    try:
        return timm.create_model(
            name,
            features_only=True,
            out_indices=tuple(range(-count, 0)),
            pretrained=weights != "none",
            pretrained_cfg_overlay=overlay,
        )
    except Exception as error:  # timm and the hub raise many kinds; all mean "not loaded"
        reason = " ".join(str(error).split())[:300]
        hint = "Pass a local file with --backbone_weights FILE, or none to start from scratch."
        raise CheckpointError(
            f"--backbone timm/{name}: cannot be built: {reason} {hint}"
        ) from error


@register_backbone("timm")
def create_timm(options: BackboneOptions) -> Backbone:
    """Build a timm network."""
    return TimmBackbone(options)
