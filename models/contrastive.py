"""Class scores by likeness to class tokens."""

import torch
from torch import Tensor, nn

# N batch, Q queries, T class tokens, C width.


class ContrastiveHead(nn.Module):
    """Scores classes by how alike a query and the token of a class are (Grounding DINO, Sec. 3.5).

    As the products of both are large at first, they are scaled, and biases hold scores down
    (MM-Grounding-DINO, arXiv 2401.02361). Computed in the precision of the weights, like
    `ExactLinear`.
    """

    def __init__(self, d_model: int, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(d_model**-0.5))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor, class_tokens: Tensor) -> Tensor:
        """Shape: x [N,Q,C]; class_tokens [N,T,C] -> [N,Q,T]."""
        with torch.autocast(x.device.type, enabled=False):
            exact = self.bias.dtype
            products = x.to(exact) @ class_tokens.to(exact).mT
            return products * self.scale + self.bias
