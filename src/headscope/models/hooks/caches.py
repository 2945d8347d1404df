"""Parts of a denoiser that a hook of diffusers leaves out: attention or blocks taken from a cache, layers skipped.

Such a hook decides, call by call, whether the forward beneath it runs. Both ends of a module's chain of hooks are
counted here: where it was entered more often than what is beneath it ran, something was left out. No hook is known by
name, save for the one that halves the batch.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headscope.models.hooks.forwards import Forward
from headscope.models.hooks.routing import HOOKED
from headscope.models.structure.layout import Geometry

# the attribute in which diffusers holds a module's hooks
_REGISTRY = "_diffusers_hook"


class Reused(NamedTuple):
    """A site that a forward ran without: its attention was taken from a cache, or skipped with its layer.

    Attributes:
        site: its name.
        step: as in the table.
        branch: the guidance branch that went without; None where there is no guidance.
    """

    site: str
    step: int
    branch: str | None


class Missing(NamedTuple):
    """A site's attention in a guidance branch that a forward went without.

    Attributes:
        cache: the hook that had something of an earlier forward in its place; None where a layer was skipped.
    """

    site: str
    branch: str | None
    cache: str | None


class _Hooked:
    """A module whose hooks may leave it out, counted until `restore`.

    Args:
        beneath: told of the arguments with which the module itself runs, where there is somebody to tell.

    Attributes:
        entered: how often the module was called in this forward.
        ran: how often what is beneath its hooks ran.
    """

    def __init__(self, module: nn.Module, beneath: Callable[[tuple, dict], None] | None) -> None:
        self.module = module
        self.entered = 0
        self.ran = 0
        self._references: tuple[Any, ...] = tuple(_references(module))
        outermost, innermost = self._references[-1], self._references[0]
        self._stock_name = "forward" if innermost.original_forward is None else "original_forward"
        self._arrive = outermost.pre_forward
        self._stock = getattr(innermost, self._stock_name)

        def arrived(*args, **kwargs):
            self.entered += 1
            return self._arrive(*args, **kwargs)

        def counted(*args, **kwargs):
            self.ran += 1
            if beneath is not None:
                beneath(args, kwargs)
            return self._stock(*args, **kwargs)

        self._arrived, self._counted = arrived, functools.update_wrapper(counted, self._stock)
        outermost.pre_forward = arrived
        setattr(innermost, self._stock_name, self._counted)
        # past nn.Module's own __setattr__
        module.__dict__[HOOKED] = self

    @property
    def left_out(self) -> bool:
        return self.entered > self.ran

    @property
    def hooks(self) -> list[Any]:
        return list(getattr(self.module, _REGISTRY).hooks.values())

    @property
    def current(self) -> bool:
        """True if the hooks are those that were there when counting began."""
        return self._references == tuple(_references(self.module))

    def restore(self) -> None:
        # hooks that were removed meanwhile have left their part of the chain to others, or to the module
        for reference in {id(one): one for one in (*self._references, *_references(self.module))}.values():
            for name in ("forward", "original_forward"):
                if getattr(reference, name) is self._counted:
                    setattr(reference, name, self._stock)
            if reference.pre_forward is self._arrived:
                reference.pre_forward = self._arrive
        self.module.__dict__.pop(HOOKED, None)
        if self.module.__dict__.get("forward") is self._counted:
            self.module.__dict__["forward"] = self._stock


class HookWatch:
    """The hooks of diffusers in a denoiser, while a Scope is active on it.

    Guiders attach and remove theirs between forwards, so they are looked for at the begin of each.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._modules = list(denoiser.named_modules())
        self._hooked: dict[str, _Hooked] = {}
        # sites that attended in an earlier forward
        self._seen: set[str] = set()
        self._left_branches: tuple[str | None, ...] = ()
        self._arguments: Mapping[str, Any] = {}
        self._forward: Forward | None = None
        self._named: Callable[[tuple, dict], Mapping[str, Any]] | None = None

    def begin(
        self, forward: Forward, arguments: Mapping[str, Any], named: Callable[[tuple, dict], Mapping[str, Any]]
    ) -> None:
        """A forward begins: count anew.

        Args:
            arguments: those of the denoiser, by name.
            named: gives them by name.
        """
        self._forward, self._arguments, self._named = forward, arguments, named
        self._left_branches = ()
        for name, hooked in list(self._hooked.items()):
            if not hooked.current:
                hooked.restore()
                del self._hooked[name]
        for name, module in self._modules:
            if _REGISTRY not in module.__dict__:
                continue
            if name not in self._hooked and _may_leave_out(module):
                self._hooked[name] = _Hooked(module, None if name else self._narrow)
            if name in self._hooked:
                self._hooked[name].entered = self._hooked[name].ran = 0
        halves = any(_halves_the_batch(hook) for hook in self._whole)
        if halves and forward.branches == (None,) and forward.batch % 2 == 0:
            # it takes the first half for the one without the prompt, whoever called the denoiser
            forward.branches = ("uncond", "cond")

    def remove(self) -> None:
        """Leave the hooks as they were."""
        for hooked in self._hooked.values():
            hooked.restore()
        self._hooked.clear()
        self._forward = None
        self._arguments = {}

    def missing(self, forward: Forward, sites: Iterable[str]) -> list[Missing]:
        """The sites, by branch, that the forward that ends went without."""
        found: list[Missing] = []
        cache = _cache_among(self._whole)
        for site in sites:
            above = [hooked for hooked in self._above(site) if hooked.left_out]
            if above:
                hooks = [hook for hooked in above for hook in hooked.hooks]
                found += [Missing(site, branch, _cache_among(hooks)) for branch in forward.branches]
            # the model was told to go without, or a hook of the whole model's has replaced one of its methods
            elif site not in forward.calls and site in self._seen:
                found += [Missing(site, branch, cache) for branch in forward.branches]
            found += [Missing(site, branch, cache) for branch in self._left_branches]
        self._seen.update(forward.calls)
        return found

    def _above(self, site: str) -> Iterator[_Hooked]:
        """The hooked modules that hold the site, itself included; the whole denoiser apart."""
        for name, hooked in self._hooked.items():
            if name and (site == name or site.startswith(f"{name}.")):
                yield hooked

    @property
    def _whole(self) -> list[Any]:
        """The hooks of the whole denoiser."""
        registry = self._denoiser.__dict__.get(_REGISTRY)
        return [] if registry is None else list(registry.hooks.values())

    # reads where tensors lie in memory
    @torch.compiler.disable
    def _narrow(self, args: tuple, kwargs: dict) -> None:
        """Narrow the forward to the part of the batch that the denoiser itself runs on.

        Raises:
            RuntimeError: it can't be told which part.
        """
        assert self._forward is not None
        assert self._named is not None
        forward, arguments = self._forward, self._named(args, kwargs)
        given, taken = _first_tensor(self._arguments), _first_tensor(arguments)
        if given is None or taken is None or given.shape[:1] == taken.shape[:1]:
            return
        first, count, samples = _place(given, taken), taken.shape[0], forward.samples
        if first is None or first % samples or count % samples:
            hooks = " and ".join(type(hook).__qualname__ for hook in self._whole)
            raise RuntimeError(
                f"{hooks} runs the model on {count} of the {given.shape[0]} samples that it was given, expected whole"
                f" guidance branches out of {list(forward.branches)}"
            )
        parts = slice(first // samples, (first + count) // samples)
        ran = forward.branches[parts]
        self._left_branches = forward.branches[: parts.start] + forward.branches[parts.stop :]
        forward.branches = ran
        forward.geometry = Geometry.of(self._denoiser, arguments)
        if forward.timestep.numel() == given.shape[0]:
            forward.timestep = forward.timestep[first : first + count]


def _references(module: nn.Module) -> list[Any]:
    """The links of a module's chain of hooks, innermost first."""
    return list(module.__dict__[_REGISTRY]._fn_refs)


def _may_leave_out(module: nn.Module) -> bool:
    """True if one of its hooks runs in place of the forward, and may not call it."""
    return any(hasattr(hook, "new_forward") for hook in module.__dict__[_REGISTRY].hooks.values())


def _cache_among(hooks: Iterable[Any]) -> str | None:
    """The name of the hook that caches something of earlier forwards; None where a layer was skipped without one."""
    for hook in hooks:
        if getattr(hook, "_is_stateful", False) or hasattr(hook, "state_manager"):
            return f"{type(hook).__module__}.{type(hook).__qualname__}"
    return None


def _halves_the_batch(hook: Any) -> bool:
    """True for FasterCache, which estimates the branch without the prompt from the other one."""
    return type(hook).__name__ == "FasterCacheDenoiserHook" and not hook.is_guidance_distilled


def _first_tensor(arguments: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in arguments.values() if isinstance(value, Tensor) and value.ndim), None)


def _place(whole: Tensor, part: Tensor) -> int | None:
    """The first of the rows of `whole` that `part` is a view of; None where it is none."""
    if whole.untyped_storage().data_ptr() != part.untyped_storage().data_ptr() or whole.stride() != part.stride():
        return None
    row, rest = divmod(part.storage_offset() - whole.storage_offset(), whole.stride(0))
    return row if rest == 0 and row >= 0 and row + part.shape[0] <= whole.shape[0] else None
