"""The attention sites of a denoiser, and which of them headscope can see.

A site is an attention module of the denoiser: one whose forward, or whose processor, reaches torch's
scaled_dot_product_attention. That is read from its code; no class of diffusers is known by name.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any, Literal, cast

from torch import nn

from headscope.models.structure.order import execution_order
from headscope.models.structure.source import source_tree

# what code calls when its attention can be seen
VISIBLE_CALLS = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn", "multi_head_attention_forward"})
# what code calls in transformers' models, whose configuration says which implementation that is
_TRANSFORMERS_CALLS = frozenset({"ALL_ATTENTION_FUNCTIONS"})
# names that diffusers gives to the tokens of the prompt
_TEXT_WORDS = ("encoder", "text", "txt", "context", "prompt", "caption")
_HEAD_COUNTS = ("heads", "num_heads", "num_attention_heads", "n_heads")

Kind = Literal["self", "cross", "joint"]


@dataclass(frozen=True)
class Site:
    """One attention module of the denoiser.

    Attributes:
        name: its module path, as in `model.named_modules()`.
        kind: "self", "cross" (keys from the conditioning) or "joint" (image and text in one sequence).
        heads: the number of heads.
        head_dim: the dim of a head; 0 where the module does not say.
        text_first: whether the text comes before the image in a sequence of both; None where its code does not say.
    """

    name: str
    kind: Kind
    heads: int
    head_dim: int
    text_first: bool | None = None


@dataclass(frozen=True)
class Unseen:
    """An attention module whose attention headscope can't see, and why."""

    name: str
    reason: str


def find_denoiser(pipeline_or_model: Any) -> nn.Module:
    """The module itself, or the unet or transformer of a pipeline.

    Raises:
        TypeError: neither a module nor something with one.
        ValueError: a DataParallel over several GPUs.
    """
    if isinstance(pipeline_or_model, nn.Module):
        return _unwrapped(pipeline_or_model)
    for attribute in ("unet", "transformer"):
        module = getattr(pipeline_or_model, attribute, None)
        if isinstance(module, nn.Module):
            return _unwrapped(module)
    raise TypeError(
        f"pipeline_or_model: got {type(pipeline_or_model).__name__}, expected a torch module or a pipeline with a"
        " unet or transformer"
    )


def other_denoisers(pipeline: Any, denoiser: nn.Module) -> list[str]:
    """A pipeline's further models of the denoiser's class, by name: some have one for noise and one for details."""
    unwrapped = {name: getattr(model, "_orig_mod", model) for name, model in getattr(pipeline, "__dict__", {}).items()}
    return [name for name, model in unwrapped.items() if type(model) is type(denoiser) and model is not denoiser]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The denoiser inside the wrapper of PEFT or data parallelism, which passes its arguments on unnamed."""
    while True:
        base_of_peft = getattr(module, "get_base_model", None)
        if callable(base_of_peft):
            module = cast(nn.Module, base_of_peft())
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
                raise ValueError(
                    f"model: got a DataParallel over {len(module.device_ids)} GPUs, which runs copies of the model that"
                    " nobody else sees; expected its .module, with a process for each GPU"
                )
            module = module.module
        else:
            return module


def find_sites(denoiser: nn.Module) -> tuple[list[Site], list[Unseen]]:
    """Every attention module; those that can be seen in the order in which a forward reaches them."""
    sites, unseen = [], []
    spread = getattr(denoiser, "_parallel_config", None) is not None
    for name, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        is_attention = processor is not None and any(hasattr(module, attribute) for attribute in _HEAD_COUNTS)
        of_transformers = not is_attention and not _TRANSFORMERS_CALLS.isdisjoint(_own_names(type(module).forward))
        if not is_attention and not of_transformers and not _sees(type(module).forward, type(module)):
            continue
        if is_attention:
            reason = _hidden(processor)
        else:
            reason = _hidden_in_transformers(module) if of_transformers else _mixing(module)
        if spread:
            reason = f"{type(denoiser).__name__} is spread over processes, each of which sees a part of its attention"
        if reason:
            unseen.append(Unseen(name, reason))
            continue
        text_first = _text_first(denoiser, name)
        parent = denoiser.get_submodule(name.rpartition(".")[0])
        heads = _heads(module, parent)
        sites.append(Site(name, _kind(module, parent, text_first), heads, _inner_dim(module) // heads, text_first))
    by_name = {site.name: site for site in sites}
    return [by_name[name] for name in execution_order(denoiser, list(by_name))], unseen


def _hidden(processor: object) -> str | None:
    """The reason why the attention of a module with this processor can't be seen, or None."""
    if getattr(processor, "sees_attention", False):
        return None
    if not _sees(type(processor).__call__, type(processor)):
        return f"{type(processor).__name__} doesn't call torch's scaled_dot_product_attention"
    if _always_flex(inspect.unwrap(type(processor).__call__)):
        return f"{type(processor).__name__} always uses flex attention, not torch's scaled_dot_product_attention"
    backend = getattr(processor, "_attention_backend", None)
    if backend is None or str(getattr(backend, "value", backend)) in ("native", "_native_math"):
        return None
    return f"{type(processor).__name__} uses the attention backend {backend}, not torch's"


