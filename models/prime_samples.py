"""Several queries learn an object, worse ones less (Align-DETR, arXiv 2304.07527, Sec. 3.3).

One query of many that lie on an object learns it, and the others learn that they are background,
although they are nearly as good. Here a few of them learn it in all layers but the last, which has
to find it once. The best of an object's samples, the prime one, counts in full.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.class_losses import agreement
from models.criterion import Assigned, SetCriterion
from models.matcher import HungarianMatcher, Matches, PaddedTargets
from models.queries import DetectorOutput, GroupOutput

# G prediction layers, N batch, Q queries, T targets of an image (padded to the longest), P pairs.

_SAMPLED = ("", "_enc")  # the queries that detect, and what the encoder proposes


class PrimeSampleCriterion(SetCriterion):
    """`samples` queries learn an object in all layers but the last one of the decoder.

    Of an object's samples, the one of rank r (0 the best) by agreement of score and box counts
    exp(-r / tau). An image with many objects has fewer: half of the queries at most.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        *,
        samples: int,
        tau: float,
        weights: Mapping[str, float],
        **options: Any,
    ) -> None:
        """`weights` and `options` are those of `SetCriterion`."""
        super().__init__(matcher, weights=weights, **options)
        self.samples, self.tau = samples, tau

    def __call__(
        self, outputs: DetectorOutput, targets: Any, num_boxes: float | None = None
    ) -> dict[str, Tensor]:
        """See `SetCriterion`."""
        groups = [self._with_samples(group) for group in outputs["groups"]]
        return super().__call__({**outputs, "groups": groups}, targets, num_boxes)

    def assign(self, group: GroupOutput, targets: PaddedTargets, matches: Matches) -> Assigned:
        """Put the predictions of a group beside its targets, each pair with its weight."""
        assigned = super().assign(group, targets, matches)
        if group.name not in _SAMPLED or matches.real is None:
            return assigned
        objects = matches.image * targets.labels.shape[1] + matches.target  # [G,P]
        # what is no pair stands for no object
        objects = objects.masked_fill(~matches.real, targets.labels.numel())
        ranks = ranks_within(agreement(assigned), objects)
        return replace(assigned, weights=torch.exp(-ranks.to(assigned.boxes.dtype) / self.tau))

    def _with_samples(self, group: GroupOutput) -> GroupOutput:
        learning = group.learning
        known = learning.matches is not None or learning.assign is not None
        if group.name not in _SAMPLED or known or learning.anchors is not None:
            return group
        pairs = partial(self.pairs, last_alone=group.name == "")
        return replace(group, learning=replace(learning, assign=pairs))

    @torch.no_grad()
    def pairs(
        self, logits: Tensor, boxes: Tensor, targets: PaddedTargets, *, last_alone: bool
    ) -> Matches:
        """Return the cheapest pairs if an object may have several queries, in the last layer one.

        Shape: logits [G,N,Q,classes]; boxes [G,N,Q,4] cxcywh. Where layers have different numbers
        of pairs, `real` marks those of the last that are not padding.
        """
        queries = logits.shape[2]
        copies = [max(1, min(self.samples, queries // (2 * n))) if n else 1 for n in targets.counts]
        repeated, original = _repeated(targets, copies)
        several = len(logits) - last_alone
        groups = [(logits[:several], boxes[:several], repeated)] if several else []
        if last_alone:
            groups.append((logits[several:], boxes[several:], targets))
        found = self.matcher(groups)
        if not several:
            return found[0]
        image = found[0].image
        query, target = found[0].query, original[image, found[0].target]
        real = torch.ones_like(query, dtype=torch.bool)
        if last_alone:  # the pairs of an image come first of the places that it has
            counts = [min(n, queries) for n in targets.counts]
            room = [min(n * c, queries) for n, c in zip(targets.counts, copies, strict=True)]
            places = [sum(room[:i]) + j for i, n in enumerate(counts) for j in range(n)]
            place = torch.tensor(places, dtype=torch.int64).to(query.device, non_blocking=True)
            empty = torch.zeros_like(image)
            query, target, real = (
                torch.cat([more, empty.to(more.dtype).index_put((place,), one)[None]])
                for more, one in (
                    (query, found[1].query[0]),
                    (target, found[1].target[0]),
                    (real, torch.ones_like(place, dtype=torch.bool)),
                )
            )
        return Matches(image, query, target, real, real)


def ranks_within(values: Tensor, objects: Tensor) -> Tensor:
    """Return how many of the same object have a larger value; of equal ones the first is better.

    Shape: values [G,P]; objects [G,P], numbers of objects -> [G,P].
    """
    by_value = values.argsort(dim=1, descending=True, stable=True)
    by_object = objects.gather(1, by_value).argsort(dim=1, stable=True)
    order = by_value.gather(1, by_object)
    sorted_objects = objects.gather(1, order)
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    begins = torch.ones_like(order, dtype=torch.bool)
    begins[:, 1:] = sorted_objects[:, 1:] != sorted_objects[:, :-1]
    first = torch.where(begins, place, 0).cummax(dim=1).values
    return torch.zeros_like(order).scatter(1, order, place - first)


def _repeated(targets: PaddedTargets, copies: list[int]) -> tuple[PaddedTargets, Tensor]:
    """Return every image's targets as many times, and which target each is. Shape: [N,T']."""
    counts = [n * c for n, c in zip(targets.counts, copies, strict=True)]
    rows = [[*range(n)] * c for n, c in zip(targets.counts, copies, strict=True)]
    length = max(counts, default=0)
    padded = [row + [0] * (length - len(row)) for row in rows]
    original = torch.tensor(padded, dtype=torch.int64).reshape(len(rows), length)
    original = original.to(targets.labels.device, non_blocking=True)
    boxes = targets.boxes.gather(1, original[..., None].expand(-1, -1, 4))
    return PaddedTargets(targets.labels.gather(1, original), boxes, counts), original
