"""The cpu backend: the fused C++ kernel of csrc/, float32 inside, forward only."""

from headscope.ops import cpu_library
from headscope.ops.fused import forward_of

forward = forward_of(cpu_library.attention_forward)
