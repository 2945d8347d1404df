"""The C++ kernel under test, called below the operator: headscope.ops.cpu_library."""

import importlib.metadata

import pytest
import torch
from torch import Tensor

from contract import Inputs
from headscope.ops import cpu_library

# no result that a test expects, and not a NaN, which some do expect
POISON = 777.0
# statistics without constants
ROW_STATISTICS = ("entropy", "logsumexp", "max_logit", "max_prob")


@pytest.fixture(scope="session")
def library():
    """The loaded library. Only a bare source tree may lack it: the fallback for machines without a compiler would
    otherwise hide that the code doesn't compile."""
    reason = cpu_library.unavailable_reason()
    if reason is not None:
        try:
            importlib.metadata.distribution("headscope")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"headscope runs from bare source: {reason}")
        pytest.fail(f"headscope is installed, but {reason}")
    return cpu_library.load()


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def instruction_set(request, library, monkeypatch):
    """Each instruction set of this machine in turn; the library uses it."""
    monkeypatch.setattr(library, "instruction_set", request.param)
    try:
        library.instruction_set_name()
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def attend(library):
    """A call with poisoned outputs: (Inputs, statistics, threads) -> output, {name: [batch, heads, queries]}."""

    def call(
        inputs: Inputs,
        statistics: tuple[str, ...] = ROW_STATISTICS,
        threads: int | None = None,
        output: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        query, value = inputs.query, inputs.value
        if output is None:
            output = query.new_empty(*query.shape[:3], value.shape[-1])
        output.fill_(POISON)
        values = [torch.full(query.shape[:3], POISON) for _ in statistics]
        scale = inputs.options.get("scale")
        fill = inputs.fill
        if isinstance(fill, Tensor):
            fill = fill[(None,) * (4 - fill.ndim)]
        cpu_library.attention_forward(
            query,
            inputs.key,
            value,
            attn_mask=inputs.options.get("attn_mask"),
            is_causal=inputs.options.get("is_causal", False),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            gate=inputs.gate,
            fill=fill,
            temperature=inputs.temperature,
            key_bias=inputs.key_bias,
            key_scale=inputs.key_scale,
            statistics=statistics,
            output=output,
            statistic_outputs=values,
            threads=threads,
        )
        return output, dict(zip(statistics, values, strict=True))

    return call
