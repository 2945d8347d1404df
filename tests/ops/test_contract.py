"""Every backend keeps the numeric contract on every case."""

import math

import pytest
import torch

from contract import CASES, ROW_STATISTICS, assert_close, gives, make_inputs, statistic_tolerance, truth
from headscope.ops import STATISTICS, GroupEntropy, HeadEdit, attention, cpu_structs
from headscope.ops.statistics import CLASSES
from ops.backends import require_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_contract(backend, case, dtype):
    require_backend(backend)
    inputs = make_inputs(case, DTYPES[dtype])
    expected = truth(inputs)
    result = inputs.attend(backend)
    assert result.output.dtype == inputs.query.dtype
    assert_close("output", result.output, expected.output, expected.output_tolerance)
    for name, rows in result.statistics.items():
        assert rows.dtype == torch.float32
        assert_close(name, rows, expected.statistics[name], statistic_tolerance(expected, name))


def test_the_contract_has_every_built_in_statistic():
    """Each has its definition in float64; the fused backends give at least those of csrc."""
    built_in = {key for key, kind in CLASSES.items() if kind.__module__.startswith("headscope.")}
    assert built_in == {*truth(make_inputs(CASES[0], torch.float32)).statistics}
    asked = {*ROW_STATISTICS, "key_mass"}
    assert asked == built_in & STATISTICS.keys()
    for backend in ("cpu", "triton"):
        require_backend(backend)
        assert {name for name in asked if gives(backend, name)} >= asked.intersection(cpu_structs.STATISTICS)


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_output_alone_equals_output_with_statistics(backend):
    """A removed head is skipped without statistics, and comes out the same."""
    require_backend(backend)
    for case in CASES:
        inputs = make_inputs(case, torch.float32)
        call = {"edit": inputs.edit(), "backend": backend, **inputs.options}
        alone = attention(inputs.query, inputs.key, inputs.value, **call).output
        both = attention(inputs.query, inputs.key, inputs.value, statistics=["entropy"], **call).output
        assert torch.equal(alone.nan_to_num(7.0), both.nan_to_num(7.0)), case.name


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_float64_inputs_keep_their_precision(backend):
    inputs = make_inputs(CASES[0], torch.float64)
    expected = truth(inputs)
    result = attention(inputs.query, inputs.key, inputs.value, statistics=inputs.statistics(), backend=backend)
    assert_close("output", result.output, expected.output, 1e-13)
    for name, rows in result.statistics.items():
        assert rows.dtype == torch.float64
        assert_close(name, rows, expected.statistics[name], 1e-12)


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_known_entropies(backend):
    """A constant row has entropy ln keys, a one-hot row 0."""
    require_backend(backend)
    keys = torch.eye(16).expand(1, 1, 16, 16)
    query = torch.stack([torch.zeros(16), 1e4 * torch.eye(16)[3]]).expand(1, 1, 2, 16)
    result = attention(query, keys, keys, scale=1.0, statistics=["entropy", "max_prob"], backend=backend)
    assert result.statistics["entropy"][0, 0].tolist() == pytest.approx([2.772588722239781, 0.0], abs=1e-6)
    assert result.statistics["max_prob"][0, 0].tolist() == pytest.approx([1 / 16, 1.0], abs=1e-7)


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_entropies_of_faint_groups(backend):
    """Right at 2^-87 of the row's largest weight, 0 where float32 has no digits left, and never below 0."""
    require_backend(backend)
    key = torch.tensor([0.0, -60.0, -60.0, -90.0, -90.5, -70.1])[None, None, :, None]
    groups = torch.tensor([0, 1, 1, 2, 2, 3])
    statistics = [GroupEntropy(groups, 4)]
    result = attention(torch.ones(1, 1, 1, 1), key, key, scale=1.0, statistics=statistics, backend=backend)
    found = result.statistics["group_entropy"][0, 0, 0].tolist()
    assert found[1] == pytest.approx(math.log(2), abs=3e-5)
    assert found[0] == found[2] == 0.0
    assert 0.0 <= found[3] < 3e-5


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu", "triton"])
def test_gate_selects_instead_of_multiplying(backend):
    """NaN in a removed head stays out; NaN in the fill of a kept head stays out."""
    require_backend(backend)
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    value[:, 0] = torch.nan
    fill = torch.randn(1, 2, 5, 8)
    fill[:, 1] = torch.nan
    edit = HeadEdit(torch.tensor([[0.0, 1.0]]), fill)
    output = attention(query, key, value, edit=edit, backend=backend).output
    assert torch.equal(output[:, 0], fill[:, 0])
    assert output.isfinite().all()


@pytest.mark.parametrize("backend", ["portable", "cpu", "triton"])
def test_output_keeps_the_query_layout(backend):
    """`transpose(1, 2).flatten(2)` stays a view, as with torch's SDPA."""
    require_backend(backend)
    query, key, value = (torch.randn(2, 7, 3, 16).transpose(1, 2) for _ in range(3))
    output = attention(query, key, value, backend=backend).output
    assert output.stride() == query.stride()
    assert output.transpose(1, 2).flatten(2).data_ptr() == output.data_ptr()
