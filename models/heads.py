"""Prediction heads: classes and boxes of every decoder layer, and of a two-stage encoder."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.contrastive import ContrastiveHead
from models.layers import ExactLinear, inverse_sigmoid

# N batch, Q queries, C width.


def apply_delta(delta: Tensor, reference: Tensor, eps: float = 1e-5) -> Tensor:
    """Add a predicted delta to a reference point or box in logit space (Appendix A.3 and A.4).

    A head has to learn only where the object lies as seen from the place its query looks at. The
    reference is clamped to `eps` from 0 and 1.

    Shape: delta [N,Q,4]; reference [N,Q,2 or 4], fractions; returns cxcywh boxes [N,Q,4].
    """
    offset = inverse_sigmoid(reference, eps)
    if offset.shape[-1] == 2:
        offset = F.pad(offset, (0, 2))  # a point says nothing of the size
    return (delta + offset).sigmoid()


class MLP(nn.Module):
    """Linear layers with ReLU between them, the last one exact: the box head."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1)]
        hidden = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.layers = nn.ModuleList([*hidden, ExactLinear(hidden_dim, output_dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [..., input_dim] -> [..., output_dim]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        output: Tensor = self.layers[-1](x)
        return output


class DetectionHeads:
    """Class and box heads: entry i belongs to decoder layer i, the one after to the encoder.

    Not a module itself: the detector and the decoder register the lists under their official keys.
    """

    def __init__(self, class_heads: Sequence[nn.Module], box_heads: Sequence[nn.Module]) -> None:
        self.class_embed = nn.ModuleList(class_heads)
        self.bbox_embed = nn.ModuleList(box_heads)

    def logits(self, index: int, hidden: Tensor, class_tokens: Tensor | None = None) -> Tensor:
        """Shape: hidden [N,Q,C]; class_tokens [N,T,C]; returns [N,Q,classes]."""
        head = self.class_embed[index]
        inputs = (hidden, class_tokens) if isinstance(head, ContrastiveHead) else (hidden,)
        output: Tensor = head(*inputs)
        return output

    def delta(self, index: int, hidden: Tensor) -> Tensor:
        """Return what a box moves by in logit space. Shape: hidden [N,Q,C]; returns [N,Q,4]."""
        output: Tensor = self.bbox_embed[index](hidden)
        return output
