"""The tolerance of outputs holds whatever order float32 sums in, and is passed by errors that aren't roundings."""

import math

import pytest
import torch

from contract import CASES, make_inputs, truth

FLOAT32 = {case.name: make_inputs(case, torch.float32) for case in CASES if case.name in ("odd", "dim_320", "dim_512")}


def _products(first: torch.Tensor, second: torch.Tensor, order: str) -> torch.Tensor:
    """first [..., rows, terms] . second [..., terms, columns] in float32, one rounding after each of its operations."""
    terms = first[..., :, :, None] * second[..., None, :, :]
    if order == "shuffled":
        terms = terms[..., torch.randperm(terms.shape[-2], generator=torch.Generator().manual_seed(0)), :]
    if order == "pairs":
        while terms.shape[-2] > 1:
            half = terms.shape[-2] // 2
            rest = terms[..., 2 * half :, :]
            terms = torch.cat([terms[..., :half, :] + terms[..., half : 2 * half, :], rest], -2)
        return terms[..., 0, :]
    total = torch.zeros_like(terms[..., 0, :])
    for index in range(terms.shape[-2]):
        total = total + terms[..., index, :]
    return total


def _worst(name: str, output: torch.Tensor) -> float:
    """The output's largest error over its tolerance."""
    expected = truth(FLOAT32[name])
    return float(((output.double() - expected.output).abs() / expected.output_tolerance).max())


@pytest.mark.parametrize("order", ["as they come", "shuffled", "pairs"])
@pytest.mark.parametrize("name", FLOAT32)
def test_any_order_of_summation(name: str, order: str):
    inputs = FLOAT32[name]
    logits = _products(inputs.query * inputs.query.shape[-1] ** -0.5, inputs.key.mT, order)
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    normaliser = _products(powers, torch.ones(1, 1, powers.shape[-1], 1), order)
    assert _worst(name, _products(powers, inputs.value, order) / normaliser) < 1


@pytest.mark.parametrize("name", FLOAT32)
def test_what_is_no_rounding_is_found(name: str):
    inputs = FLOAT32[name]
    query, key, value = (tensor.double() for tensor in (inputs.query, inputs.key, inputs.value))
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    assert _worst(name, logits.softmax(-1) @ value) < 1e-3
    assert _worst(name, (logits * (1 + 1e-5)).softmax(-1) @ value) > 1.5
    # the key that weighs least over all queries
    least = int(logits.softmax(-1).sum((0, 1, 2)).argmin())
    assert _worst(name, logits.index_fill(-1, torch.tensor([least]), -math.inf).softmax(-1) @ value) > 100
    # and a single row without its faintest
    row = logits.clone()
    row[0, 0, 3, row[0, 0, 3].argmin()] = -math.inf
    assert _worst(name, row.softmax(-1) @ value) > 10
    assert _worst(name, logits.softmax(-1) @ value * (1 + 1e-5)) > 1.5
    # powers of half the precision
    assert _worst(name, logits.softmax(-1).bfloat16().double() @ value) > 10
