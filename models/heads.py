"""Prediction heads: classes and boxes of every decoder layer, and of a two-stage encoder."""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import MLP, ExactLinear, focal_prior_bias, inverse_sigmoid

# N batch, Q queries, C width.


def apply_delta(delta: Tensor, reference: Tensor) -> Tensor:
    """Add a predicted delta to a reference point or box in logit space (Sec. 4.1 and 4.2).

    Shape: delta [N,Q,4]; reference [N,Q,2 or 4], fractions; returns cxcywh boxes [N,Q,4].
    """
    offset = inverse_sigmoid(reference)
    if offset.shape[-1] == 2:
        offset = F.pad(offset, (0, 2))  # a point says nothing of the size
    return (delta + offset).sigmoid()


class DetectionHeads:
    """Class and box heads: entry i belongs to decoder layer i, the one after to the encoder.

    Not a module itself: the detector and the decoder register the lists under their official keys.
    Every head that requires a gradient gets one: without `aux_loss`, the heads of refining layers
    before the last, whose boxes pass no gradient on, do not learn.
    """

    def __init__(
        self,
        d_model: int,
        num_classes: int,
        *,
        num_layers: int,
        with_box_refine: bool,
        two_stage: bool,
        aux_loss: bool = True,
    ) -> None:
        count = num_layers + int(two_stage)
        class_head = ExactLinear(d_model, num_classes)
        # most queries see background: starting at 1 % keeps their sum from drowning the rest
        nn.init.constant_(class_head.bias, focal_prior_bias())
        box_head = MLP(d_model, d_model, 4, 3)
        last = box_head.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # the first boxes are the references themselves
        nn.init.zeros_(last.bias)
        if with_box_refine:
            class_heads = [copy.deepcopy(class_head) for _ in range(count)]
            box_heads = [copy.deepcopy(box_head) for _ in range(count)]
        else:  # without refinement all layers share one head
            class_heads, box_heads = [class_head] * count, [box_head] * count
        if not two_stage:  # sizes start small, where proposals do not set them
            first = box_heads[0].layers[-1]
            assert isinstance(first, nn.Linear)
            nn.init.constant_(first.bias[2:], -2.0)
        self.class_embed = nn.ModuleList(class_heads)
        self.bbox_embed = nn.ModuleList(box_heads)
        if with_box_refine and not aux_loss:  # no loss reaches the heads of earlier layers
            for heads in (self.class_embed, self.bbox_embed):
                heads[: num_layers - 1].requires_grad_(False)

    def logits(self, index: int, hidden: Tensor) -> Tensor:
        """Shape: hidden [N,Q,C]; returns [N,Q,classes]."""
        output: Tensor = self.class_embed[index](hidden)
        return output

    def delta(self, index: int, hidden: Tensor) -> Tensor:
        """Return what a box moves by in logit space. Shape: hidden [N,Q,C]; returns [N,Q,4]."""
        output: Tensor = self.bbox_embed[index](hidden)
        return output
