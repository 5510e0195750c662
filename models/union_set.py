"""Box targets from the pairs of all decoder layers together (D-FINE, arXiv 2410.13842, Sec. 4.2).

Matching gives a query one object in one layer and another, or none, in the next. Its boxes then
learn to go back and forth. Here a query learns one object in all layers, and a query that any layer
has matched learns in all of them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from models.criterion import Assigned, SetCriterion
from models.matcher import Matches, PaddedTargets
from models.queries import GroupOutput

# G prediction layers, N batch, Q queries, T targets of an image (padded to the longest).


class UnionSetCriterion(SetCriterion):
    """Boxes of queries that are matched one to one learn the pairs of all layers together.

    Scores still learn those of their layer.
    """

    def on_boxes(
        self, group: GroupOutput, targets: PaddedTargets, matches: Matches, assigned: Assigned
    ) -> Assigned:
        """Return what the losses of boxes learn."""
        learning = group.learning
        others = (learning.targets, learning.matches, learning.assign)
        if len(group.logits) == 1 or any(other is not None for other in others):
            return assigned
        queries, dtype = group.logits.shape[2], assigned.boxes.dtype
        united, weights = union_of_layers(matches, targets, queries, dtype, parts=learning.parts)
        return replace(self.assign(group, targets, united), weights=weights)


@torch.no_grad()
def union_of_layers(
    matches: Matches, targets: PaddedTargets, queries: int, dtype: torch.dtype, *, parts: int = 1
) -> tuple[Matches, Tensor]:
    """Return pairs for every layer, and how much each counts.

    Each query that a layer has matched gets the object that most layers give it; of equally many
    the first. Published code divides by the number of pairs in the batch, which is known only when
    all parts of a larger batch have been computed. Here the pairs of an image together count as
    much as its objects, so that any way to share out a batch gives the same. Of several equal
    `parts` of the queries, each of which finds all objects, those of each do.

    Shape: matches of Q `queries`, the same images in every layer -> Matches of N*Q places, `real`
        where a query has an object; weights [N*Q] of this dtype.
    """
    query, target = matches.query, matches.target  # [G,P]
    layers, device = len(query), query.device
    n, t = targets.labels.shape
    count = torch.zeros(n, queries, max(t, 1), dtype=torch.int64, device=device)
    place = (matches.image.expand(layers, -1), query, target)
    count.index_put_(place, torch.ones_like(query), accumulate=True)
    matched = count.amax(-1) > 0  # [N,Q]
    # no two objects of a query are equal in this: of equal counts the first object is the best
    chosen = (count * count.shape[2] - torch.arange(count.shape[2], device=device)).argmax(-1)
    objects = torch.tensor(targets.counts, dtype=dtype).to(device, non_blocking=True)
    pairs = matched.view(n, parts, -1).sum(2).clamp(min=1)
    weight = (objects[:, None] / pairs)[..., None].expand(-1, -1, queries // parts).flatten()
    places = torch.arange(n * queries, device=device)
    real = matched.flatten().expand(layers, -1)
    if t == 0:
        places, real, chosen, weight = places[:0], real[:, :0], chosen[:0], weight[:0]
    image = places // queries
    united = Matches(
        image,
        (places % queries).expand(layers, -1),
        chosen.flatten().expand(layers, -1),
        real,
        real,
    )
    return united, weight
