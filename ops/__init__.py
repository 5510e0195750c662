"""Multi-scale deformable attention (arXiv 2010.04159, Eq. 3)."""

from ops.ms_deform_attn import ms_deform_attn

__all__ = ["ms_deform_attn"]
