"""Attention fused with per-row statistics and head gates."""

from headscope_kernels.attention.forward import attention_forward
from headscope_kernels.attention.statistics import STATISTICS

__all__ = ["STATISTICS", "attention_forward"]