def _hidden_in_transformers(module: nn.Module) -> str | None:
    """The reason why the attention of a module of transformers can't be seen, or None."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation == "sdpa":
        return None
    return (
        f"{type(module).__name__} uses transformers' {implementation} attention, not torch's"
        ' scaled_dot_product_attention (attn_implementation="sdpa")'
    )


def _mixing(module: nn.Module) -> str | None:
    """The reason why the samples of a module's attention can't be told apart, or None."""
    # ControlNetUnion gives it samples first, and so attends from one sample to the next
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
        return "MultiheadAttention takes its tokens first (batch_first=False), and its samples can't be told from them"
    return None


def _own_names(function: Callable[..., Any]) -> frozenset[str]:
    """The names that a function's own code mentions."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset() if code is None else frozenset(_names(code))


@cache
def _sees(function: Callable[..., Any], owner: type | None, depth: int = 4) -> bool:
    """True if a function reaches attention by itself, its class's methods or its file's functions."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or depth == 0:
        return False
    names = set(_names(code))
    if names & VISIBLE_CALLS:
        return True
    for name in names:
        for candidate, of in ((getattr(owner, name, None), owner), (function.__globals__.get(name), None)):
            local = inspect.isfunction(candidate) and candidate.__module__ == function.__module__
            if local and _sees(candidate, of, depth - 1):
                return True
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _kind(module: nn.Module, parent: nn.Module, text_first: bool | None) -> Kind:
    def has(holder: nn.Module, projection: str) -> bool:
        return getattr(holder, projection, None) is not None

    if getattr(module, "is_cross_attention", False):
        return "cross"
    # a query of the text's own, or code that joins text and image, makes them one sequence
    if has(module, "add_q_proj"):
        return "joint"
    if has(module, "add_k_proj"):
        return "cross"
    # beside a joint attention of the same block, the other one sees the image alone
    if text_first is None or any(has(child, "add_q_proj") for child in parent.children()):
        return "self"
    return "joint"


def _heads(module: nn.Module, parent: nn.Module) -> int:
    """The heads that the module names, or its parent; else 1: code without heads attends with a single one."""
    for holder in (module, parent):
        for attribute in _HEAD_COUNTS:
            if isinstance(heads := getattr(holder, attribute, None), int) and heads > 0:
                return heads
    return 1


def _inner_dim(module: nn.Module) -> int:
    for attribute in ("inner_dim", "embed_dim", "dim", "channels"):
        if isinstance(dim := getattr(module, attribute, None), int):
            return dim
    projections = (getattr(module, name, None) for name in ("to_q", "q_proj", "q"))
    projection = next((found for found in projections if found is not None), None)
    # a linear layer's, or a convolution's, which may be wrapped for its padding
    projection = getattr(projection, "conv", projection)
    for attribute in ("out_features", "out_channels"):
        if isinstance(dim := getattr(projection, attribute, None), int):
            return dim
    return 0


def _text_first(denoiser: nn.Module, name: str) -> bool | None:
    """The order in which text and image are joined, by the module, else by the blocks that hold it."""
    module = denoiser.get_submodule(name)
    processor = getattr(module, "processor", None)
    functions = [type(processor).__call__] if processor is not None else []
    functions.append(type(module).forward)
    path = name.split(".")[:-1]
    parents = [denoiser.get_submodule(".".join(path[:length])) for length in range(len(path), -1, -1)]
    functions += [type(parent).forward for parent in parents]
    found = (_joined_text_first(inspect.unwrap(function)) for function in functions)
    return next((order for order in found if order is not None), None)


@cache
def _calls(function: Callable[..., Any]) -> tuple[ast.Call, ...]:
    """Every call in a function's source; none where there is no source."""
    return tuple(node for node in ast.walk(source_tree(function)) if isinstance(node, ast.Call))


def _always_flex(function: Callable[..., Any]) -> bool:
    """True if each of the function's attention calls asks diffusers' dispatcher for flex attention."""
    backends = [
        {getattr(keyword.value, "attr", None) for keyword in call.keywords if keyword.arg == "backend"}
        for call in _calls(function)
        if getattr(call.func, "id", None) in VISIBLE_CALLS
    ]
    return bool(backends) and all(backend == {"FLEX"} for backend in backends)


def _joined_text_first(function: Callable[..., Any]) -> bool | None:
    """True if the function joins text before image with torch.cat, False if after it; None where it joins none."""
    for node in _calls(function):
        if getattr(node.func, "attr", None) != "cat" or not node.args:
            continue
        if not isinstance(node.args[0], (ast.List, ast.Tuple)) or not _joins_tokens(node):
            continue
        # of one sample of it (query[i : i + 1]), too
        elements = [
            getattr(part, "value", part) if isinstance(part, ast.Subscript) else part for part in node.args[0].elts
        ]
        names = [getattr(element, "id", "") for element in elements]
        texts = [any(word in name for word in _TEXT_WORDS) for name in names]
        tokens = all(any(w in name for w in ("hidden_states", "query", "img", "txt", "text")) for name in names)
        if len(names) == 2 and tokens and texts[0] != texts[1]:
            return texts[0]
    return None


def _joins_tokens(call: ast.Call) -> bool:
    """True if torch.cat joins along the tokens' dimension (1, or 2 after the heads), not the batch or the channels."""
    dims = [keyword.value for keyword in call.keywords if keyword.arg == "dim"] + list(call.args[1:2])
    return bool(dims) and isinstance(dims[0], ast.Constant) and dims[0].value in (1, 2)
