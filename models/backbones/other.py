"""A backbone of Hugging Face transformers, as it comes with a detector of theirs."""

from typing import Any

from torch import Tensor, nn

from models.layers import checkpointed

_LAST_STRIDE = 32


class OtherBackbone(nn.Module):
    """A network that returns `feature_maps`, each of half the size of the one before."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
    checkpointing = False

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.channels = tuple(int(count) for count in body.channels)
        halvings = reversed(range(len(self.channels)))
        self.strides = tuple(_LAST_STRIDE // 2**power for power in halvings)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: [N,3,H,W] -> maps [N,C,H/stride,W/stride], finest first."""
        output = checkpointed(self.body, images, enabled=self.checkpointing)
        return list(output.feature_maps)
