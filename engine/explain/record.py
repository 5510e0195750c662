"""Records what attention does in a forward pass, from outside the model.

Hooks keep the inputs of attention modules, and only for as long as a `recording` lasts. From these,
the modules' own layers give sampling points and weights afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.decoder import DecoderOutput
from models.deformable_detr import DeformableDETR
from models.encoders.sparse import SparseEncoder, best_tokens
from ops import MSDeformAttn
from ops.reference import sampling_locations

# N batch, Q queries, S tokens, M heads, L levels, K points, C width.

Shapes = list[tuple[int, int]]
TokenChoice = Callable[[Shapes], int]  # sizes (H, W) of the levels -> position in their sequence


@dataclass(frozen=True)
class Look:
    """A call of deformable attention: who looks, from where, and on which levels.

    Shape: query [N,Q,C]; reference [N,Q,L,2 or 4], fractions; shapes L pairs (H, W).
    """

    module: MSDeformAttn
    query: Tensor
    reference: Tensor
    shapes: Shapes

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the queries of `rows` read in each image, and with which weights.

        Shape: rows [R]; returns locations [N,R,M,L,K,2], (x, y) fractions of the padded levels,
            and weights [N,R,M,L,K], which sum to 1 over levels and points.
        """
        query, reference = self.query[:, rows], self.reference[:, rows]
        module = self.module
        shape = (*query.shape[:2], module.n_heads, module.n_levels, module.n_points)
        offsets = module.sampling_offsets(query).view(*shape, 2)
        weights = module.attention_weights(query).view(shape).flatten(3).softmax(-1).view(shape)
        return sampling_locations(reference, offsets, self.shapes), weights


@dataclass(frozen=True)
class Exchange:
    """A call of attention among queries."""

    module: nn.MultiheadAttention
    arguments: tuple[Tensor, Tensor, Tensor]
    mask: Tensor | None

    def weights(self) -> Tensor:
        """Return how much each query takes from each. Shape: [N,M,Q,Q], rows sum to 1."""
        weights = self.module(
            *self.arguments, attn_mask=self.mask, need_weights=True, average_attn_weights=False
        )[1]
        return cast(Tensor, weights)


@dataclass
class Record:
    """What was recorded: an entry per decoder layer, and what the decoder returned.

    `token_looks` has an entry for each encoder layer with deformable attention, of the one token
    that was chosen; None where a layer leaves that token as it is.
    """

    looks: list[Look] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    token_looks: list[Look | None] = field(default_factory=list)
    decoded: DecoderOutput | None = None


def deformable_attention(model: DeformableDETR) -> list[MSDeformAttn]:
    """Return the encoder's modules of deformable attention, first layer first."""
    return [m for m in model.transformer.encoder.modules() if isinstance(m, MSDeformAttn)]


@contextmanager
def recording(model: DeformableDETR, token: TokenChoice | None = None) -> Iterator[Record]:
    """Record the next forward pass, in evaluation mode.

    `token` chooses an encoder token to follow. The model computes what it computes without.
    """
    record, handles = Record(), list[Any]()
    decoder = model.transformer.decoder
    row_of = _rows_of_a_sparse_encoder(model, handles)

    def look(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        query, reference, _, shapes = inputs
        assert isinstance(module, MSDeformAttn)
        record.looks.append(Look(module, query, reference, list(shapes)))

    def token_look(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        query, reference, tokens, shapes = inputs
        assert isinstance(module, MSDeformAttn)
        assert token is not None
        row = row_of(token(list(shapes)))
        if row is None:  # a layer that changes the coarse tokens alone is given the last ones
            row = token(list(shapes)) - (tokens.shape[1] - query.shape[1])
        part = slice(row, row + 1)
        record.token_looks.append(
            Look(module, query[:, part].clone(), reference[:, part].clone(), list(shapes))
            if row >= 0
            else None
        )

    def exchange(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert isinstance(module, nn.MultiheadAttention)
        record.exchanges.append(Exchange(module, inputs[:3], options.get("attn_mask")))

    def decoded(module: nn.Module, inputs: tuple[Any, ...], output: DecoderOutput) -> None:
        record.decoded = output

    def before(module: nn.Module, hook: Callable[..., None]) -> None:
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    try:
        for layer in decoder.layers:
            before(cast(nn.Module, layer.cross_attn), look)
            before(cast(nn.Module, layer.self_attn), exchange)
        for module in deformable_attention(model) if token is not None else ():
            before(module, token_look)
        handles.append(decoder.register_forward_hook(decoded))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _rows_of_a_sparse_encoder(
    model: DeformableDETR, handles: list[Any]
) -> Callable[[int], int | None]:
    """Return what finds the row of a token among those that layers are given, the best first.

    It is -1 for a token that they leave as it is, and None for all if the encoder is another.
    """
    encoder, changed = model.transformer.encoder, list[Tensor]()
    if not isinstance(encoder, SparseEncoder):
        return lambda place: None
    part = encoder.rho

    def chosen(module: nn.Module, inputs: tuple[Any, ...], scores: Tensor) -> None:
        best, among = best_tokens(scores, inputs[1], part)
        changed.append(best[0][among[0]])

    handles.append(encoder.enc_mask_predictor.register_forward_hook(chosen))
    return lambda place: next(iter((changed[-1] == place).nonzero()[:, 0].tolist()), -1)


def query_weights(record: Record, rows: Tensor) -> Tensor:
    """Return what queries of one image take from each query. Shape: rows [R] -> [layers,R,M,Q]."""
    taken = [exchange.weights()[0][:, rows].transpose(0, 1) for exchange in record.exchanges]
    return torch.stack(taken)
