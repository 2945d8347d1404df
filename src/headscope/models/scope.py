"""headscope.Scope: see and edit the attention heads of a diffusion model while it runs."""

import inspect
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from headscope.models.attending import SiteFrame
from headscope.models.attribution import Attribution, attribute
from headscope.models.editing.editing import ActiveEdit
from headscope.models.editing.edits import Edits, Fill, check_heads
from headscope.models.hooks import routing
from headscope.models.hooks.caches import HookWatch, Reused
from headscope.models.hooks.forwards import Forward, Progress, Window, begin_forward, running_module
from headscope.models.hooks.wrapping import ForwardWrap
from headscope.models.recording.maps import TokenMaps, TokenRequest
from headscope.models.recording.prompts import Prompts
from headscope.models.recording.recording import Recording, RecordRequest
from headscope.models.recording.tensors import QUANTITIES, Reduce
from headscope.models.structure.sites import Site, Unseen, find_denoiser, find_sites, other_denoisers
from headscope.models.tasks import Task, TaskItem
from headscope.ops import Statistic
from headscope.ops.statistics import requested_statistics


class Scope:
    """The attention sites of a diffusers pipeline or model.

        scope = headscope.Scope(pipeline)
        with scope.record("entropy") as recording:
            pipeline("a red fox")
        recording.to_polars()

    Contexts nest. Leaving one restores the model and torch exactly, also after an exception. Compiled models
    (`model.compile()`, `torch.compile(model)`, `compile_repeated_blocks()`) are recorded and edited as well.

    Torch function modes, and functions in the place of torch's scaled_dot_product_attention, act as they would without
    a Scope. Where one of them decides what the attention of a recorded or edited site gives, the forward raises
    RuntimeError and names it.

    Attributes:
        denoiser: the module whose sites these are (the pipeline's unet or transformer).
        sites: what can be recorded and edited, in the order in which a forward runs them.
        unseen: attention modules that can't be, with the reason. Recording with unseen sites raises unless
            `sites=` leaves them out.
        recordings, token_maps, edits: what is active, outer contexts first.

    Warns:
        UserWarning: the pipeline has a second denoiser (Wan 2.2 has one for its later steps), which isn't seen.

    Raises:
        TypeError: not a torch module, nor a pipeline with a unet or transformer.
        ValueError: the model has no attention site that can be seen, or is a DataParallel over several GPUs.
    """

    def __init__(self, pipeline_or_model: Any) -> None:
        self._pipeline = None if isinstance(pipeline_or_model, nn.Module) else pipeline_or_model
        self._called = find_denoiser(pipeline_or_model)
        # torch.compile(model) is a module around the model
        self.denoiser: nn.Module = getattr(self._called, "_orig_mod", self._called)
        for name in other_denoisers(self._pipeline, self.denoiser):
            warnings.warn(
                f"pipeline_or_model: {type(pipeline_or_model).__name__} has another denoiser, {name!r}, whose attention"
                " this Scope neither records nor edits; a Scope of that model sees it",
                stacklevel=2,
            )
        self._signature = inspect.signature(type(self.denoiser).forward)
        self.recordings: list[RecordRequest] = []
        self.token_maps: list[TokenRequest] = []
        self.edits: list[ActiveEdit] = []
        self._wrap: ForwardWrap | None = None
        self._hooks: HookWatch | None = None
        self._installed = False
        self._modules: list[nn.Module] = []
        self._contexts = 0
        self._forwards = 0
        # the forward that runs, or ran last
        self.running: Forward | None = None
        # the thread that a forward runs in, while one does
        self._thread: int | None = None
        self._thread_lock = threading.Lock()
        # counts up whenever a context is entered or left: what sites know of them then is out of date
        self.contexts_seen = 0
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
        """The names of the sites that a name or a pattern of shell style ("*.attn2") means, in the order of `sites`.

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
            sites: names or patterns of the sites to record; all by default, and then attention that the model calls
                outside of them is an error.
            reduce: "mean" as said above; None keeps every query's statistic and every sample's tensors.
            into: an earlier recording of the same statistics to go on with, made in this session.

        Raises:
            ValueError: an unknown statistic or reduction, nothing to record, a recording that can't be gone on with, or
                unseen sites when all are asked for.
            KeyError: an unknown site.
            RuntimeError: another Scope is active on the model; from a forward, attention outside of all sites.
        """
        self._look_again()
        if not statistics:
            raise ValueError("statistics: got none, expected at least one name to record")
        if reduce not in ("mean", None):
            raise ValueError(f'reduce: got {reduce!r}, expected "mean" or None')
        quantities = tuple(name for name in QUANTITIES if name in statistics)
        requested = requested_statistics([name for name in statistics if name not in QUANTITIES], QUANTITIES)
        recording = Recording(requested, quantities, reduce)
        if into is not None:
            if not isinstance(into, Recording):
                raise TypeError(f"into: got {type(into).__name__}, expected an earlier Recording")
            into.check_continues(recording)
            recording = into
        entry = RecordRequest(recording, self._chosen(sites), sites is None)
        with self._context(self.recordings, entry):
            yield recording

    @contextmanager
    def record_tokens(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        sites: Sequence[str] | str | None = None,
        heads: Mapping[str, Sequence[int]] | None = None,
        steps: range | None = None,
    ) -> Iterator[TokenMaps]:
        """Record which part of the picture attends to which token of the prompt, under the branch that sees it.

        Args:
            prompts: by default those that the pipeline is called with. Where they're named (one per sample, or one for
                all), they must be the same; where the pipeline gets their embeddings, or the denoiser is called
                without it, they must be named, and a warning says that nothing compares them.
            sites: names or patterns; by default all where image queries meet text keys.
            heads: heads to sum over, by site name or pattern; all where none are named.
            steps: the pipeline's steps to sum over; all if None.

        Raises:
            KeyError: an unknown site.
            ValueError: no head of the site, or a head of a site that isn't recorded; at the context's end, steps that
                never ran.
            TypeError: steps that are no range, heads that are no numbers.
        """
        self._look_again()
        names = self._chosen(sites) if sites is not None else frozenset(self._by_name)
        chosen: dict[str, tuple[int, ...]] = {}
        for pattern, own in (heads or {}).items():
            if names.isdisjoint(self.matching(pattern)):
                raise ValueError(f"heads: got {pattern!r}, which is not among the sites to record")
            for name in self.matching(pattern):
                check_heads(own, self.site(name), f"heads[{pattern!r}]")
                chosen[name] = tuple(own)
            if len(set(own)) != len(own) or not len(own):
                raise ValueError(f"heads[{pattern!r}]: got {list(own)}, expected some heads, each once")
        words = Prompts(self._pipeline, prompts)
        maps = TokenMaps(self._pipeline, words, chosen)
        with words.watching_encoders(), self._context(self.token_maps, TokenRequest(maps, names, steps)):
            yield maps

    @contextmanager
    def edit(
        self,
        edits: Edits | Sequence[Edits],
        *,
        fill: Fill = None,
        steps: range | None = None,
        branches: Sequence[str] | str | None = None,
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
            branches: the guidance branches in which it acts, as in "cond" or ("uncond", "cond"); all if None. Without
                guidance the one branch there is counts as "cond".

        Contexts compose: an inner one edits what the outer one has edited.

        Raises:
            KeyError: an unknown site, or one that can't be seen.
            ValueError: a head out of range, an unknown branch; at the context's end, steps or a branch that never ran.
            RuntimeError: another Scope is active on the model.
        """
        self._look_again()
        active = ActiveEdit.build(edits, fill, steps, branches, self)
        with self._context(self.edits, active):
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
            ValueError: nothing to do, numbers that count nothing, or a task of another model.
            KeyError: an unknown site.
            RuntimeError: in torch.inference_mode.
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
        """Processors may have been changed since the last context, and the model may have been compiled."""
        if self._contexts > 0:
            return
        if self._pipeline is not None:
            called = find_denoiser(self._pipeline)
            if getattr(called, "_orig_mod", called) is not self.denoiser:
                raise RuntimeError(
                    f"pipeline_or_model: the {type(self._pipeline).__name__} has another denoiser than when this Scope"
                    " was made; make a new Scope of it"
                )
            self._called = called
        self.refresh()

    def _chosen(self, sites: Sequence[str] | str | None) -> frozenset[str]:
        if sites is not None:
            patterns = [sites] if isinstance(sites, str) or not isinstance(sites, Iterable) else list(sites)
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"sites: got {sites!r}, expected names or patterns, or None for all")
            if not patterns:
                raise ValueError("sites: got none, expected names or patterns, or None for all")
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
        self.contexts_seen += 1
        if isinstance(entry, RecordRequest):
            entry.recording.enter(self._forwards)
        else:
            entry.first_forward = self._forwards
        try:
            yield
        finally:
            # the newest of several equal entries
            del entries[max(index for index, other in enumerate(entries) if other is entry)]
            if isinstance(entry, RecordRequest):
                entry.recording.leave()
            self.contexts_seen += 1
            self._contexts -= 1
            if self._contexts == 0:
                self._detach()
        # only where the context ended by itself: an exception of its own says more
        if isinstance(entry, Window):
            entry.check_met()

    def _attach(self) -> None:
        modules = dict(self.denoiser.named_modules())
        if any(routing.is_observed(modules[site.name]) for site in self.sites):
            raise RuntimeError(
                "another Scope is active on this model, or a part of it, and each would hide attention from the other;"
                " use one Scope for both"
            )
        self._forwards = 0
        # Ctrl-C may come half way, too
        try:
            for site in self.sites:
                self._modules.append(modules[site.name])
                routing.observe(modules[site.name], SiteFrame(self, site))
            self._hooks = HookWatch(self.denoiser)
            self._wrap = ForwardWrap(self._called, self)
            routing.install()
            self._installed = True
        except BaseException:
            self._detach()
            raise

    def _detach(self) -> None:
        if self._installed:
            routing.uninstall()
            self._installed = False
        # where Ctrl-C came between a forward's end and our own
        routing.unwatch(self)
        for module in self._modules:
            routing.forget(module)
        self._modules.clear()
        if self._wrap is not None:
            self._wrap.remove()
            self._wrap = None
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        self.running = self._thread = None

    def begin(self, args: tuple, kwargs: dict, cache_context: str | None) -> None:
        with self._thread_lock:
            if self._thread not in (None, threading.get_ident()):
                raise RuntimeError(
                    f"{type(self.denoiser).__name__} runs in two threads inside a Scope, which can't tell their"
                    " forwards apart; run one after the other, or a copy of the model with a Scope of its own in each"
                )
            self._thread = threading.get_ident()
        arguments = self._named_arguments(args, kwargs)
        forward = begin_forward(self._forwards, self.denoiser, self._pipeline, arguments, cache_context, self.running)
        forward.contexts = self.contexts_seen
        # one object for forwards that are alike, so that sites need not read each anew
        if self.running is not None and self.running.geometry.same_as(forward.geometry):
            forward.geometry = self.running.geometry
        self.running = forward
        self._forwards += 1
        if self._hooks is not None:
            self._hooks.begin(forward, arguments, self._named_arguments)
        for entry in (*self.edits, *self.token_maps):
            entry.saw(forward)
        routing.watch(self)

    def _named_arguments(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The denoiser's arguments by name."""
        arguments = dict(self._signature.bind_partial(self.denoiser, *args, **kwargs).arguments)
        arguments.pop("self", None)
        return arguments | arguments.pop("kwargs", {})

    def end(self, completed: bool) -> None:
        # after a forward that `begin` refused, another thread's still runs
        if self._thread not in (None, threading.get_ident()):
            return
        self._thread = None
        routing.unwatch(self)
        forward = self.running
        # the one before, where `begin` refused this one
        if forward is None or forward.totals is not None:
            return
        # what runs again in a backward belongs to this forward still
        forward.totals = dict(forward.calls)
        for entry in self.recordings:
            if completed:
                entry.recording.end_forward(forward)
            else:
                entry.recording.drop(forward)
        for request in self.token_maps:
            request.maps.end_forward(completed)
        if completed:
            self._note_missing(forward)

    @property
    def in_forward(self) -> bool:
        """Whether a forward runs, or a backward that may run a part of one again."""
        return self._thread == threading.get_ident() or torch._C._current_graph_task_id() != -1

    def _note_missing(self, forward: Forward) -> None:
        """List what hooks of diffusers left out; what a cache gave in its place can't be edited any more."""
        if self._hooks is None:
            return
        for site, branch, cache in self._hooks.missing(forward, self._by_name):
            for entry in self.recordings:
                if site in entry.sites:
                    entry.recording.reused.append(Reused(site, entry.recording.step_of(forward), branch))
            for request in self.token_maps:
                shown = site in request.maps.sites and branch in ("cond", None)
                if shown and site in request.sites and request.acts_in(forward):
                    step = forward.step_since(request.first_forward)
                    request.maps.reused.append(Reused(site, step, branch))
            for edit in self.edits:
                named = edit.branches is None or (branch or "cond") in edit.branches
                if cache is not None and site in edit.sites and edit.acts_in(forward) and named:
                    raise RuntimeError(
                        f"site {site!r} can't be edited in step {forward.step_since(edit.first_forward)}, for {cache}"
                        " took its attention from a cache; edit other sites or steps, or disable the cache"
                    )

    @contextmanager
    def repeat(self, forward: Forward | None, calls: dict[str, Progress]) -> Iterator[None]:
        """Run a part of an earlier forward again as it ran then, without recording it a second time."""
        if self._contexts == 0 or (forward is not None and forward.contexts != self.contexts_seen):
            raise RuntimeError(
                "gradient checkpointing runs the forward again in the backward, which came after a context of the Scope"
                " had begun or ended; call backward inside the contexts of its forward"
            )
        if forward is None:
            yield
            return
        before, counts = self.running, forward.calls
        self.running, forward.calls = forward, dict(calls)
        try:
            yield
        finally:
            self.running, forward.calls = before, counts

    def attention_outside(self) -> None:
        """Attention inside the denoiser, outside of every site: none may be missing where all are recorded."""
        if any(entry.all_sites for entry in self.recordings):
            where = running_module(self.denoiser)
            raise RuntimeError(
                f"{type(self.denoiser).__name__} calls attention outside of scope.sites{where}, and a"
                " recording of all would miss it; name the sites to record ([site.name for site in scope.sites] are all"
                " that can be seen)"
            )
