"""Attention fused with statistics of its rows and edits of its heads, forward and backward.

In reading order, each importing only those before it:

    configuration, host             tiles of a program; strides, alignment and device of tensors
    statistics/                     the statistics' jit functions
    arguments                       the description of the kernels' argument lists, and the arguments made from it
    operands, launches              the check of a binary; launches that are remembered
    loads, tiles                    the kernels' jit helpers
    hopper/                         schedules of the forward for Hopper
    choices                         measured configurations
    forward/, key_mass, backward/   the kernels and their launches
    inspection/                     reports on compiled kernels, for tests and people
"""

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
