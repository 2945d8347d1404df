"""The kernels' signatures against the description of their argument lists."""

from typing import Any

import pytest

from headscope_kernels.attention.arguments import DESCRIBED, OPERANDS
from headscope_kernels.attention.backward.passes import KEY_VALUE, MASK, QUERY, ROW_TERMS
from headscope_kernels.attention.forward.kernel import attention_forward_kernel
from headscope_kernels.attention.key_mass import attention_key_mass_kernel

GRADIENTS = [launches.kernel for launches in (KEY_VALUE, QUERY, MASK)]
KERNELS = [attention_forward_kernel, attention_key_mass_kernel, ROW_TERMS.kernel, *GRADIENTS]
named = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)


def operands(kernel: Any, ending: str) -> list[str]:
    """The operands that a kernel has a parameter of this ending for, in its order."""
    names = [name.removesuffix(ending) for name in kernel.arg_names if name.endswith(ending)]
    return [name for name in names if name in OPERANDS]


@named
def test_operands_come_with_their_strides(kernel: Any):
    pointers = operands(kernel, "_ptr")
    if kernel is attention_key_mass_kernel:
        # its sums are contiguous
        pointers.remove("output")
    assert operands(kernel, "_strides") == pointers
    assert "STRIDE_UNIT" in kernel.arg_names


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[1], *GRADIENTS], ids=lambda kernel: kernel.__name__)
def test_operands_come_in_the_order_of_the_description(kernel: Any):
    """The kernel of whole rows apart, whose list is short."""
    pointers = operands(kernel, "_ptr")
    assert pointers == [name for name in OPERANDS if name in pointers]


@named
def test_descriptors_belong_to_a_pointer(kernel: Any):
    descriptors = {name for name in kernel.arg_names if name.endswith("_descriptor")}
    assert descriptors <= DESCRIBED.keys()
    assert {DESCRIBED[name] for name in descriptors} <= set(kernel.arg_names)
    # a tail for each
    assert {name.removesuffix("_descriptor") + "_tail_descriptor" for name in descriptors if "_tail" not in name} == {
        name for name in descriptors if "_tail" in name
    }
