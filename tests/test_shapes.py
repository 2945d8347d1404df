"""The tests' checks of named dimensions are at work, and nobody else pays for them."""

import subprocess
import sys

import pytest
import torch

from headscope.ops import HeadEdit, attention, portable
from headscope.ops.edits import blend
from shapes import ShapeError


def test_a_wrong_shape_between_functions_is_an_error():
    """torch would broadcast a gate of one head over all of them."""
    with pytest.raises(ShapeError, match=r"edits.blend: gate: got torch.float32 \[1, 1\].* with batch=2, heads=3"):
        blend(torch.ones(2, 3, 5, 8), torch.ones(1, 1), None)


def test_a_wrong_shape_from_a_backend_is_an_error(monkeypatch):
    forward = portable.forward

    def transposed(call):
        output, values, saved = forward(call)
        return output, [value.transpose(0, 1) for value in values], saved

    monkeypatch.setattr(portable, "forward", transposed)
    query = torch.ones(2, 3, 5, 8)
    with pytest.raises(ShapeError, match=r"schema._forward: return: got a tuple, annotated .* with batch=2, heads=3"):
        attention(query, query, query, statistics=["entropy"], backend="portable")


def test_the_functions_own_errors_come_first():
    query = torch.ones(2, 3, 5, 8)
    with pytest.raises(ValueError, match=r"edit.gate: got shape \[1, 1\], expected \[2 or 1, 3\]"):
        attention(query, query, query, edit=HeadEdit(torch.ones(1, 1)))


UNCHECKED = """
import sys, torch
from headscope.ops.edits import blend

blend(torch.ones(2, 3, 5, 8), torch.ones(1, 1), None)
print(hasattr(blend, "__wrapped__"), "beartype" in sys.modules)
"""


def test_outside_of_the_tests_nothing_is_checked():
    printed = subprocess.run([sys.executable, "-c", UNCHECKED], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]


WITHOUT = """
import sys
sys.modules["jaxtyping"] = sys.modules["beartype"] = None
import torch
import headscope.models, headscope.sweep

query = torch.ones(1, 2, 5, 8)
result = headscope.attention(query, query, query, statistics=["entropy"], edit=headscope.HeadEdit(torch.ones(1, 2)))
print(tuple(result.statistics["entropy"].shape), headscope.HeadEdit.__annotations__["gate"])
"""


def test_users_need_no_jaxtyping():
    printed = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True).stdout
    assert printed.strip().splitlines()[-1] == (
        "(1, 2, 5) typing.Optional[typing.Annotated[torch.Tensor, '#batch heads']]"
    )
