"""Multi-scale deformable attention (arXiv 2010.04159, Eq. 3)."""

from .backends import use_backend
from .call import BackendError
from .module import MSDeformAttn, fast_cpu_dropout
from .ms_deform_attn import fused_ms_deform_attn
from .plain import ms_deform_attn

__all__ = [
    "BackendError",
    "MSDeformAttn",
    "fast_cpu_dropout",
    "fused_ms_deform_attn",
    "ms_deform_attn",
    "use_backend",
]
