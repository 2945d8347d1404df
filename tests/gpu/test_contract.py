"""The numeric contract on a GPU: every case of the operator's contract, larger ones, and their gradients."""

import dataclasses

import pytest
import torch

from contract import CASES, Case, assert_close, make_inputs, statistic_tolerance, truth
from gradients import COMPARABLE, gradients_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _larger(name: str, *shape: int, **changes) -> Case:
    return dataclasses.replace(CASES[0], name=name, shape=shape, **changes)


# tiles of the real configurations have to be filled, and overrun
LARGE = [
    _larger("self_attention_1000_40", 2, 8, 8, 1000, 1000, 40, 40),
    _larger("self_attention_517_64", 1, 10, 10, 517, 517, 64, 64),
    _larger("self_attention_333_80", 2, 8, 8, 333, 333, 80, 80),
    _larger("self_attention_300_128", 1, 24, 24, 300, 300, 128, 128),
    _larger("self_attention_257_160", 1, 8, 8, 257, 257, 160, 160),
    _larger("self_attention_200_256", 1, 4, 4, 200, 200, 256, 256),
    _larger("self_attention_150_512", 1, 2, 2, 150, 150, 512, 512),
    _larger("cross_attention_1000_77", 2, 10, 10, 1000, 77, 64, 64),
    _larger("grouped_400", 2, 8, 2, 400, 300, 64, 64),
    _larger("causal_700", 1, 4, 4, 700, 700, 64, 64, is_causal=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_contract(backend, case, dtype):
    inputs = make_inputs(case, DTYPES[dtype])
    expected = truth(inputs)
    result = inputs.to(DEVICE).attend(backend)
    assert_close("output", result.output.cpu(), expected.output, expected.output_tolerance)
    for name, rows in result.statistics.items():
        assert_close(name, rows.cpu(), expected.statistics[name], statistic_tolerance(expected, name))


@pytest.mark.parametrize("case", [*COMPARABLE, *LARGE], ids=lambda case: case.name)
def test_gradients_equal_the_reference(case: Case):
    inputs = make_inputs(case, torch.float32).to(DEVICE)
    expected = gradients_of(inputs, "reference")
    got = gradients_of(inputs, "triton")
    for name, gradient in expected.items():
        size = float(gradient.abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(
            got[name], gradient, rtol=0, atol=2e-5 * size + 1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_half_precision_gradients_err_as_torch_does(case: Case, dtype: str):
    """At most twice the error of torch's own backward at this dtype, plus rounding of the largest gradient."""
    inputs = make_inputs(case, DTYPES[dtype]).to(DEVICE)
    plain = dataclasses.replace(inputs, groups=None)
    exact = gradients_of(plain, "reference", statistics=False)
    ours = gradients_of(plain, "triton", statistics=False)
    stock = gradients_of(plain, "torch", statistics=False)
    for name in ("query", "key", "value"):
        error, allowed = ((found[name].double() - exact[name].double()).abs().max() for found in (ours, stock))
        floor = 2 * torch.finfo(DTYPES[dtype]).eps * exact[name].double().abs().max()
        assert error <= 2 * allowed + floor, name
