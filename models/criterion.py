"""The set-prediction loss of all decoder layers at once."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.deformable_detr import DetectorOutput
from models.losses import sigmoid_focal_loss
from models.matcher import HungarianMatcher, Matches, PaddedTargets, pad_targets
from util.batch import Target
from util.box_ops import cxcywh_to_xyxy, generalized_iou

# G prediction layers, N batch, Q predictions, P matched pairs.


class SetCriterion:
    """Match predictions with targets, then sum focal, L1 and GIoU losses (Sec. 4, DETR Sec. 3.1).

    `weights` maps `loss_ce`, `loss_bbox` and `loss_giou` to their coefficients.
    """

    def __init__(
        self, matcher: HungarianMatcher, *, weights: dict[str, float], focal_alpha: float = 0.25
    ) -> None:
        self.matcher = matcher
        self.weights = weights
        self.focal_alpha = focal_alpha

    def __call__(
        self,
        outputs: DetectorOutput,
        targets: Sequence[Target],
        num_boxes: float | None = None,
    ) -> dict[str, Tensor]:
        """Return unweighted losses under the official names, and `loss`, their weighted sum.

        Every loss is a sum over the batch divided by `num_boxes`, by default the batch's own
        count and at least 1; a batch that is part of a larger one is given the larger one's.
        The last decoder layer has bare names, earlier ones end in `_0`, `_1`, ..., a two-stage
        encoder in `_enc`. `class_error` is the percentage of matched queries of the last layer
        whose best class is wrong, times the batch's share of `num_boxes`: the values of the parts
        of a larger batch add up to the mean over its boxes. It carries no gradient.

        A prediction that is not finite makes the loss NaN or infinite; nothing is raised.
        """
        logits, boxes = outputs["layer_logits"], outputs["layer_boxes"]
        padded = pad_targets(targets, logits.device)
        groups = [(logits, boxes, padded)]
        if "enc_logits" in outputs:
            # proposals only tell objects from background: every target is class 0
            binary = replace(padded, labels=torch.zeros_like(padded.labels))
            groups.append((outputs["enc_logits"][None], outputs["enc_boxes"][None], binary))
        matches = self.matcher(groups)
        own_boxes = sum(padded.counts)
        divisor = max(own_boxes, 1) if num_boxes is None else num_boxes
        suffixes = [[*(f"_{i}" for i in range(len(logits) - 1)), ""], ["_enc"]]
        losses: dict[str, Tensor] = {}
        for group, matched, names in zip(groups, matches, suffixes, strict=False):
            for name, sums in self._layer_sums(*group, matched).items():
                values = sums / divisor
                losses |= {name + s: value for s, value in zip(names, values, strict=True)}
        total = torch.stack([self.weights[_base(name)] * v for name, v in losses.items()]).sum()
        error = class_error(logits[-1], padded, matches[0]) * (own_boxes / divisor)
        return {"loss": total, **losses, "class_error": error}

    def weight(self, name: str) -> float | None:
        """Return the coefficient of a loss of any layer, None for what is only reported."""
        return self.weights.get(_base(name))

    def _layer_sums(
        self, logits: Tensor, boxes: Tensor, targets: PaddedTargets, matches: Matches
    ) -> dict[str, Tensor]:
        """Return the three losses of each layer, summed over the batch. Shape: each [G]."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        logits, boxes = logits.to(exact), boxes.to(exact)
        layer = torch.arange(len(logits), device=logits.device)[:, None]  # [G,1]
        labels = targets.labels[matches.image, matches.target]  # [G,P]
        wanted = torch.zeros_like(logits)
        wanted[layer, matches.image, matches.query, labels] = 1.0
        focal = sigmoid_focal_loss(logits, wanted, alpha=self.focal_alpha)
        predicted = boxes[layer, matches.image, matches.query]  # [G,P,4]
        actual = targets.boxes[matches.image, matches.target].to(exact)
        giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(actual))
        return {
            "loss_ce": focal.sum((1, 2, 3)),
            "loss_bbox": (predicted - actual).abs().sum((1, 2)),
            "loss_giou": (1 - giou).sum(1),
        }


def _base(name: str) -> str:
    """Drop the layer suffix of a loss name."""
    return "_".join(name.split("_")[:2])


@torch.no_grad()
def class_error(logits: Tensor, targets: PaddedTargets, matches: Matches) -> Tensor:
    """Return the percentage of matched queries of the last layer with a wrong best class.

    Shape: logits [N,Q,classes]; 0 where nothing is matched.
    """
    best = logits[matches.image, matches.query[-1]].argmax(-1)
    actual = targets.labels[matches.image, matches.target[-1]]
    wrong = (best != actual).sum().to(torch.float32)
    return 100 * wrong / max(len(matches.image), 1)
