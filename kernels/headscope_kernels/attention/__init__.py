"""Attention fused with statistics of its rows and edits of its heads, forward and backward."""

from headscope_kernels.attention.backward.launch import attention_backward
from headscope_kernels.attention.forward.launch import attention_forward
from headscope_kernels.attention.key_mass import attention_key_mass
from headscope_kernels.attention.statistics import STATISTICS, BoundStatistic, RowStatistic

__all__ = [
    "STATISTICS",
    "BoundStatistic",
    "RowStatistic",
    "attention_backward",
    "attention_forward",
    "attention_key_mass",
]
