"""The reference backend: the formula on the whole matrix in float64. Slow; every other one is tested against it."""

import torch
from torch import Tensor

from headscope.ops.attend import attend
from headscope.ops.call import DIFFERENTIABLE, Call, Results


def forward(call: Call) -> Results:
    """Differentiable any number of times: every operation is torch's own."""
    tensors = {name: _double(getattr(call, name)) for name in DIFFERENTIABLE}
    output, values = attend(call._replace(**tensors))
    return call.empty_output().copy_(output), [value.to(call.statistic_dtype) for value in values], []


def _double(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.bool else tensor.double()
