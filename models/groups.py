"""How groups of queries pass a decoder layer side by side: who sees whom, and what each has."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.queries import QueryGroup, Route

# N batch, Q queries, R of them that a group attends to, T tokens, C width.


class Members(NamedTuple):
    """A group of queries in one layer: how many, who sees whom, and what it has for itself.

    `mask` has columns for all that the group attends to: [Q,R], True where a query must not attend
    to another, or [N heads,Q,R], which is added to the logits. See `QueryGroup`.
    """

    size: int
    mask: Tensor | None
    sees_detecting: bool
    parts: int
    route: Route


@dataclass(frozen=True)
class Groups:
    """All groups of queries in one layer, the first those that detect."""

    members: Sequence[Members]

    def attend(self, attention: nn.MultiheadAttention, query: Tensor, value: Tensor) -> Tensor:
        """Attend within each group. Shape: query, value [N,Q,C]; returns the same."""
        queries, values = self._apart(query), self._apart(value)
        attended = [
            _attend(attention, q, v, (queries[0], values[0]), members)
            for members, q, v in zip(self.members, queries, values, strict=True)
            if members.size
        ]
        return torch.cat(attended, dim=1)

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Apply the norm after attention, or each group's own. Shape: [N,Q,C] -> the same."""
        return self._each(norm, [members.route.norm for members in self.members], x)

    def fed(self, feed_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply the feed-forward block, or each group's own. Shape: [N,Q,C] -> the same."""
        return self._each(feed_forward, [members.route.feed_forward for members in self.members], x)

    def aside(self, x: Tensor) -> Tensor | None:
        """Return what routes read of the queries, if any does. Shape: [N,Q,C] -> [N,Q',C]."""
        read = [
            members.route.aside(part)
            for members, part in zip(self.members, self._apart(x), strict=True)
            if members.route.aside is not None
        ]
        return torch.cat(read, dim=1) if read else None

    def _apart(self, x: Tensor) -> Sequence[Tensor]:
        return torch.split(x, [members.size for members in self.members], dim=1)

    def _each(
        self, shared: Callable[[Tensor], Tensor], own: Sequence[nn.Module | None], x: Tensor
    ) -> Tensor:
        if all(module is None for module in own):
            return shared(x)
        outputs = [
            shared(part) if module is None else module(part)
            for part, module in zip(self._apart(x), own, strict=True)
        ]
        return torch.cat(outputs, dim=1)


def groups_in_layer(
    groups: Sequence[QueryGroup], layer: int, relations: Sequence[Tensor | None] | None = None
) -> Groups:
    """Return the groups as a layer needs them.

    `relations` [N heads,Q,R] of each group, if it has any, is added to what its queries see.
    """
    each: Sequence[Tensor | None] = [None] * len(groups) if relations is None else relations
    triples = zip(groups, each, strict=True)
    return Groups([_members(group, groups[0], layer, related) for group, related in triples])


def _members(
    group: QueryGroup, detecting: QueryGroup, layer: int, related: Tensor | None
) -> Members:
    route = group.routes[layer] if group.routes else Route()
    mask = group.blocked
    if mask is not None and group.sees_detecting:
        open_columns = mask.new_zeros(len(mask), detecting.content.shape[1])
        mask = torch.cat([open_columns, mask], dim=1)
    if related is not None:
        mask = related if mask is None else related.masked_fill(mask, -math.inf)
    size = group.content.shape[1]
    return Members(size, mask, group.sees_detecting, group.parts, route)


def _attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    value: Tensor,
    detecting: tuple[Tensor, Tensor],
    members: Members,
) -> Tensor:
    shape = query.shape
    if members.parts > 1:  # each part is as if it were an image of its own
        query, value = (t.reshape(shape[0] * members.parts, -1, shape[2]) for t in (query, value))
    key, tokens = query, members.route.tokens
    if members.sees_detecting:
        key = torch.cat([detecting[0], key], dim=1)
        value = torch.cat([detecting[1], value], dim=1)
    if tokens is not None:
        content, position = (t.to(value.dtype).expand(value.shape[0], -1, -1) for t in tokens)
        key = torch.cat([content + position, key], dim=1)
        value = torch.cat([content, value], dim=1)
    attended: Tensor = attention(query, key, value, attn_mask=members.mask, need_weights=False)[0]
    return attended.reshape(shape)
