"""The deformable transformer: levels to memory, memory to object queries."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.decoder import DecoderOutput, DeformableDecoder
from models.encoders.deformable import DeformableEncoder
from models.layers import ExactLayerNorm, ExactLinear
from models.levels import FeatureLevels, valid_ratio
from models.queries import proposal_embedding, select_proposals, token_proposals
from ops import MSDeformAttn
from ops.reference import level_sizes

# N batch, S tokens, Q queries, L levels, C width.


@dataclass(frozen=True)
class TransformerOutput:
    """Decoder states, and the encoder's own predictions of a two-stage model.

    Shape: encoder_logits [N,S,classes]; encoder_boxes [N,S,4] cxcywh.
    """

    decoder: DecoderOutput
    encoder_logits: Tensor | None = None
    encoder_boxes: Tensor | None = None


class DeformableTransformer(nn.Module):
    """Encoder, decoder, and what turns memory or embeddings into queries."""

    def __init__(
        self,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        *,
        d_model: int,
        num_feature_levels: int,
        two_stage: bool = False,
        num_queries: int = 300,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.two_stage = two_stage
        self.num_queries = num_queries
        self.encoder = encoder
        self.decoder = decoder
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = ExactLayerNorm(d_model)
            self.pos_trans = nn.Linear(d_model * 2, d_model * 2)
            self.pos_trans_norm = ExactLayerNorm(d_model * 2)
        else:
            self.reference_points = ExactLinear(d_model, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official implementation does; heads are the detector's to set."""
        heads = {id(p) for m in (self.decoder.bbox_embed, self.decoder.class_embed)
                 if m is not None for p in m.parameters()}  # fmt: skip
        for parameter in self.parameters():
            if parameter.dim() > 1 and id(parameter) not in heads:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def forward(
        self,
        features: list[Tensor],
        masks: list[Tensor],
        pos: list[Tensor],
        query_embed: Tensor | None,
    ) -> TransformerOutput:
        """Shape: features, pos L x [N,C,H,W]; masks L x [N,H,W]; query_embed [Q,2C] or None."""
        levels = self.flatten(features, masks, pos)
        memory = self.encoder(levels)
        if query_embed is None:
            return self._two_stage(memory, levels)
        query_pos, queries = query_embed.chunk(2, dim=-1)
        query_pos = query_pos[None].expand(len(memory), -1, -1)
        queries = queries[None].expand(len(memory), -1, -1)
        reference = self.reference_points(query_pos).sigmoid()
        return TransformerOutput(self.decoder(queries, query_pos, reference, memory, levels))

    def flatten(
        self, features: list[Tensor], masks: list[Tensor], pos: list[Tensor]
    ) -> FeatureLevels:
        """Join the levels into one sequence, each with its level embedding."""
        # in the precision of the weights also under autocast: adding up mixed types is slow
        exact = self.level_embed.dtype
        level_pos = [
            p.flatten(2).mT.to(exact) + e for p, e in zip(pos, self.level_embed, strict=True)
        ]
        shapes = [(int(f.shape[2]), int(f.shape[3])) for f in features]
        valid_ratios = torch.stack([valid_ratio(m, features[0].dtype) for m in masks], dim=1)
        return FeatureLevels(
            tokens=torch.cat([f.flatten(2).mT for f in features], dim=1).to(exact),
            pos=torch.cat(level_pos, dim=1),
            padding_mask=torch.cat([m.flatten(1) for m in masks], dim=1),
            valid_ratios=valid_ratios,
            sizes=level_sizes(shapes, valid_ratios),
            spatial_shapes=shapes,
        )

    def _two_stage(self, memory: Tensor, levels: FeatureLevels) -> TransformerOutput:
        class_embed, bbox_embed = self.decoder.class_embed, self.decoder.bbox_embed
        assert class_embed is not None
        assert bbox_embed is not None
        proposals = token_proposals(levels)
        usable = proposals.isfinite().all(-1, keepdim=True)
        output = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable, 0.0)))
        logits = class_embed[-1](output)
        box_logits = bbox_embed[-1](output) + proposals
        # class 0 stands for "object" here: the encoder's targets all carry label 0
        chosen = select_proposals(
            logits[..., 0].detach(), box_logits.detach(), levels.padding_mask, self.num_queries
        )
        reference = chosen.sigmoid()
        embedded = proposal_embedding(reference, self.d_model // 2)
        query_pos, queries = self.pos_trans_norm(self.pos_trans(embedded)).chunk(2, dim=-1)
        decoded = self.decoder(queries, query_pos, reference, memory, levels)
        return TransformerOutput(decoded, logits, box_logits.sigmoid())
