"""Contrastive denoising: queries that restore objects from what noise has left of them.

DINO, arXiv 2203.03605, Sec. 3.3, after DN-DETR, arXiv 2203.01305. Matching is unstable while
nothing is learned yet. A query that starts from an object's own box and label, with noise on both,
needs none: it always learns that object. A second one, of which every corner lies farther off,
learns to predict nothing, so that of several queries near an object the closest one is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.options import option
from models.layers import ExactLayerNorm, sine_embedding
from models.matcher import Matches
from models.proposals import Proposals
from models.queries import Learning, QueryGroup
from models.recipes import RECIPES, Recipe, RecipeOptions
from models.transformer import DeformableTransformer
from models.two_stage import TwoStageTransformer
from util.batch import EffectiveBatch, Target

# N batch, M boxes of the image that has most, P slots, T boxes of an image, C width.

_STREAM = 0x0D1707  # tells these draws from others of the same seed, epoch and image


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """Options of denoising, under their names in DINO, with `dn_number` as `num_denoising`."""

    num_denoising: int = option(
        100,
        "noised copies of an image's objects in training, and as many negative ones; 0: none. "
        "There is at least one copy of each object. With compile, their number is fixed.",
        low=0,
        most=10_000,
    )
    dn_label_noise: float = option(
        0.5, "half of it is the probability that a copy has a random label", low=0, high=1
    )
    dn_box_noise: float = option(
        1.0, "how far its corners move: at most this many half widths and heights", low=0, high=10
    )
    dn_contrast: bool = option(
        True,
        "add negative copies, moved one to two times as far, which are background",
        off="copies that stand for objects alone, as in DN-DETR",
    )

    @property
    def active(self) -> bool:
        """Return whether there are copies."""
        return self.num_denoising > 0


@dataclass(frozen=True)
class Noised:
    """What noise has left of the objects of a batch, in slots: first those that learn, then spare.

    Shape: labels [N,P], one past the last class where a slot is empty; boxes [N,P,4] cxcywh;
    blocked [P,P], True where a slot (row) must not attend to another.
    """

    labels: Tensor
    boxes: Tensor
    blocked: Tensor
    learning: Learning


@RECIPES.register("denoising")
class Denoising(Recipe):
    """Groups of noised objects that see themselves and the queries that detect.

    In a one-stage model, whose queries start from points, a noised box gives its centre to the
    reference point and all of it to the query's position.
    """

    options_class = Options

    def __init__(
        self, options: Options, transformer: DeformableTransformer, *, num_classes: int
    ) -> None:
        super().__init__(options, transformer, num_classes=num_classes)
        self.count, self.kinds = options.num_denoising, 1 + options.dn_contrast
        self.flip, self.box_noise = options.dn_label_noise / 2, options.dn_box_noise
        self.num_classes, width = num_classes, transformer.d_model
        # the last row is for empty slots: zero, and without a gradient
        self.label_enc = nn.Embedding(num_classes + 1, width, padding_idx=num_classes)
        if not transformer.two_stage:
            self.pos_trans = nn.Linear(2 * width, width)
            self.pos_trans_norm = ExactLayerNorm(width)

    def num_groups(self, most_boxes: int) -> int:
        """Return how many groups hold every object once, at least one.

        DINO's own code reads a `dn_number` below 50 as the number of groups, which has no bound.
        """
        return max(1, self.count // most_boxes) if most_boxes else 1

    def prepare(
        self, targets: Sequence[Target], whole: EffectiveBatch, *, fixed_sizes: bool
    ) -> Noised:
        """Return the objects with noise, drawn for every image by itself.

        Group i has its slots at i * kinds * M: copies of the image's objects, and from M on their
        negative copies. Images with fewer than M boxes leave slots empty, which learn that they
        are background. With `fixed_sizes`, `num_denoising` sets the number of slots, twice, four
        times, ... as many where M is larger; the spare ones learn nothing.
        """
        most, groups = whole.most_boxes, self.num_groups(whole.most_boxes)
        size = room = groups * self.kinds * most
        if fixed_sizes:
            room = self.kinds * self.count
            while room < size:
                room *= 2
        labels = np.full((len(targets), room), self.num_classes)
        boxes = np.full((len(targets), room, 4), 0.5)
        pairs = []
        for number, target in enumerate(targets):
            count = len(target["labels"])
            place = (groups, self.kinds, most)
            own_labels, own_boxes = self._noised(target, groups, whole)
            labels[number, :size].reshape(place)[:, :, :count] = own_labels
            boxes[number, :size].reshape(*place, 4)[:, :, :count] = own_boxes
            slots = np.arange(size).reshape(place)[:, 0, :count]  # of positive copies
            objects = np.broadcast_to(np.arange(count), slots.shape)
            pairs.append(np.stack([np.full(slots.shape, number), slots, objects]).reshape(3, -1))
        group_of = np.arange(room) // max(self.kinds * most, 1)
        group_of[size:] = groups  # spare slots see each other, and the queries that detect
        weight = self.label_enc.weight
        image, slot, of_target, group, label = (
            torch.from_numpy(array).to(weight.device, non_blocking=True)
            for array in (*np.concatenate(pairs, axis=1), group_of, labels)
        )
        return Noised(
            label,
            torch.from_numpy(boxes).to(weight, non_blocking=True),
            group[:, None] != group,
            Learning(
                matches=Matches(image, slot[None], of_target[None]),
                divisor=groups,  # each object is learned once in every group
                size=size,
            ),
        )

    def queries(
        self,
        transformer: DeformableTransformer,
        memory: Tensor,
        proposals: Proposals | None,
        prepared: Noised,
    ) -> list[QueryGroup]:
        """Return one group of queries for all groups of objects, which a mask keeps apart."""
        boxes = reference = prepared.boxes
        if isinstance(transformer, TwoStageTransformer):
            position = transformer.from_boxes("_dn", boxes, None, prepared.learning).position
        else:
            embedded = sine_embedding(boxes * 2 * math.pi, transformer.d_model // 2).flatten(-2)
            position = self.pos_trans_norm(self.pos_trans(embedded))
            reference = boxes[..., :2]
        group = QueryGroup(
            "_dn",
            self.label_enc(prepared.labels),
            position,
            reference,
            prepared.learning,
            prepared.blocked,
            sees_detecting=True,
        )
        return [group]

    def _noised(
        self, target: Target, groups: int, whole: EffectiveBatch
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return labels [groups,kinds,T] and boxes [groups,kinds,T,4] of an image with noise.

        Corners that have passed each other change places, so that no size is negative.
        """
        # of the host, where targets are: nothing waits for a device
        labels, boxes = target["labels"].cpu().numpy(), target["boxes"].cpu().numpy()
        image_id = int(target["image_id"].cpu().numpy())
        key = (_STREAM, whole.seed, whole.epoch, image_id)
        draw = np.random.default_rng([number % 2**64 for number in key])
        shape = (groups, self.kinds, len(labels))
        flipped = draw.random(shape) < self.flip
        random_labels = draw.integers(self.num_classes, size=shape)
        distance = draw.random((*shape, 2, 2))  # of each corner, x and y
        distance[:, 1:] += 1
        distance *= self.box_noise * (1 - 2 * draw.integers(2, size=distance.shape))
        centre, half = boxes[:, None, :2].astype(np.float64), boxes[:, None, 2:] / 2.0
        corners = np.concatenate([centre - half, centre + half], axis=1) + distance * half
        corners = np.sort(corners.clip(0, 1), axis=-2)
        low, high = corners[..., 0, :], corners[..., 1, :]
        noised = np.concatenate([(low + high) / 2, high - low], axis=-1)
        return np.where(flipped, random_labels, labels), noised
