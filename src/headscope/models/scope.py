"""headscope.Scope: see and edit the attention heads of a diffusion model while it runs."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from headscope.models import routing
from headscope.models.attribution import Attribution, attribute
from headscope.models.editing import ActiveEdit, Combined, Edits, Fill, combine
from headscope.models.forwards import Forward, begin_forward
from headscope.models.layout import layout_of
from headscope.models.recording import Recording
from headscope.models.sites import Site, Unseen, find_denoiser, find_sites
from headscope.models.tasks import Task, TaskItem
from headscope.models.tensors import QUANTITIES, Reduce
from headscope.models.wrapping import ForwardWrap
from headscope.ops import HeadEdit, Statistic, attention
from headscope.ops.edits import blend
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

    Contexts nest. Leaving one restores the model and torch exactly, also after an exception. Compiled models
    (`model.compile()`, `torch.compile(model)`, `compile_repeated_blocks()`) are recorded and edited as well.

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
        self._called = find_denoiser(pipeline_or_model)
        # torch.compile(model) is a module around the model
        self.denoiser: nn.Module = getattr(self._called, "_orig_mod", self._called)
        self._signature = inspect.signature(type(self.denoiser).forward)
        self._recordings: list[tuple[Recording, frozenset[str]]] = []
        self._edits: list[ActiveEdit] = []
        self._wrap: ForwardWrap | None = None
        self._modules: list[nn.Module] = []
        self._contexts = 0
        self._forwards = 0
        self._forward: Forward | None = None
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
        self._by_name = {site.name: site for site in sites}

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
        if name in self._by_name:
            return self._by_name[name]
        for entry in self.unseen:
            if entry.name == name:
                raise KeyError(f"site {name!r} can't be seen: {entry.reason}")
        raise KeyError(f"site: got {name!r}, expected one of {', '.join(site.name for site in self.sites)}")

    def matching(self, pattern: str) -> list[str]:
        """The names of the sites that a name or a pattern of shell style ("*.attn2") means, in the model's order.

        Raises:
            KeyError: there is none, or one of them can't be seen.
        """
        if not any(character in pattern for character in "*?["):
            return [self.site(pattern).name]
        for entry in self.unseen:
            if fnmatchcase(entry.name, pattern):
                raise KeyError(f"site {entry.name!r} (of {pattern!r}) can't be seen: {entry.reason}")
        names = [site.name for site in self.sites if fnmatchcase(site.name, pattern)]
        if not names:
            raise KeyError(
                f"site: got {pattern!r}, expected a pattern of {', '.join(site.name for site in self.sites)}"
            )
        return names

    @contextmanager
    def record(
        self,
        *statistics: str | Statistic,
        sites: Sequence[str] | str | None = None,
        reduce: Reduce = "mean",
        into: Recording | None = None,
    ) -> Iterator[Recording]:
        """Record statistics of every attention call made inside the context.

        Args:
            statistics: statistics of the operator, by name or as Statistic objects, reduced over the queries of each
                query group (image, text, frame) to their mean, standard deviation, minimum and maximum per sample and
                head; and "head_output", "q", "k", "v", the attention output, queries, keys and values of each head,
                averaged over samples per (site, call, timestep, branch, position).
            sites: names or patterns of the sites to record; all by default.
            reduce: "mean" as said above; None keeps every query's statistic and every sample's tensors.
            into: an earlier recording of the same statistics to go on with.

        Raises:
            ValueError: an unknown statistic or reduction, nothing to record, or unseen sites when all are asked for.
            KeyError: an unknown site.
            RuntimeError: another Scope is active on the model.
        """
        self._look_again()
        if not statistics:
            raise ValueError("statistics: got none, expected at least one name to record")
        if reduce not in ("mean", None):
            raise ValueError(f'reduce: got {reduce!r}, expected "mean" or None')
        quantities = tuple(name for name in QUANTITIES if name in statistics)
        requested = requested_statistics([statistic for statistic in statistics if statistic not in QUANTITIES])
        recording = Recording(requested, quantities, reduce)
        if into is not None:
            if not into.same_request(recording):
                raise ValueError(f"into: got {into!r}, expected a recording of {', '.join(map(str, statistics))}")
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
        branches: Sequence[str] | None = None,
    ) -> Iterator[None]:
        """Edit heads in every forward made inside the context.

        Args:
            edits: {site name or pattern: heads to remove, a HeadEdit, a Patch, a list of those, or a function of
                `Where` that returns one}; or a sequence of such mappings, one per sample of the batch. Under
                classifier-free guidance they hit both branches.
            fill: what takes the place of heads given by number, or by a HeadEdit without a fill: None (zeros),
                "uniform", "identity", a tensor broadcastable to [batch, heads, queries, dim], a Recording of
                "head_output" (its mean at the same site, timestep and branch; recorded with reduce=None, the same
                sample's own), or `recording.take(...)` of one (other samples').
            steps: the pipeline's steps (the denoiser's forwards since the context was entered, where no pipeline
                counts) in which the edit acts; all if None.
            branches: the guidance branches in which it acts, as in ("cond",); all if None.

        Contexts compose: an inner one edits what the outer one has edited.

        Raises:
            KeyError: an unknown site, or one that can't be seen.
            ValueError: a head out of range.
            RuntimeError: another Scope is active on the model.
        """
        self._look_again()
        active = ActiveEdit.build(edits, fill, steps, branches, self)
        with self._context(self._edits, active):
            yield

    def attribute(
        self,
        task: Task,
        items: Sequence[TaskItem],
        timesteps: Sequence[int],
        *,
        sites: Sequence[str] | str | None = None,
        cotangents: int = 4,
        fill: Fill = None,
        replicate: int = 0,
        integrate: int = 0,
        batch: int = 8,
    ) -> Attribution:
        """Every head's importance for a task's teacher-forced loss, from cotangents + 1 backwards per batch.

        Two numbers per item, timestep and head: g, what removing the head costs to first order, and c, the
        Gauss-Newton term of the second order. Rank heads by g + c: at a trained optimum g averages to nothing.

        Args:
            task: of the scope's own denoiser.
            items: what the task needs of an item.
            timesteps: of the scheduler.
            sites: names or patterns; all by default.
            cotangents: random vectors that estimate c; its relative error falls as sqrt(2 / cotangents).
            fill: what a removed head would be replaced by, as in `edit`.
            replicate: of the noise.
            integrate: points of the path on which all gates go from 1 to 0; 0 leaves the integral out.
            batch: items in a forward.

        Raises:
            ValueError: nothing to do, or a task of another model.
            KeyError: an unknown site.
        """
        self._look_again()
        names = [site.name for site in self.sites if site.name in self._chosen(sites)]
        return attribute(
            self,
            task,
            items,
            timesteps,
            sites=names,
            cotangents=cotangents,
            fill=fill,
            replicate=replicate,
            integrate=integrate,
            batch=batch,
        )

    def _look_again(self) -> None:
        """Processors may have been changed since the last context."""
        if self._contexts == 0:
            self.refresh()

    def _chosen(self, sites: Sequence[str] | str | None) -> frozenset[str]:
        if sites is not None:
            patterns = [sites] if isinstance(sites, str) else sites
            return frozenset(name for pattern in patterns for name in self.matching(pattern))
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
            # the newest of several equal entries
            del entries[max(index for index, other in enumerate(entries) if other is entry)]
            self._contexts -= 1
            if self._contexts == 0:
                self._detach()

    def _attach(self) -> None:
        if self.denoiser in _observed:
            raise RuntimeError(
                "another Scope is active on this model, and each would hide attention from the other;"
                " use one Scope for both"
            )
        _observed.add(self.denoiser)
        self._forwards = 0
        modules = dict(self.denoiser.named_modules())
        for site in self.sites:
            routing.observe(modules[site.name], _SiteFrame(self, site))
            self._modules.append(modules[site.name])
        self._wrap = ForwardWrap(self._called, self)
        routing.install()

    def _detach(self) -> None:
        _observed.discard(self.denoiser)
        routing.uninstall()
        # torch skips the hooks that leave a module when Ctrl-C ends it
        routing.unwatch(self)
        for module in self._modules:
            routing.forget(module)
        self._modules.clear()
        if self._wrap is not None:
            self._wrap.remove()
            self._wrap = None
        self._forward = None

    def begin(self, args: tuple, kwargs: dict, cache_context: str | None) -> None:
        arguments = dict(self._signature.bind_partial(self.denoiser, *args, **kwargs).arguments)
        arguments.pop("self", None)
        arguments |= arguments.pop("kwargs", {})
        self._forward = begin_forward(self._forwards, self.denoiser, self._pipeline, arguments, cache_context)
        self._forwards += 1
        routing.watch(self)

    def end(self, completed: bool) -> None:
        routing.unwatch(self)
        forward = self._forward
        for recording, _ in self._recordings:
            if forward is None:
                continue
            if completed:
                recording.end_forward(forward)
            else:
                recording.drop(forward)
        if forward is not None:
            # what runs again in a backward belongs to this forward still
            forward.totals = dict(forward.calls)

    @contextmanager
    def repeat(self, forward: Forward | None, calls: dict[str, int]) -> Iterator[None]:
        """Run a part of an earlier forward again as it ran then, without recording it a second time."""
        if self._contexts == 0:
            raise RuntimeError(
                "gradient checkpointing runs the forward again in the backward, which came after the Scope's context;"
                " call backward inside it"
            )
        if forward is None:
            yield
            return
        before, counts = self._forward, forward.calls
        self._forward, forward.calls = forward, dict(calls)
        try:
            yield
        finally:
            self._forward, forward.calls = before, counts

    @property
    def running(self) -> Forward | None:
        """The forward that runs, or ran last."""
        return self._forward

    def attention_outside(self) -> None:
        """Attention inside the denoiser, outside of every site: none may be missing where all are recorded."""
        every = frozenset(site.name for site in self.sites)
        if any(sites == every for _, sites in self._recordings):
            raise RuntimeError(
                f"{type(self.denoiser).__name__} calls attention outside of the modules in scope.sites, and a recording"
                " of all sites would miss it; name the sites to record"
            )

    def asked(self, name: str) -> bool:
        """Whether anything is recorded or edited at the site."""
        return any(name in sites for _, sites in self._recordings) or any(name in edit.sites for edit in self._edits)


class _SiteFrame:
    """A site's attention module while it runs."""

    def __init__(self, scope: Scope, site: Site) -> None:
        self._scope = scope
        self._site = site

    def silent(self) -> None:
        """Raises RuntimeError where the module ran and its attention did not come by."""
        name = self._site.name
        if self._scope.asked(name):
            raise RuntimeError(
                f"site {name!r} ran without torch's scaled_dot_product_attention, so nothing of it was recorded or"
                " edited; was its processor or diffusers' attention backend changed?"
            )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_text: int,
        stock: Callable[..., Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        scope, site, name = self._scope, self._site, self._site.name
        forward = scope.running
        if forward is None or not scope.asked(name):
            return stock(query, key, value, **options)
        repeated = forward.totals is not None
        recordings = [] if repeated else [own for own, sites in scope._recordings if name in sites]
        edits = [edit for edit in scope._edits if name in edit.sites and edit.acts_in(forward)]
        calls = forward.calls.get(name, 0)
        forward.calls[name] = calls + 1
        if forward.totals is not None:
            calls %= max(1, forward.totals.get(name, 1))
        # a repetition takes the operator that ran the first time, so that it saves the same tensors
        observed = recordings or edits or (repeated and any(name in sites for _, sites in scope._recordings))
        if not observed:
            return stock(query, key, value, **options)
        self._check(query, options["dropout_p"], forward)
        layout = layout_of(site, forward.geometry, query.shape[0], query.shape[2], key.shape[2], int(own_text), calls)
        call = calls // max(1, forward.batch // layout.samples)
        options = {option: given for option, given in options.items() if option != "dropout_p"}
        if any(recording.quantities for recording in recordings):
            _keep_inputs(recordings, forward, name, call, layout, query, key, value)
        changes = [change for edit in edits for change in edit.changes(name, call, forward, layout, query)]
        combined = combine(changes, query, key, value)
        query, key, value = combined.query, combined.key, combined.value
        wanted = {statistic.name: statistic for recording in recordings for statistic in recording.requested}
        result = attention(query, key, value, edit=combined.edit, statistics=tuple(wanted.values()), **options)
        output = result.output
        for edit in combined.later:
            output = blend(output, edit.gate, _fill_of(edit, combined, options))
        valid_keys = count_valid_keys(options["attn_mask"], options["is_causal"], query, key) if wanted else 0
        for recording in recordings:
            recording.count_call()
            if recording.statistics:
                recording.add_statistics(forward, name, call, layout, result.statistics, valid_keys, key.shape[2])
            if recording.records_head_output:
                recording.tensors.add(forward, "head_output", name, call, layout, output)
        return output

    def _check(self, query: Tensor, dropout_p: float, forward: Forward) -> None:
        name = self._site.name
        if query.ndim != 4:
            raise ValueError(f"site {name!r} calls attention with {query.ndim} dimensions, expected 4")
        if query.shape[1] != self._site.heads:
            raise ValueError(f"site {name!r} calls attention with {query.shape[1]} heads, expected {self._site.heads}")
        if query.shape[0] % forward.batch and forward.batch % query.shape[0]:
            raise ValueError(
                f"site {name!r} calls attention on {query.shape[0]} rows, expected a multiple or a part of the batch"
                f" of {forward.batch}"
            )
        if dropout_p:
            raise ValueError(f"site {name!r} uses attention dropout; put the model in eval mode to record or edit it")


def _keep_inputs(recordings, forward, name, call, layout, query, key, value) -> None:
    for recording in recordings:
        for quantity, tensor in (("q", query), ("k", key), ("v", value)):
            if quantity in recording.quantities:
                recording.tensors.add(forward, quantity, name, call, layout, tensor)


def _fill_of(edit: HeadEdit, combined: Combined, options: dict[str, Any]) -> Tensor | None:
    """The fill as a tensor, for a gate that comes after the operator."""
    if not isinstance(edit.fill, str):
        return edit.fill
    query = combined.query
    everything = replace(combined.edit or HeadEdit(), gate=query.new_zeros(1, query.shape[1]), fill=edit.fill)
    return attention(query, combined.key, combined.value, edit=everything, **options).output


def count_valid_keys(attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | int:
    """How many keys each row may see: an int, or broadcastable to [batch, heads, queries]."""
    keys = key.shape[2]
    if is_causal:
        return torch.arange(1, query.shape[2] + 1, device=query.device).clamp(max=keys)
    if attn_mask is None:
        return keys
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > FORBIDDEN_LOGIT
    return allowed.expand(*allowed.shape[:-1], keys).sum(-1)
