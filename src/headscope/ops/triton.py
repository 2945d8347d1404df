"""The triton backend: the fused GPU kernel of headscope_kernels, forward only."""

from headscope.ops.fused import forward_of
from headscope_kernels.attention import attention_forward

forward = forward_of(attention_forward)
