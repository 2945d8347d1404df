"""How one unit of work is computed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from headscope.models import Recording, Scope, Task
from headscope.models.editing.edits import Fill
from headscope.models.recording.tensors import moved
from headscope.models.tasks import NoisyInputs, Prepared
from headscope.ops import HeadEdit
from headscope.sweep.compute.calls import Diverged
from headscope.sweep.compute.edits import head_edits, mean_fill, tensors
from headscope.sweep.compute.fitting import Rows
from headscope.sweep.compute.graphs import Forwards, Graphs
from headscope.sweep.compute.scores import checked_score, image_distance, image_scores, own_scores, squared_error
from headscope.sweep.compute.sharing import Kept, Prefix
from headscope.sweep.compute.steps import EarlierSteps
from headscope.sweep.plan import units as kinds
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.items import GroupItems, PromptItem
from headscope.sweep.plan.units import Edit, Plan, Unit
from headscope.sweep.store.rows import Grid, coded, labels, prepend
from headscope.sweep.store.store import RunStore

Advance = Callable[[int], None]


class UnitRunner:
    """Computes units and writes their files.

    Args:
        rows: how many rows pass through the denoiser at once; it changes speed and memory, not the numbers
            (beyond rounding).
        share: let edited forwards take over what the clean one computed before the edited site.
        graphs: replay teacher-forced forwards from CUDA graphs.
        prefix: what edited forwards take over, where it was learned before.
    """

    def __init__(
        self,
        config: SweepConfig,
        task: Task,
        groups: Sequence[GroupItems],
        plan: Plan,
        store: RunStore,
        rows: Rows,
        share: bool = True,
        graphs: bool = False,
        prefix: Prefix | None = None,
    ) -> None:
        self.config = config
        self.task = task
        self.plan = plan
        self.store = store
        self.rows = rows
        self.share = share
        self.groups = {group.name: group for group in groups}
        self._references: dict[tuple[str, str], Recording] = {}
        self._drawn: dict[str, dict[str, Tensor]] = {}
        self._prefix = prefix
        self._forwards = Graphs(task.denoiser) if graphs else Forwards()
        rows.release = self._forwards.release
        self._image_scores = image_scores(config.image_scores)
        self._own_scores = own_scores(config.scores)

    @cached_property
    def _loss_scope(self) -> Scope:
        """Sees the denoiser alone: teacher-forced forwards have no guidance branches."""
        return Scope(self.task.denoiser)

    @cached_property
    def _pipeline_scope(self) -> Scope:
        return Scope(self.task.pipeline if hasattr(self.task.pipeline, "text_encoder") else self.task.denoiser)

    @property
    def not_replayed(self) -> str | None:
        """Why forwards aren't replayed from CUDA graphs though they should be; None where all is well."""
        return self._forwards.reason

    def done(self, unit: Unit) -> bool:
        return self.store.has(unit.kind, unit.id)

    def run(self, unit: Unit, advance: Advance) -> None:
        """Compute the unit and commit its file; `advance` hears of every batch of forwards."""
        steps = {
            kinds.IMAGES: self._draw_images,
            kinds.REFERENCE: self._reference,
            kinds.OBSERVE: self._observe,
            kinds.ATTRIBUTE: self._attribute,
            kinds.ABLATE: self._ablate,
            kinds.ABLATE_SETS: self._ablate,
            kinds.GENERATE: self._generate,
            kinds.GENERATE_SETS: self._generate,
        }
        # attribution goes backward
        with torch.inference_mode(unit.kind != kinds.ATTRIBUTE):
            try:
                steps[unit.kind](unit, advance)
            except Diverged as error:
                # the model runs differently on these inputs: from here on, whole forwards
                assert self._prefix is not None
                self._prefix.reason = str(error)
                steps[unit.kind](unit, advance)

    def members(self, unit: Unit) -> list:
        """The unit's items as they were opened."""
        group = self.groups[unit.group]
        members = group.reference if unit.kind == kinds.REFERENCE else group.swept
        return [members[index] for index in unit.items]

    def items(self, unit: Unit) -> list:
        """The unit's items, prompts with the images the model drew for them."""
        chosen = self.members(unit)
        if not any(isinstance(item, PromptItem) for item in chosen):
            return chosen
        drawn = self._drawn_images(unit.group)
        return [replace(item, image=drawn[item.key].numpy()) for item in chosen]

    def _drawn_images(self, group: str) -> dict[str, Tensor]:
        if group not in self._drawn:
            unit = next(unit for unit in self.plan.units if unit.kind == kinds.IMAGES and unit.group == group)
            self._drawn[group] = self.store.read_tensors(unit.kind, unit.id)
        return self._drawn[group]

    def _draw_images(self, unit: Unit, advance: Advance) -> None:
        group = self.groups[unit.group]
        members = [*group.swept, *group.reference]
        drawn = {}

        def draw(piece: range) -> None:
            chunk = [members[index] for index in piece]
            images = self.task.generate(chunk, steps=self.config.generate_steps, seed=self.config.seed)
            drawn.update({item.key: torch.from_numpy(image) for item, image in zip(chunk, images, strict=True)})
            advance(self.task.sampling_rows * self.config.generate_steps * len(chunk))

        self.rows.run(len(members), draw)
        self.store.write_tensors(unit.kind, unit.id, drawn)

    def _reference(self, unit: Unit, advance: Advance) -> None:
        items = self.items(unit)
        scope = self._loss_scope if unit.score == "loss" else self._pipeline_scope
        total: Recording | None = None
        # not halved when memory runs out: a recording can't forget half a batch
        for chunk in _chunks(items, self.rows.most):
            if unit.score == "loss":
                prepared = self.task.prepare(chunk)
                with scope.record("head_output", into=total) as total:
                    for timestep in self.plan.timesteps:
                        self.task.predict(self.task.noisy_inputs(prepared, timestep, self.config.seed))
                        advance(len(chunk))
            else:
                with scope.record("head_output", into=total) as total:
                    self.task.generate(chunk, steps=self.config.generate_steps, seed=self.config.seed)
                advance(self.task.sampling_rows * self.config.generate_steps * len(chunk))
        assert total is not None
        self.store.write_tensors(unit.kind, unit.id, total.to_tensors())

    def _mean(self, group: str, score: str) -> Recording:
        if (group, score) not in self._references:
            unit = next(
                u for u in self.plan.units if u.kind == kinds.REFERENCE and u.group == group and u.score == score
            )
            # ordinary tensors, which attribution may save for its backwards
            with torch.inference_mode(False):
                self._references[group, score] = Recording.from_tensors(self.store.read_tensors(unit.kind, unit.id))
        return self._references[group, score]

    def _observe(self, unit: Unit, advance: Advance) -> None:
        items = self.items(unit)
        tables: dict[int, pa.Table] = {}

        def observe(piece: range) -> None:
            chunk = [items[index] for index in piece]
            prepared = self.task.prepare(chunk)
            with self._loss_scope.record("entropy") as recording:
                for timestep in self.plan.timesteps:
                    self.task.predict(self.task.noisy_inputs(prepared, timestep, self.config.seed))
                    advance(len(chunk))
            table = recording.to_arrow()
            described = labels(chunk, table["sample"].to_numpy(), self.config.seed)
            # the scheduler's own: some models are told sigma instead
            timestep = pa.array(np.array(self.plan.timesteps, np.int32)[table["step"].to_numpy()])
            table = table.set_column(table.schema.get_field_index("timestep"), "timestep", timestep)
            table = table.drop_columns(["step", "sample"])
            tables[piece.start] = prepend(described, table)

        self.rows.run(len(items), observe)
        table = pa.concat_tables(tables[start] for start in sorted(tables)).unify_dictionaries()
        self.store.write_table(unit.kind, unit.id, table)

    def _attribute(self, unit: Unit, advance: Advance) -> None:
        """Every head's g and c, all at once, from a few backwards."""
        items = self.items(unit)
        sites = kinds.attributed_sites(self.config, self._loss_scope.sites)
        each = unit.forwards // (len(items) * len(self.config.fills))
        tables: dict[tuple[int, int], pa.Table] = {}
        for number, fill in enumerate(self.config.fills):

            def attribute(piece: range, number=number, fill=fill) -> None:
                chunk = [items[index] for index in piece]
                found = self._loss_scope.attribute(
                    self.task,
                    chunk,
                    self.plan.timesteps,
                    sites=sites,
                    cotangents=self.config.cotangents,
                    fill=self._fill(unit, fill),
                    replicate=self.config.seed,
                    batch=len(chunk),
                )
                table = found.to_arrow()
                described = labels(chunk, np.arange(len(table)) // (len(table) // len(chunk)), self.config.seed)
                described["fill"] = coded([fill], np.zeros(len(table), np.int32))
                tables[number, piece.start] = prepend(described, table.drop_columns("item"))
                advance(each * len(chunk))

            self.rows.run(len(items), attribute)
        table = pa.concat_tables(tables[key] for key in sorted(tables)).unify_dictionaries()
        self.store.write_table(unit.kind, unit.id, table)

    def _fill(self, unit: Unit, fill: str) -> Fill:
        """What a scope takes for one of the configuration's fills."""
        if fill == "mean":
            return self._mean(unit.group, unit.reference_score)
        return fill if fill in ("uniform", "identity") else None

    def _ablate(self, unit: Unit, advance: Advance) -> None:
        """Every edit in turn; edits of one site share a batch, and take over what ran before that site."""
        items = self.items(unit)
        assert unit.timestep is not None
        timestep: int = unit.timestep
        inputs = self.task.noisy_inputs(self._prepared(items), timestep, self.config.seed)
        edits = self.plan.edits(unit.kind)
        grid = Grid(edits, self.config.fills, len(items))
        x0 = self.task.x0_factor(timestep) if "x0" in self.config.scores else None
        prefix = self._learned(inputs)
        sites = frozenset(edit.sites for edit in edits)

        def ablate(piece: range) -> None:
            some = inputs.rows(torch.arange(piece.start, piece.stop, device=self.task.device))
            clean, kept = self._forwards.run(
                ("clean", sites),
                timestep,
                None,
                lambda _: prefix.clean(sites) if prefix else nullcontext(),
                lambda: self.task.predict(some),
            )
            clean_loss = squared_error(clean, some.target)
            everywhere = slice(None), slice(None), list(piece)
            grid.put("clean", *everywhere, clean_loss)
            if x0 is not None:
                grid.put("x0_clean", *everywhere, clean_loss * x0)
            advance(len(piece))
            for fill, pairs in self._edited(edits, len(piece)):
                fills = self._fills_at(unit, self.config.fills[fill], edits[pairs[0][0]].sites)

                def apply(batch: range, fill=fill, fills=fills, pairs=pairs) -> None:
                    chosen = pairs[batch.start : batch.stop]
                    rows = moved(torch.tensor([item for _, item in chosen]), self.task.device)
                    which = [index for index, _ in chosen]
                    own, before = some.rows(rows), clean.index_select(0, rows)
                    made = head_edits([edits[index] for index in which], self._loss_scope, self.plan.keys)
                    edited = self._edited_prediction(own, made, fills, prefix, kept, rows)
                    places = which, fill, [piece.start + item for _, item in chosen]
                    loss = squared_error(edited, own.target)
                    grid.put("edited", *places, loss)
                    if "distance" in self.config.scores:
                        grid.put("distance", *places, squared_error(edited, before))
                    if x0 is not None:
                        grid.put("x0_edited", *places, loss * x0)
                    for name, score in self._own_scores.items():
                        grid.put(name, *places, score(edited, before, own))
                    advance(len(chosen))

                self.rows.run(len(pairs), apply)

        with prefix.attached() if prefix else nullcontext(), _open(self._loss_scope):
            self.rows.run_clean(len(items), ablate)
        constants = {"timestep": pa.scalar(timestep, pa.int32())}
        table = grid.table(items, self.config.seed, unit.kind == kinds.ABLATE, **constants)
        self.store.write_table(unit.kind, unit.id, table)

    def _prepared(self, items: Sequence[Any]) -> Prepared:
        """Items encoded, as many at once as fit."""
        pieces: dict[int, Prepared] = {}

        def prepare(piece: range) -> None:
            pieces[piece.start] = self.task.prepare([items[index] for index in piece])

        self.rows.run_clean(len(items), prepare)
        found = [pieces[start] for start in sorted(pieces)]
        conditioning = {name: torch.cat([one.conditioning[name] for one in found]) for name in found[0].conditioning}
        keys = tuple(key for one in found for key in one.keys)
        return Prepared(keys, torch.cat([one.clean for one in found]), conditioning)

    def _edited_prediction(
        self,
        inputs: NoisyInputs,
        edits: Mapping[str, HeadEdit],
        fills: Mapping[str, Fill],
        prefix: Prefix | None,
        kept: Kept | None,
        rows: Tensor,
    ) -> Tensor:
        """The denoiser's answer with an edit of each site.

        Args:
            fills: by site, of removed heads.
            kept: of the clean forward, whose row for each of the inputs' is in `rows`.
        """
        sites, device = frozenset(edits), self.task.device
        fields = {
            name: {**{part: moved(tensor, device) for part, tensor in tensors(edit).items()}, "fill": fills[name]}
            for name, edit in edits.items()
        }

        @contextmanager
        def inside(given: dict[str, Any]) -> Iterator[None]:
            made = {name: HeadEdit(**parts) for name, parts in given["edits"].items()}
            shared = prefix.replay(kept, sites, given["rows"]) if prefix and kept else nullcontext()
            with self._loss_scope.edit(made), shared:
                yield

        given = {"edits": fields, "rows": rows}
        key = ("edited", sites, kept)
        # a recording is looked up by the timestep, which a replay wouldn't do
        looked_up = any(isinstance(fill, Recording) for fill in fills.values())
        forwards = Forwards() if looked_up else self._forwards
        return forwards.run(key, inputs.timestep, given, inside, lambda: self.task.predict(inputs))[0]

    def _fills_at(self, unit: Unit, fill: str, sites: Iterable[str]) -> Mapping[str, Fill]:
        """By site, what takes the place of removed heads at the timestep of the forward that ran last."""
        taken = self._fill(unit, fill)
        if not isinstance(taken, Recording) or (timestep := self._loss_scope.timestep) is None:
            return dict.fromkeys(sites, taken)
        return {site: mean_fill(taken, site, timestep, self.task.device) for site in sites}

    def _learned(self, inputs: NoisyInputs) -> Prefix | None:
        """What edited forwards can take over from clean ones; None if nothing."""
        if not self.share:
            return None
        if self._prefix is None:
            self._prefix = learned_prefix(self.task, self._loss_scope, inputs)
        return self._prefix if self._prefix.shares else None

    def _generate(self, unit: Unit, advance: Advance) -> None:
        """Every edit in turn, in a window of the sampling steps; the images are kept beside the table."""
        items = self.items(unit)
        steps, seed = self.config.generate_steps, self.config.seed
        first, end = self.config.generate_window or (0, steps)
        edits = self.plan.edits(unit.kind)
        grid = Grid(edits, self.config.fills, len(items))
        kept_clean = np.zeros(0)
        kept = np.zeros(0)

        def generate(piece: range) -> None:
            nonlocal kept_clean, kept
            some = [items[index] for index in piece]
            earlier = EarlierSteps(self.task.denoiser, first, len(some))
            with earlier.kept():
                clean = self.task.generate(some, steps=steps, seed=seed)
            if not kept_clean.size:
                kept_clean = np.zeros((len(items), *clean.shape[1:]), np.uint8)
                kept = np.zeros((*grid.shape, *clean.shape[1:]), np.uint8)
            kept_clean[piece.start : piece.stop] = clean
            advance(self.task.sampling_rows * steps * len(some))
            for fill, pairs in self._edited(edits, len(some)):
                edit = self._entering(unit, edits, self.config.fills[fill])

                def apply(batch: range, fill=fill, pairs=pairs, edit=edit) -> None:
                    chosen = pairs[batch.start : batch.stop]
                    which, members = [index for index, _ in chosen], [item for _, item in chosen]
                    with edit(which), earlier.repeated(members):
                        edited = self.task.generate([some[item] for item in members], steps=steps, seed=seed)
                    places = which, fill, [piece.start + item for item in members]
                    kept[places] = edited
                    before = clean[members]
                    grid.put("distance", *places, image_distance(edited, before))
                    for name, score in self._image_scores.items():
                        grid.put(name, *places, checked_score(name, score(before, edited), len(edited)))
                    # steps before the window were taken over
                    advance(self.task.sampling_rows * (steps - first) * len(chosen))

                self.rows.run(len(pairs), apply)

        with _open(self._pipeline_scope):
            self.rows.run(len(items), generate)
        kept = grid.repeated(kept)
        # [edits, fills, items, height, width, 3] as a row for each row of the table
        images = kept.reshape(-1, *kept.shape[3:])
        self.store.write_tensors(
            unit.kind, unit.id, {"clean": torch.from_numpy(kept_clean), "edited": torch.from_numpy(images)}
        )
        constants = {"steps": pa.scalar(steps, pa.int64())}
        constants |= {"first_step": pa.scalar(first, pa.int32()), "end_step": pa.scalar(end, pa.int32())}
        table = grid.table(items, seed, unit.kind == kinds.GENERATE, **constants)
        # the table comes last: it is what makes the unit done
        self.store.write_table(unit.kind, unit.id, table)

    def _edited(self, edits: Sequence[Edit], items: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Every (edit, item) pair, those of the same sites together: the fill's number, and the pairs."""
        order = sorted(range(len(edits)), key=lambda index: sorted(edits[index].sites))
        for _, same in groupby(order, key=lambda index: edits[index].sites):
            indices = list(same)
            for number, fill in enumerate(self.config.fills):
                # the grid repeats the first fill's numbers where all are the same
                different = [index for index in indices if fill in edits[index].differing(self.config.fills)]
                if different:
                    yield number, [(index, item) for index in different for item in range(items)]

    def _entering(
        self, unit: Unit, edits: Sequence[Edit], fill: str
    ) -> Callable[[list[int]], AbstractContextManager[None]]:
        """What enters some of the edits in the window of sampling steps, a row each."""
        scope, taken = self._pipeline_scope, self._fill(unit, fill)
        window = self.config.generate_window
        steps = None if window is None else range(*window)

        def enter(which: list[int]) -> AbstractContextManager[None]:
            made = head_edits([edits[index] for index in which], scope, self.plan.keys)
            # a single fill tensor would be shared by all sites, a recording knows each
            return scope.edit(made, fill=taken, steps=steps)

        return enter


def learned_prefix(task: Task, scope: Scope, inputs: NoisyInputs) -> Prefix:
    """What edited forwards can take over from clean ones, from some forwards of these inputs."""
    example = _two_rows(inputs)

    def forward(rows: list[int]) -> Tensor:
        return task.predict(example.rows(torch.tensor(rows, device=task.device)))

    return Prefix.learn(task.denoiser, [site.name for site in scope.sites], forward)


def _open(scope: Scope) -> AbstractContextManager[Any]:
    """Edits no site, and keeps the scope's hooks in place for the edits inside, which then are quick to enter."""
    return scope.keep_hooks()


def _two_rows(inputs: NoisyInputs) -> NoisyInputs:
    """The first and the last item; of a single one, itself and itself mirrored, so that rows can be told apart."""
    last = len(inputs.sample) - 1
    pair = inputs.rows(torch.tensor([0, last], device=inputs.sample.device))
    if last:
        return pair

    def mirrored(tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point() and tensor.ndim > 1
        return torch.cat([tensor[:1], tensor[1:].flip(-1)]) if floating else tensor

    conditioning = {name: mirrored(tensor) for name, tensor in pair.conditioning.items()}
    return replace(pair, sample=mirrored(pair.sample), conditioning=conditioning)


def _chunks(values: list, size: int) -> list[list]:
    return [values[start : start + size] for start in range(0, len(values), size)]
