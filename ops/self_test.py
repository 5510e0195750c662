"""Check every backend quickly against the definition in float64."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import BACKENDS, Backend, use_backend
from .ms_deform_attn import ms_deform_attn

MAX_ERROR = 1e-4  # relative, float32
_SHAPES = [(5, 7), (3, 2)]


def definition(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample level by level with `grid_sample`, stack, weight and sum, as the official code does.

    Shares nothing with the backends, not even with the one in PyTorch, so that it can judge all.
    """
    n, _, m, d = value.shape
    q, levels, k = weights.shape[1], len(shapes), weights.shape[4]
    grids = 2 * locations - 1
    sampled = []
    for level, tokens in enumerate(torch.split(value, [h * w for h, w in shapes], dim=1)):
        maps = tokens.flatten(2).transpose(1, 2).reshape(n * m, d, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(maps, grid.to(maps.dtype), align_corners=False))
    stacked = torch.stack(sampled, dim=-2).flatten(-2)
    shares = weights.transpose(1, 2).reshape(n * m, 1, q, levels * k).to(stacked.dtype)
    return (stacked * shares).sum(-1).view(n, m * d, q).transpose(1, 2).contiguous()


def self_test(backend: str, device: torch.device) -> float:
    """Return the largest error of a backend in float32 on `device`, forward and backward.

    The error is relative to the largest exact value, or absolute where that is below 1.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in _SHAPES)
    exact = [
        torch.randn(2, tokens, 2, 4, generator=generator, dtype=torch.float64),
        torch.rand(2, 6, 2, 2, 3, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1,
        torch.rand(2, 6, 2, 2, 3, generator=generator, dtype=torch.float64),
    ]
    exact = [t.requires_grad_() for t in exact]
    tested = [t.detach().to(device, torch.float32).requires_grad_() for t in exact]
    expected = definition(exact[0], _SHAPES, exact[1], exact[2])
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)
    with use_backend(backend):
        actual = ms_deform_attn(tested[0], _SHAPES, tested[1], tested[2])
        actual_grads = torch.autograd.grad(actual.square().sum(), tested)
    expected, actual = expected.detach(), actual.detach()
    pairs = zip((expected, *expected_grads), (actual, *actual_grads), strict=True)
    return max(
        float((a.cpu().double() - e).abs().max() / e.abs().max().clamp(min=1)) for e, a in pairs
    )


def check_backends() -> list[tuple[str, bool]]:
    """Test every backend on the CPU and every GPU; return a line on each, and whether it is fine.

    A backend that cannot run here is fine; one that runs with wrong results is not.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    lines = []
    for device in devices:
        name = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        lines.append((f"ms_deform_attn on {device} ({name})", True))
        lines += [_check(backend, device) for backend in BACKENDS.values()]
    return lines


def _check(backend: Backend, device: torch.device) -> tuple[str, bool]:
    if reason := backend.unavailable(device):
        return f"  {backend.name:10s} -  {reason}", True
    try:
        error = self_test(backend.name, device)
    except RuntimeError as failure:  # for example a GPU that this torch has no code for
        return f"  {backend.name:10s} FAILED: {str(failure).splitlines()[0]}", False
    passed = error < MAX_ERROR
    return f"  {backend.name:10s} {'ok' if passed else 'FAILED'}, error {error:.1e}", passed
