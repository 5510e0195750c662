"""Dropout with cheap masks on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fast_cpu_dropout(x: Tensor, p: float) -> Tensor:
    """Drop elements with probability `p`, and scale the others up; four masks from one number.

    PyTorch draws one number for each element on the CPU, a seventh of a training step's time. Here
    sixteen bits decide on an element: `p` is met to 1 in 65536, and the scale is exact for what is
    met.
    """
    threshold = round(p * 2**16)
    if not 0 < threshold < 2**16:
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = (bits >= threshold - 2**15).to(x.dtype)
    return x * kept.mul_(2**16 / (2**16 - threshold))
