"""The C++ kernel under test, called below the operator: headscope.ops.cpu_library."""

import importlib.metadata
from collections.abc import Collection, Mapping

import pytest
import torch
from torch import Tensor

from contract import Inputs
from gradient_truth import Cotangents, leaves_of
from headscope.ops import cpu_library, cpu_structs
from headscope.ops.schema import default_scale

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


@pytest.fixture
def differentiate(library):
    """A forward and a backward with poisoned results: (Inputs, Cotangents, wanted, threads, into) -> gradients.

    wanted: names, or None for everything that the library gives; into: tensors to use instead of new ones, by name. The
    gradients have a dimension of cotangents in front, then their tensors' sizes: what edits repeat is summed.
    """

    def call(
        inputs: Inputs,
        cotangents: Cotangents,
        wanted: Collection[str] | None = None,
        threads: int | None = None,
        into: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        common, saved, constants = backward_arguments(inputs, cotangents)
        query = inputs.query
        if wanted is None:
            wanted = [name for name in leaves_of(inputs) if name != "fill"]
        found = {}
        for name in wanted:
            tensor = leaves_of(inputs)[name]
            if name in ("query", "key", "value"):
                found[name] = tensor.new_empty(cotangents.count, *tensor.shape)
            else:
                sizes = tensor.shape if name == "attn_mask" else (*query.shape[:2], *tensor.shape[2:])
                found[name] = torch.empty(cotangents.count, *sizes)
        found |= into or {}
        for gradient in found.values():
            gradient.fill_(POISON)
        groups = []
        if cotangents.group_mass is not None:
            groups.append(((inputs.group_count,), (_group_ids(inputs),), cotangents.group_mass))
        cpu_library.attention_backward(
            query,
            inputs.key,
            inputs.value,
            **common,
            **saved,
            grad_output=cotangents.output,
            row_constants=constants,
            grad_entropy=cotangents.entropy,
            group_cotangents=groups,
            gradients=found,
            threads=threads,
        )
        return {
            name: gradient.sum_to_size(cotangents.count, *leaves_of(inputs)[name].shape)
            for name, gradient in found.items()
        }

    return call


def _group_ids(inputs: Inputs) -> Tensor:
    """As the library takes them."""
    assert inputs.groups is not None
    return inputs.groups[:, None].int()


def backward_arguments(inputs: Inputs, cotangents: Cotangents) -> tuple[dict, dict, Tensor | None]:
    """What a backward takes: the call's own arguments, what the forward saved, and its row constants."""
    query, rows = inputs.query, inputs.query.shape[:3]
    scale = inputs.options.get("scale")
    common = {
        "attn_mask": inputs.options.get("attn_mask"),
        "is_causal": inputs.options.get("is_causal", False),
        "scale": default_scale(query.shape[-1]) if scale is None else scale,
        "gate": inputs.gate,
        "fill": inputs.fill[(None,) * (4 - inputs.fill.ndim)] if isinstance(inputs.fill, Tensor) else None,
        "temperature": inputs.temperature,
        "key_bias": inputs.key_bias,
        "key_scale": inputs.key_scale,
    }
    shape = (*rows, inputs.value.shape[3])
    output, attention = query.new_empty(shape), query.new_empty(shape)
    saved = {"row_max": torch.empty(rows), "log2_sum": torch.empty(rows)}
    specs: dict[str, cpu_structs.StatisticSpec] = {"entropy": "entropy"}
    widths: dict[str, tuple[int, ...]] = {}
    if inputs.groups is not None:
        specs["group_mass"] = ("group_mass", (inputs.group_count,), (_group_ids(inputs),))
        widths["group_mass"] = (inputs.group_count,)
    values = {name: torch.empty(*rows, *widths.get(name, ())) for name in specs}
    cpu_library.attention_forward(
        query,
        inputs.key,
        inputs.value,
        **common,
        statistics=list(specs.values()),
        output=output,
        statistic_outputs=list(values.values()),
        attention=None if inputs.gate is None else attention,
        **saved,
    )
    saved["attention"] = output if inputs.gate is None else attention
    constants = []
    if cotangents.entropy is not None:
        constants.append(cotangents.entropy * values["entropy"])
    if cotangents.logsumexp is not None:
        constants.append(-cotangents.logsumexp)
    if cotangents.group_mass is not None:
        constants.append((cotangents.group_mass * values["group_mass"]).sum(-1))
    return common, saved, torch.stack(constants).sum(0) if constants else None
