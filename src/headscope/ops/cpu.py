"""The cpu backend: the fused C++ kernel of csrc/, float32 inside. Its gradients are portable's."""

from headscope.ops import cpu_library
from headscope.ops.call import Call, Results


def forward(call: Call) -> Results:
    output, statistics = call.empty_output(), call.restored_statistics()
    values = call.empty_statistics(statistics)
    cpu_library.attention_forward(
        call.query,
        call.key,
        call.value,
        attn_mask=call.attn_mask,
        is_causal=call.is_causal,
        scale=call.scale,
        gate=call.gate,
        fill=call.fill,
        temperature=call.temperature,
        key_bias=call.key_bias,
        key_scale=call.key_scale,
        statistics=[(entry.key, entry.constants, entry.tensors) for entry in statistics],
        output=output,
        statistic_outputs=values,
    )
    return output, values, []
