"""headscope.Scope: see and edit the attention heads of a diffusion model while it runs."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from headscope.models.attending import SiteFrame
from headscope.models.attribution import Attribution, attribute
from headscope.models.editing.editing import EditContext
from headscope.models.editing.edits import Edits, Fill
from headscope.models.hooks.attachment import Attachment
from headscope.models.hooks.contexts import ActiveContexts, Context
from headscope.models.recording.context import RecordingContext, requested_recording
from headscope.models.recording.maps import TokenMapContext, TokenMaps, heads_by_site
from headscope.models.recording.prompts import Prompts
from headscope.models.recording.recording import Recording
from headscope.models.recording.regions import Queries
from headscope.models.recording.tensors import Reduce
from headscope.models.structure.index import SiteIndex
from headscope.models.structure.sites import Site, Unseen, find_denoiser, find_sites, other_denoisers
from headscope.models.tasks import Task, TaskItem
from headscope.ops import HeadEdit, Statistic


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
        recordings, token_maps, edits: the open contexts, outer ones first.

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
        self._contexts = ActiveContexts(self.denoiser, self._pipeline)
        self.refresh()
        if not self.sites:
            reasons = "".join(f"\n  {entry.name}: {entry.reason}" for entry in self.unseen)
            raise ValueError(f"{type(self.denoiser).__name__} has no attention site that can be seen{reasons}")

    def refresh(self) -> None:
        """Look at the model's processors again, after they were changed."""
        self._index = SiteIndex(*find_sites(self.denoiser))

    def __repr__(self) -> str:
        heads = sum(site.heads for site in self.sites)
        return (
            f"Scope({type(self.denoiser).__name__}: {len(self.sites)} sites, {heads} heads, {len(self.unseen)} unseen)"
        )

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._index.sites

    @property
    def unseen(self) -> tuple[Unseen, ...]:
        return self._index.unseen

    @property
    def recordings(self) -> tuple[RecordingContext, ...]:
        return self._contexts.of_kind(RecordingContext)

    @property
    def token_maps(self) -> tuple[TokenMapContext, ...]:
        return self._contexts.of_kind(TokenMapContext)

    @property
    def edits(self) -> tuple[EditContext, ...]:
        return self._contexts.of_kind(EditContext)

    def site(self, name: str) -> Site:
        """The site of that name.

        Raises:
            KeyError: there is none, or it can't be seen.
        """
        return self._index.site(name)

    def matching(self, pattern: str) -> list[str]:
        """The names of the sites that a name or a pattern of shell style ("*.attn2") means, in the order of `sites`.

        Raises:
            KeyError: there is none, or one of them can't be seen.
        """
        return self._index.matching(pattern)

    @contextmanager
    def record(
        self,
        *statistics: str | Statistic,
        sites: Sequence[str] | str | None = None,
        reduce: Reduce = "mean",
        into: Recording | None = None,
        queries: Queries | None = None,
    ) -> Iterator[Recording]:
        """Record statistics of every attention call made inside the context.

        Args:
            statistics: statistics of the operator, by name or as Statistic objects, reduced over the queries of each
                query group (image, text, frame) to their mean, standard deviation, minimum and maximum per sample and
                head; and "head_output", "q", "k", "v", the attention output, queries, keys and values of each head,
                averaged over samples per (site, call, timestep, branch, position).
            sites: names or patterns of the sites to record; all by default, and then attention that the model calls
                outside of them is an error.
            reduce: "mean" as said above; None records every query's statistic and every sample's tensors.
            into: an earlier recording of the same statistics to go on with, made in this session. Masks are those named
                here, of the samples that come now.
            queries: classes of image queries per which the mean of statistics is taken besides: `Regions`, or bool
                masks [samples or 1, height, width] by the classes' names, which may overlap (a token is in a class
                whose mask covers at least half of it). Masks of as many samples as a guidance branch has serve all
                branches, and every frame of a video.

        Statistics of regions, as in GroupMass(regions), are of attention to image tokens of known places: self- and
        joint attention. Text tokens are in no region.

        Raises:
            ValueError: an unknown statistic or reduction, nothing to record, a recording that can't be gone on with, or
                unseen sites when all are asked for; from a forward, masks of another number of samples; at the end of
                the context, regions or classes that no attention call had a place for.
            KeyError: an unknown site.
            RuntimeError: another Scope is active on the model; from a forward, attention outside of all sites.
        """
        self._look_again()
        recording = requested_recording(statistics, reduce, into, queries)
        with self._opened(RecordingContext(recording, self._index.chosen(sites), all_sites=sites is None)):
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
        names = self._index.chosen(sites) if sites is not None else [site.name for site in self.sites]
        chosen = heads_by_site(heads or {}, names, self._index)
        words = Prompts(self._pipeline, prompts)
        maps = TokenMaps(self._pipeline, words, chosen)
        with words.watching_encoders(), self._opened(TokenMapContext(maps, names, steps)):
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
        with self._opened(EditContext(edits, fill, steps, branches, self._index)):
            yield

    @contextmanager
    def keep_hooks(self) -> Iterator[None]:
        """Keep what contexts put into the model in place, so that those entered inside are quick to enter and leave.

        Raises:
            RuntimeError: another Scope is active on the model.
        """
        self._look_again()
        with self._opened(Context(())):
            yield

    @property
    def timestep(self) -> float | None:
        """The scheduler's timestep of the forward that runs inside the open contexts, or ran last; None before one.

        Raises:
            ValueError: its samples have different timesteps.
        """
        forward = self._contexts.forward
        return None if forward is None else forward.single_timestep

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
        names = self._index.chosen(sites)

        def edit(edits: dict[str, HeadEdit]) -> AbstractContextManager[None]:
            return self.edit(edits, fill=fill)

        if task.denoiser is not self.denoiser:
            raise ValueError("task: got one of another model, expected the scope's own denoiser")
        # hooks are put in place once, not for every batch and timestep
        with self.keep_hooks():
            return attribute(
                task,
                items,
                timesteps,
                sites={name: self.site(name).heads for name in names},
                edit=edit,
                cotangents=cotangents,
                replicate=replicate,
                integrate=integrate,
                batch=batch,
            )

    def _look_again(self) -> None:
        """Look at the model again, unless a context is open: processors may have changed, it may have been compiled."""
        if len(self._contexts):
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

    def _opened(self, context: Context) -> AbstractContextManager[None]:
        return self._contexts.opened(context, self._attach)

    def _attach(self) -> Attachment:
        frames = {site.name: SiteFrame(self._contexts, site) for site in self.sites}
        return Attachment(self._called, frames, self._contexts)
