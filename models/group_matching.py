"""Pairs of groups whose matching is not simply the cheapest of all their predictions."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.matcher import HungarianMatcher, Matches, PaddedTargets
from models.queries import GroupOutput

# G prediction layers, N batch, Q queries.


def learners(group: GroupOutput) -> GroupOutput:
    """Return the group without the queries of which nothing is learned."""
    size = group.learning.size
    return replace(group, logits=group.logits[:, :, :size], boxes=group.boxes[:, :, :size])


def match_groups(
    matcher: HungarianMatcher, groups: Sequence[GroupOutput], targets: Sequence[PaddedTargets]
) -> list[Matches]:
    """Return every group's pairs: those it knows, those it finds itself, or the cheapest."""
    matches: list[Matches | None] = [group.learning.matches for group in groups]
    costly = []
    for index, (group, own) in enumerate(zip(groups, targets, strict=True)):
        learning = group.learning
        if learning.assign is not None:
            matches[index] = learning.assign(group.logits, group.boxes, own)
        elif learning.matches is None:
            anchors = learning.anchors
            boxes = group.boxes if anchors is None else anchors[None]
            scored = _in_parts(group.logits, learning.parts) if anchors is None else None
            costly.append((scored, _in_parts(boxes, learning.parts), own))
    found = iter(matcher(costly))
    return [
        _joined(next(found), group.learning.parts, group.logits.shape[2])
        if pairs is None
        else pairs
        for pairs, group in zip(matches, groups, strict=True)
    ]


def _in_parts(x: Tensor, parts: int) -> Tensor:
    """Make layers of equal parts of the queries. Shape: [G,N,Q,...] -> [G*parts,N,Q/parts,...]."""
    if parts == 1:
        return x
    layers, n, queries, *rest = x.shape
    return x.reshape(layers, n, parts, queries // parts, *rest).transpose(1, 2).flatten(0, 1)


def _joined(matches: Matches, parts: int, queries: int) -> Matches:
    """Return the pairs of parts as those of the queries of which they are parts."""
    if parts == 1:
        return matches
    rows, pairs = matches.query.shape
    query, target = (
        t.reshape(rows // parts, parts, pairs) for t in (matches.query, matches.target)
    )
    first = torch.arange(parts, device=query.device)[:, None] * (queries // parts)
    return Matches(matches.image.repeat(parts), (query + first).flatten(1), target.flatten(1))
