"""Check every backend quickly against the definition in float64."""

import torch
from torch import Tensor

from .backends import BACKENDS, Backend, use_backend
from .plain import ms_deform_attn

MAX_ERROR = 1e-4  # relative, float32
_SHAPES = [(5, 7), (3, 2)]


def _definition(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum bilinear samples by gathering corners (Deformable DETR, Eq. 3).

    Shares nothing with the backends, not even `grid_sample` with the one in PyTorch, so that it
    can judge all.
    """
    n, _, m, d = value.shape
    output = value.new_zeros(n, locations.shape[1], m, d)
    start = 0
    for level, (height, width) in enumerate(_SHAPES):
        maps = value[:, start : start + height * width].view(n, height, width, m, d)
        start += height * width
        x = locations[:, :, :, level, :, 0] * width - 0.5  # [N,Q,M,K], in cells
        y = locations[:, :, :, level, :, 1] * height - 0.5
        for dy in (0, 1):
            for dx in (0, 1):
                column, row = x.floor() + dx, y.floor() + dy
                share = (1 - (x - column).abs()) * (1 - (y - row).abs())
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                share = share * inside * weights[:, :, :, level]
                rows = row.clamp(0, height - 1).long()
                columns = column.clamp(0, width - 1).long()
                images = torch.arange(n)[:, None, None, None]
                heads = torch.arange(m)[:, None]
                corner = maps[images, rows, columns, heads]  # [N,Q,M,K,D]
                output += (corner * share[..., None]).sum(3)
    return output.flatten(2)


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
    expected = _definition(exact[0], exact[1], exact[2])
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
