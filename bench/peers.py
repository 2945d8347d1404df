"""The attention calls that benchmarks compare: headscope's, and its peers' on the same tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import headscope

# torch's own choice is the first; the others are named where they exist
STOCK = "SDPA"
OURS = "headscope, entropy + gate"
# with its logsumexp, the only statistic that it gives
FLEX = "FlexAttention"
SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def fastest_stock(times: Mapping[str, np.ndarray]) -> str:
    """The name of torch's own call that was fastest in the median."""
    return min((name for name in times if name.startswith(STOCK)), key=lambda name: np.median(times[name]))


@dataclass(frozen=True)
class Shape:
    """One attention problem: [batch, heads, queries, dim] against [batch, heads, keys, dim]."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    where: str

    def __str__(self) -> str:
        return f"({self.batch}, {self.heads}, {self.queries}, {self.keys}, {self.dim})"

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value laid out as models have them, heads beside channels; the same each time."""
        # where they are needed: the largest take a CPU seconds
        generator = torch.Generator(device).manual_seed(0)

        def normal(tokens: int) -> Tensor:
            drawn = torch.randn(self.batch, tokens, self.heads, self.dim, generator=generator, device=device)
            return drawn.to(dtype).transpose(1, 2)

        return normal(self.queries), normal(self.keys), normal(self.keys)

    def flops(self, backward: bool) -> int:
        """Multiplications and additions of the matrix products: two forward, and five backward, as is customary."""
        return (10 if backward else 4) * self.batch * self.heads * self.queries * self.keys * self.dim

    def bytes(self, element: int, backward: bool) -> int:
        """The bytes that must be read and written once: q, k, v and the output; backward also their gradients."""
        tokens = 2 * self.queries + 2 * self.keys
        return (2 if backward else 1) * self.batch * self.heads * tokens * self.dim * element


# heads x dim @ queries / keys of the models' attention calls, at a batch of two samples
MODELS = [
    Shape(2, 8, 4096, 4096, 40, "SD1.5 512 px"),
    Shape(2, 8, 1024, 1024, 80, "SD1.5 512 px"),
    Shape(2, 8, 256, 256, 160, "SD1.5 512 px"),
    Shape(2, 8, 4096, 77, 40, "SD1.5 512 px, cross"),
    Shape(2, 10, 2304, 2304, 64, "SD2.1 768 px"),
    Shape(2, 10, 4096, 4096, 64, "SDXL 1024 px"),
    Shape(2, 20, 1024, 1024, 64, "SDXL 1024 px"),
    Shape(2, 10, 4096, 77, 64, "SDXL 1024 px, cross"),
    Shape(8, 14, 1024, 1024, 32, "ldm-celebahq-256"),
    Shape(8, 1, 256, 256, 512, "ddpm-celebahq-256"),
    Shape(2, 24, 4429, 4429, 64, "SD3 1024 px"),
    Shape(2, 24, 4608, 4608, 128, "Flux 1024 px"),
]
SMALL_MODELS = [
    Shape(1, 8, 4096, 4096, 40, "SD1.5 512 px"),
    Shape(2, 8, 1024, 1024, 80, "SD1.5 512 px"),
    Shape(2, 10, 4096, 77, 64, "SDXL 1024 px, cross"),
    Shape(8, 4, 256, 256, 32, "bundled model"),
    Shape(8, 1, 256, 256, 512, "ddpm-celebahq-256"),
]


def lengths(device: str) -> list[Shape]:
    """A sweep over the number of tokens, 64 channels."""
    tokens = (128, 256, 512, 1024, 2048, 4096) if device == "cpu" else (256, 1024, 4096, 8192, 16384, 32768)
    return [Shape(1, 8, size, size, 64, "length") for size in tokens]


