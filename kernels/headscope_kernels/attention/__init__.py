"""Attention fused with per-row statistics and head gates."""

from headscope_kernels.attention.forward import attention_forward
from headscope_kernels.attention.key_mass import attention_key_mass
from headscope_kernels.attention.statistics import STATISTICS, BoundStatistic, RowStatistic

__all__ = ["STATISTICS", "BoundStatistic", "RowStatistic", "attention_forward", "attention_key_mass"]
