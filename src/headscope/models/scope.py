"""headscope.Scope: see and edit the attention heads of a diffusion model while it runs."""

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headscope.models import routing
from headscope.models.editing import ActiveEdit, Edits, Fill
from headscope.models.recording import HEAD_OUTPUT, Forward, Recording
from headscope.models.sites import Site, Unseen, find_sites
from headscope.ops import attention
from headscope.ops.statistics import requested_statistics

# denoisers that a Scope is recording or editing right now
_observed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()

# additive masks in diffusers forbid a key with -10000 or with the dtype's minimum
FORBIDDEN_LOGIT = -5000.0


class Scope:
    """The attention sites of a diffusers pipeline or model.

        scope = headscope.Scope(pipeline)
        with scope.record("entropy") as recording:
            pipeline("a red fox")
        recording.to_polars()

    Contexts nest. Leaving one restores the model and torch exactly, also after an exception.

    Attributes:
        denoiser: the module whose sites these are (the pipeline's unet or transformer).
        sites: what can be recorded and edited.
        unseen: attention modules that can't be, with the reason. Recording with unseen sites raises unless
            `sites=` leaves them out.

    Raises:
        TypeError: not a torch module, nor a pipeline with a unet or transformer.
        ValueError: the model has no attention site that can be seen.
    """

    def __init__(self, pipeline_or_model: Any) -> None:
        self._pipeline = None if isinstance(pipeline_or_model, nn.Module) else pipeline_or_model
        self.denoiser = find_denoiser(pipeline_or_model)
        self._signature = inspect.signature(type(self.denoiser).forward)
        self._recordings: list[tuple[Recording, frozenset[str]]] = []
        self._edits: list[ActiveEdit] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._contexts = 0
        self._forwards = 0
        self._forward: Forward | None = None
        self._calls: dict[str, int] = {}
        self.sites: tuple[Site, ...]
        self.unseen: tuple[Unseen, ...]
        self.refresh()
        if not self.sites:
            reasons = "".join(f"\n  {entry.name}: {entry.reason}" for entry in self.unseen)
            raise ValueError(f"{type(self.denoiser).__name__} has no attention site that can be seen{reasons}")

    def refresh(self) -> None:
        """Look at the model's processors again, after they were changed."""
        sites, unseen = find_sites(self.denoiser)
        self.sites, self.unseen = tuple(sites), tuple(unseen)

    def __repr__(self) -> str:
        heads = sum(site.heads for site in self.sites)
        return (
            f"Scope({type(self.denoiser).__name__}: {len(self.sites)} sites, {heads} heads, {len(self.unseen)} unseen)"
        )

    def site(self, name: str) -> Site:
        """The site of that name.

        Raises:
            KeyError: there is none, or it can't be seen.
        """
        for site in self.sites:
            if site.name == name:
                return site
        for entry in self.unseen:
            if entry.name == name:
                raise KeyError(f"site {name!r} can't be seen: {entry.reason}")
        raise KeyError(f"site: got {name!r}, expected one of {', '.join(site.name for site in self.sites)}")

    @contextmanager
    def record(
        self,
        *statistics: str,
        sites: Sequence[str] | None = None,
        reduce: str = "mean",
        into: Recording | None = None,
    ) -> Iterator[Recording]:
        """Record statistics of every attention call made inside the context.

        Args:
            statistics: names of row statistics (entropy, logsumexp, max_logit, max_prob), reduced over queries to
                their mean and standard deviation per sample and head; and "head_output", the attention output of
                each head, averaged over samples per (site, call, timestep, branch, query position).
            sites: names of the sites to record; all by default.
            reduce: "mean", the only reduction there is for head outputs.
            into: an earlier recording of the same statistics to go on with.

        Raises:
            ValueError: an unknown statistic or reduction, nothing to record, or unseen sites when all are asked for.
            KeyError: an unknown site.
            RuntimeError: the model is compiled, or another Scope is active on it.
        """
        self._look_again()
        rows = tuple(s.name for s in requested_statistics([name for name in statistics if name != HEAD_OUTPUT]))
        if not statistics:
            raise ValueError("statistics: got none, expected at least one name to record")
        if reduce != "mean":
            raise ValueError(f'reduce: got {reduce!r}, expected "mean"')
        joint = any(site.kind == "joint" for site in self.sites)
        recording = Recording(rows, HEAD_OUTPUT in statistics, "all" if joint else "image")
        if into is not None:
            if (into.statistics, into.records_head_output) != (recording.statistics, recording.records_head_output):
                raise ValueError(f"into: got {into!r}, expected a recording of {', '.join(statistics)}")
            recording = into
        entry = (recording, self._chosen(sites))
        with self._context(self._recordings, entry):
            yield recording

    @contextmanager
    def edit(
        self,
        edits: Edits | Sequence[Edits],
        *,
        fill: Fill = None,
        steps: range | None = None,
    ) -> Iterator[None]:
        """Edit heads in every forward made inside the context.

        Args:
            edits: {site name: heads to remove, or a HeadEdit}; or a sequence of such mappings, one per sample of
                the batch. Under classifier-free guidance they hit both branches.
            fill: what takes the place of heads given by number, or by a HeadEdit without a fill: None (zeros),
                "uniform", a tensor broadcastable to [batch, heads, queries, dim], or a Recording of "head_output"
                (its mean at the same site, timestep and branch).
            steps: the denoiser's forwards, counted from entering the context, in which the edit acts; all if None.

        Raises:
            KeyError: an unknown site, or one that can't be seen.
            ValueError: a head out of range, or a site that another active edit already edits.
            RuntimeError: the model is compiled, or another Scope is active on it.
        """
        self._look_again()
        active = ActiveEdit.build(edits, fill, steps, self)
        for other in self._edits:
            shared = sorted(active.sites & other.sites)
            if shared:
                raise ValueError(
                    f"edits: {shared[0]!r} is edited by an outer context already, expected one edit of a site"
                )
        with self._context(self._edits, active):
            yield

    def _look_again(self) -> None:
        """Processors may have been changed since the last context."""
        if self._contexts == 0:
            self.refresh()

    def _chosen(self, sites: Sequence[str] | None) -> frozenset[str]:
        if sites is not None:
            return frozenset(self.site(name).name for name in sites)
        if self.unseen:
            listed = "".join(f"\n  {entry.name}: {entry.reason}" for entry in self.unseen)
            raise ValueError(
                f"sites: {len(self.unseen)} of the model's sites can't be seen; name those to record{listed}"
            )
        return frozenset(site.name for site in self.sites)

    @contextmanager
    def _context(self, entries: list, entry: Any) -> Iterator[None]:
        """Keep the entry active, and the hooks in place while anything is."""
        if self._contexts == 0:
            self._attach()
        self._contexts += 1
        entries.append(entry)
        if isinstance(entry, ActiveEdit):
            entry.first_forward = self._forwards
        else:
            entry[0].first_forward = self._forwards
        try:
            yield
        finally:
            entries.remove(entry)
            self._contexts -= 1
            if self._contexts == 0:
                self._detach()

    def _attach(self) -> None:
        if self.denoiser in _observed:
            raise RuntimeError(
                "another Scope is active on this model, and each would hide attention from the other;"
                " use one Scope for both"
            )
        for module in self.denoiser.modules():
            if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
                raise RuntimeError(
                    "the model is compiled, and compiled code would not see the recording; use the model as it was"
                    " before torch.compile"
                )
        _observed.add(self.denoiser)
        self._forwards = 0
        modules = dict(self.denoiser.named_modules())
        self._hooks.append(self.denoiser.register_forward_pre_hook(self._begin_forward, with_kwargs=True))
        for site in self.sites:
            frame = _SiteFrame(self, site)
            self._hooks.append(modules[site.name].register_forward_pre_hook(frame.enter))
            self._hooks.append(modules[site.name].register_forward_hook(frame.leave, always_call=True))
        routing.install()

    def _detach(self) -> None:
        _observed.discard(self.denoiser)
        routing.uninstall()
        # torch skips the hooks that leave a module when Ctrl-C ends it
        routing.forget(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._forward = None

    def _begin_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = self._signature.bind_partial(module, *args, **kwargs).arguments
        sample = next(value for value in list(bound.values())[1:] if isinstance(value, Tensor))
        batch = sample.shape[0]
        timestep = torch.as_tensor(bound.get("timestep", torch.nan), device=sample.device)
        branches = guidance_branches(self._pipeline, batch)
        self._forward = Forward(self._forwards, timestep.detach().reshape(-1).expand(batch), branches)
        self._forwards += 1
        self._calls = {}


class _SiteFrame:
    """A site's attention module while it runs."""

    def __init__(self, scope: Scope, site: Site) -> None:
        self.scope = scope
        self.site = site
        self.seen = False

    def enter(self, module: nn.Module, args: tuple) -> None:
        self.seen = False
        routing.push(self)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Raises RuntimeError where the module ran and its attention did not come by."""
        routing.pop(self)
        name = self.site.name
        asked = any(name in sites for _, sites in self.scope._recordings) or any(
            name in edit.sites for edit in self.scope._edits
        )
        # after an exception in the module there is no output
        if asked and not self.seen and output is not None:
            raise RuntimeError(
                f"site {name!r} ran without torch's scaled_dot_product_attention, so nothing of it was recorded or"
                " edited; was its processor or diffusers' attention backend changed?"
            )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, stock: Callable[..., Tensor], **options: Any
    ) -> Tensor:
        self.seen = True
        scope, name = self.scope, self.site.name
        forward = scope._forward
        recordings = [recording for recording, sites in scope._recordings if name in sites]
        edits = [edit for edit in scope._edits if name in edit.sites and forward and edit.acts_in(forward)]
        if forward is None or not (recordings or edits):
            return stock(query, key, value, **options)
        if query.ndim != 4:
            raise ValueError(f"site {name!r} calls attention with {query.ndim} dimensions, expected 4")
        call = scope._calls.get(name, 0)
        scope._calls[name] = call + 1
        if options.pop("dropout_p"):
            raise ValueError(f"site {name!r} uses attention dropout; put the model in eval mode to record or edit it")
        edit = edits[0].at(name, call, forward, query) if edits else None
        wanted = dict.fromkeys(statistic for recording in recordings for statistic in recording.statistics)
        result = attention(query, key, value, edit=edit, statistics=tuple(wanted), **options)
        valid_keys = count_valid_keys(options["attn_mask"], options["is_causal"], query, key)
        for recording in recordings:
            if recording.statistics:
                values = {statistic: result.statistics[statistic] for statistic in recording.statistics}
                recording.add(forward, name, call, values, valid_keys, key.shape[2])
            if recording.records_head_output:
                recording.add_head_output(forward, name, call, result.output)
        return result.output


def find_denoiser(pipeline_or_model: Any) -> nn.Module:
    """The module itself, or the unet or transformer of a pipeline.

    Raises:
        TypeError: neither a module nor something with one.
    """
    if isinstance(pipeline_or_model, nn.Module):
        return pipeline_or_model
    for attribute in ("unet", "transformer"):
        module = getattr(pipeline_or_model, attribute, None)
        if isinstance(module, nn.Module):
            return module
    raise TypeError(
        f"pipeline_or_model: got {type(pipeline_or_model).__name__}, expected a torch module or a pipeline with a"
        " unet or transformer"
    )


def guidance_branches(pipeline: Any, batch: int) -> tuple[str | None, ...]:
    """The branch of each equal part of a denoiser's batch: (uncond, cond) under classifier-free guidance, else (None,).

    Told from the pipeline's own running call: its guidance property outlives the call, and some pipelines run the
    branches one after the other.

    Raises:
        RuntimeError: the batch has three parts or more, whose order isn't known.
    """
    if not getattr(pipeline, "do_classifier_free_guidance", False):
        return (None,)
    call = _running_call(pipeline)
    samples = call.get("batch_size")
    if not isinstance(samples, int) or samples < 1:
        return (None,)
    parts = batch // (samples * int(call.get("num_images_per_prompt") or 1))
    if parts > 2:
        raise RuntimeError(f"{type(pipeline).__name__} runs {parts} guidance branches at once, expected 1 or 2")
    return ("uncond", "cond") if parts == 2 else (None,)


def _running_call(pipeline: Any) -> dict[str, Any]:
    """The local variables of the pipeline's call that this thread is inside of; empty if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipeline:
            return frame.f_locals
        frame = frame.f_back
    return {}


def count_valid_keys(attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | int:
    """How many keys each row may see: an int, or broadcastable to [batch, heads, queries]."""
    keys = key.shape[2]
    if is_causal:
        return torch.arange(1, query.shape[2] + 1, device=query.device).clamp(max=keys)
    if attn_mask is None:
        return keys
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > FORBIDDEN_LOGIT
    return allowed.expand(*allowed.shape[:-1], keys).sum(-1)