def truth(query: Tensor, key: Tensor, value: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
    """Output, entropy and logits of some rows of every head, in float64."""
    logits = query[:, :, rows].double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    log = logits.log_softmax(-1)
    return log.exp() @ value.double(), -(log.exp() * log).sum(-1), logits


def materialised(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output and entropy from the stored matrix, as a hook would compute them."""
    probabilities = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    entropy = -(probabilities * probabilities.clamp_min(torch.finfo(query.dtype).tiny).log()).sum(-1)
    return probabilities @ value, entropy


def two_calls(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """H = logsumexp - scale * q . (P K) takes a second attention, over the keys; public SDPA returns no logsumexp, so
    this is the work of it without its first term."""
    output = functional.scaled_dot_product_attention(query, key, value)
    expected_key = functional.scaled_dot_product_attention(query, key, key)
    return output, -(query * expected_key).sum(-1) * query.shape[-1] ** -0.5


@cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # once for each shape of a run, forward and backward: past the limit it would run uncompiled, unfused
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def _flex_forward(query: Tensor, key: Tensor, value: Tensor) -> object:
    from torch.nn.attention.flex_attention import AuxRequest

    # on a CPU the compiled one can't return it
    return _flex()(query, key, value, return_aux=AuxRequest(lse=True) if query.is_cuda else None)


def forwards(
    query: Tensor, key: Tensor, value: Tensor, *, flex: bool, only: tuple[str, ...] | None = None
) -> dict[str, Callable[[], object]]:
    """Every contender's forward, or those of `only`. Those that can't take these tensors are left out."""
    edit = headscope.HeadEdit(torch.ones(query.shape[:2], device=query.device))

    def stock() -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value)

    calls: dict[str, Callable[[], object]] = {
        STOCK: stock,
        OURS: lambda: headscope.attention(query, key, value, statistics=["entropy"], edit=edit)[:2],
        "headscope, output only": lambda: headscope.attention(query, key, value).output,
        "two SDPA calls": lambda: two_calls(query, key, value),
    }
    if query.is_cuda:
        for name, backend in SDPA_BACKENDS.items():
            calls[name] = _with_backend(stock, backend)
    if flex:
        calls[FLEX] = lambda: _flex_forward(query, key, value)
    matrix = query.element_size() * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    # four of them live at once
    if 4 * matrix <= 24 * 2**30:
        calls["materialised"] = lambda: materialised(query, key, value)
    chosen = {name: call for name, call in calls.items() if only is None or name in only}
    return {name: call for name, call in chosen.items() if _works(name, call)}


def _with_backend(call: Callable[[], Tensor], backend: SDPBackend) -> Callable[[], object]:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return call()

    return run


def _works(name: str, call: Callable[[], object]) -> bool:
    try:
        call()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if name.startswith("headscope") or name == STOCK:
            raise
        print(f"  {name} is left out: {str(error).splitlines()[0][:100]}")
        return False
    return True


def backwards(query: Tensor, key: Tensor, value: Tensor, *, flex: bool) -> dict[str, Callable[[], object]]:
    """Every contender's backward alone: gradients of query, key and value, and of the gate where there is one.

    headscope's starts from the output and the entropy together.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    gate = torch.ones(query.shape[:2], device=query.device, requires_grad=True)
    with torch.enable_grad():
        stock = functional.scaled_dot_product_attention(*leaves)
        ours = headscope.attention(*leaves, statistics=["entropy"], edit=headscope.HeadEdit(gate))
        outputs: dict[str, tuple[list[Tensor], list[Tensor]]] = {
            STOCK: ([stock], leaves),
            OURS: ([ours.output, ours.statistics["entropy"]], [*leaves, gate]),
        }
        if query.is_cuda:
            outputs["headscope, output only"] = ([headscope.attention(*leaves).output], leaves)
            for name, backend in SDPA_BACKENDS.items():
                try:
                    with sdpa_kernel(backend):
                        outputs[name] = ([functional.scaled_dot_product_attention(*leaves)], leaves)
                except RuntimeError:
                    continue
        if flex and query.is_cuda:
            outputs[FLEX] = ([_flex()(*leaves)], leaves)
        matrix = query.element_size() * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        if 8 * matrix <= 24 * 2**30:
            outputs["materialised"] = (list(materialised(*leaves)), leaves)
    return {name: _gradients(results, inputs) for name, (results, inputs) in outputs.items()}


def _gradients(results: list[Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    cotangents = [torch.ones_like(result) for result in results]
    return lambda: torch.autograd.grad(results, inputs, cotangents, retain_graph=True)
