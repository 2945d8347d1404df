"""Layers that gradients of head gates pass through, and end in no weight of.

Where several backwards follow one forward, what such a layer does to gradients is the same in each of them. And x86
builds of torch leave float32 matrix products to MKL, which goes without AVX-512 where the processor isn't Intel's;
oneDNN, in the same builds, takes it there as well (bench/NOTES.md has how fast both were).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd import forward_ad

from headscope._shapes import Float
from headscope.models.hooks.overrides import acting_modes
from headscope.ops.call import autocasts
from headscope.ops.ordinary import Bystander, looks

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class PassingGradients(Bystander):
    """Inside, linear layers and GELU give gradients of their input and of nothing else, in less time.

    Results are torch's to rounding. It acts on ordinary float32 tensors on x86 CPUs; not inside of another torch
    function mode, which would miss the calls that are replaced, nor where hooks look at what is saved for the backward:
    gradient checkpointing expects the same when it runs a layer again.
    """

    def __init__(self) -> None:
        super().__init__()
        built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
        self._acts = built and torch.backends.mkldnn.enabled and _is_as_expected() and not acting_modes()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        acts = self._acts and not torch.compiler.is_compiling()
        chosen = _REPLACED.get(func, func) if acts else func
        return chosen(*args, **(kwargs or {}))


@cache
def _is_as_expected() -> bool:
    """True if this torch's private operator takes what it is given here, and is a linear layer."""
    input, weight, bias = torch.ones(2, 3), torch.arange(12.0).reshape(4, 3), torch.arange(4.0)
    try:
        return torch.equal(_product(input, weight, bias), input @ weight.t() + bias)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    parameters = [weight] if bias is None else [weight, bias]
    fits = (
        _ordinary(input, *parameters)
        and input.ndim > 1
        and weight.shape[1:] == input.shape[-1:]
        # oneDNN has no description for some others
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and (bias is None or bias.shape == weight.shape[:1])
        # a weight that is computed may depend on what gradients are asked of
        and all(parameter.grad_fn is None for parameter in parameters)
    )
    return _Linear.apply(input, weight, bias) if fits else functional.linear(input, weight, bias)


def _gelu(input: Any, approximate: str = "none") -> Any:
    fits = _ordinary(input) and input.requires_grad
    return _Gelu.apply(input, approximate) if fits else functional.gelu(input, approximate=approximate)


# by torch's function, what stands in its place
_REPLACED = {functional.linear: _linear, functional.gelu: _gelu}


def _ordinary(*tensors: Any) -> bool:
    """True if these are ordinary tensors in float32 on a CPU, and neither autocast nor hooks of saved tensors act.

    Nor forward-mode gradients; and none was made in inference mode, which can't be saved for a backward.
    """
    if looks(tensors) is None or autocasts(tensors[0].device) or _top_hooks(False) is not None:
        return False
    if forward_ad._current_level >= 0 or any(tensor.is_inference() for tensor in tensors):
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() for t in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Float[Tensor, "..."], weight: Float[Tensor, "out dim"], bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: the operator has no gradient of its own
            return grad @ weight, None, None
        return _product(grad, weight.t(), None), None, None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch.compile's own for linear layers in float32; whatever a bias's strides, it reads it as a contiguous one
    bias = None if bias is None else bias.contiguous()
    rows = torch.ops.mkldnn._linear_pointwise(input.reshape(-1, input.shape[-1]), weight, bias, "none", [], "")
    # not a view to autograd, which would forbid changes in place of what an autograd.Function gives
    return torch.ops.aten._unsafe_view(rows, (*input.shape[:-1], weight.shape[0]))


class _Gelu(torch.autograd.Function):
    """It saves its derivative in the place of its input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, approximate: str) -> Tensor:
        ones = torch.ones_like(input)
        ctx.save_for_backward(torch.ops.aten.gelu_backward(ones, input, approximate=approximate))
        return functional.gelu(input, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (derivative,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: the derivative would quietly come out as a constant
            raise RuntimeError(
                "GELU inside of Scope.attribute: got a backward with create_graph=True, expected one without: its"
                " gradients can't be differentiated again"
            )
        return grad * derivative, None
