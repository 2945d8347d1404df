"""How one unit of work is computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from headscope.models import Recording, Scope, Task
from headscope.models.recording import HEAD_OUTPUT
from headscope.ops import HeadEdit
from headscope.sweep import plan as kinds
from headscope.sweep.config import SweepConfig
from headscope.sweep.items import GroupItems
from headscope.sweep.plan import Plan, Unit
from headscope.sweep.store import RunStore

Advance = Callable[[int], None]


class UnitRunner:
    """Computes units and writes their files.

    Args:
        batch: how many rows pass through the denoiser at once; it changes speed and memory, not the numbers
            (beyond rounding).
    """

    def __init__(
        self, config: SweepConfig, task: Task, groups: Sequence[GroupItems], plan: Plan, store: RunStore, batch: int
    ) -> None:
        self.config = config
        self.task = task
        self.plan = plan
        self.store = store
        self.batch = batch
        self.groups = {group.name: group for group in groups}
        self._references: dict[tuple[str, str], Recording] = {}
        self._drawn: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def _loss_scope(self) -> Scope:
        """Sees the denoiser alone: teacher-forced forwards have no guidance branches."""
        return Scope(self.task.denoiser)

    @cached_property
    def _pipeline_scope(self) -> Scope:
        return Scope(self.task.pipeline if hasattr(self.task.pipeline, "text_encoder") else self.task.denoiser)

    def done(self, unit: Unit) -> bool:
        if unit.kind in (kinds.IMAGES, kinds.REFERENCE):
            return self.store.has_tensors(unit.kind, unit.id)
        return self.store.has_table(unit.kind, unit.id)

    def run(self, unit: Unit, advance: Advance) -> None:
        """Compute the unit and commit its file; `advance` hears of every batch of forwards."""
        steps = {
            kinds.IMAGES: self._draw_images,
            kinds.REFERENCE: self._reference,
            kinds.OBSERVE: self._observe,
            kinds.ABLATE: self._ablate,
            kinds.GENERATE: self._generate,
        }
        with torch.inference_mode():
            steps[unit.kind](unit, advance)

    def items(self, unit: Unit) -> list:
        """The unit's items, prompts with the images the model drew for them."""
        group = self.groups[unit.group]
        members = group.reference if unit.kind == kinds.REFERENCE else group.swept
        chosen = [members[index] for index in unit.items]
        if all(item.image is not None for item in chosen):
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
        drawn = {}
        for chunk in _chunks([*group.swept, *group.reference], self.batch):
            images = self.task.generate(chunk, steps=self.config.generate_steps, seed=self.config.seed)
            drawn.update({item.key: torch.from_numpy(image) for item, image in zip(chunk, images, strict=True)})
            advance(2 * self.config.generate_steps * len(chunk))
        self.store.write_tensors(unit.kind, unit.id, drawn)

    def _reference(self, unit: Unit, advance: Advance) -> None:
        items = self.items(unit)
        scope = self._loss_scope if unit.score == "loss" else self._pipeline_scope
        total: Recording | None = None
        for chunk in _chunks(items, self.batch):
            if unit.score == "loss":
                prepared = self.task.prepare(chunk)
                with scope.record(HEAD_OUTPUT, into=total) as total:
                    for timestep in self.plan.timesteps:
                        self.task.predict(self.task.noisy_inputs(prepared, timestep, self.config.seed))
                        advance(len(chunk))
            else:
                with scope.record(HEAD_OUTPUT, into=total) as total:
                    self.task.generate(chunk, steps=self.config.generate_steps, seed=self.config.seed)
                advance(2 * self.config.generate_steps * len(chunk))
        assert total is not None
        self.store.write_tensors(unit.kind, unit.id, total.to_tensors())

    def _mean(self, group: str, score: str) -> Recording:
        if (group, score) not in self._references:
            unit = next(
                u for u in self.plan.units if u.kind == kinds.REFERENCE and u.group == group and u.score == score
            )
            self._references[group, score] = Recording.from_tensors(self.store.read_tensors(unit.kind, unit.id))
        return self._references[group, score]

    def _observe(self, unit: Unit, advance: Advance) -> None:
        items = self.items(unit)
        tables = []
        for chunk in _chunks(items, self.batch):
            prepared = self.task.prepare(chunk)
            with self._loss_scope.record("entropy") as recording:
                for timestep in self.plan.timesteps:
                    self.task.predict(self.task.noisy_inputs(prepared, timestep, self.config.seed))
                    advance(len(chunk))
            table = recording.to_arrow()
            labels = _labels(chunk, table["sample"].to_numpy(), self.config.seed)
            for name in ("step", "sample"):
                table = table.drop_columns(name)
            timestep = table["timestep"].cast(pa.int32())
            table = table.set_column(table.schema.get_field_index("timestep"), "timestep", timestep)
            tables.append(_prepend(labels, table))
        self.store.write_table(unit.kind, unit.id, pa.concat_tables(tables).unify_dictionaries())

    def _ablate(self, unit: Unit, advance: Advance) -> None:
        """Every head in turn; the edits of one site share a batch, a row each."""
        items = self.items(unit)
        assert unit.timestep is not None
        inputs = self.task.noisy_inputs(self.task.prepare(items), unit.timestep, self.config.seed)
        clean = np.concatenate(
            [self.task.loss(inputs.rows(rows)).cpu().numpy() for rows in torch.arange(len(items)).split(self.batch)]
        )
        advance(len(items))
        columns = _Columns()
        for site, fill, pairs, edit in self._edits(self._loss_scope, unit.group, "loss", len(items)):
            rows = torch.tensor([item for item, _ in pairs], device=self.task.device)
            with edit:
                edited = self.task.loss(inputs.rows(rows)).cpu().numpy()
            advance(len(pairs))
            for (item, head), loss in zip(pairs, edited, strict=True):
                columns.add(item=item, site=site, head=head, fill=fill, clean=clean[item], edited=loss)
        self.store.write_table(unit.kind, unit.id, columns.table(items, self.config.seed, unit.timestep))

    def _generate(self, unit: Unit, advance: Advance) -> None:
        """Every head in turn, removed in all sampling steps; the images are kept beside the table."""
        items = self.items(unit)
        steps, seed = self.config.generate_steps, self.config.seed
        clean = np.concatenate([self.task.generate(c, steps=steps, seed=seed) for c in _chunks(items, self.batch)])
        advance(2 * steps * len(items))
        columns = _Columns()
        images = []
        for site, fill, pairs, edit in self._edits(self._pipeline_scope, unit.group, "generate", len(items)):
            with edit:
                edited = self.task.generate([items[item] for item, _ in pairs], steps=steps, seed=seed)
            advance(2 * steps * len(pairs))
            images.append(edited)
            for (item, head), image in zip(pairs, edited, strict=True):
                difference = (image.astype(np.float64) - clean[item]) / 255.0
                distance = float(np.square(difference).mean())
                columns.add(item=item, site=site, head=head, fill=fill, steps=steps, distance=distance)
        kept = {"clean": torch.from_numpy(clean), "edited": torch.from_numpy(np.concatenate(images))}
        self.store.write_tensors(unit.kind, unit.id, kept)
        # the table comes last: it is what makes the unit done
        self.store.write_table(unit.kind, unit.id, columns.table(items, seed, None))

    def _edits(
        self, scope: Scope, group: str, score: str, items: int
    ) -> Iterator[tuple[str, str, list[tuple[int, int]], AbstractContextManager[None]]]:
        """Every head in turn, as batches: site, fill, (item, head) pairs with a row each, and the edit to enter."""
        for site, heads in self._heads_by_site():
            count = scope.site(site).heads
            for fill in self.config.fills:
                for pairs in _chunks([(item, head) for head in heads for item in range(items)], self.batch):
                    gates = _gates([head for _, head in pairs], count)
                    yield site, fill, pairs, scope.edit({site: HeadEdit(gates)}, fill=self._fill(group, score, fill))

    def _fill(self, group: str, score: str, fill: str):
        """What `scope.edit` takes for one of the configuration's fills."""
        if fill == "mean":
            return self._mean(group, score)
        return "uniform" if fill == "uniform" else None

    def _heads_by_site(self) -> Iterator[tuple[str, list[int]]]:
        for site, pairs in groupby(sorted(self.plan.heads, key=self._order), key=lambda pair: pair[0]):
            yield site, [head for _, head in pairs]

    def _order(self, pair: tuple[str, int]) -> tuple[int, int]:
        names = [site.name for site in self._loss_scope.sites]
        return names.index(pair[0]), pair[1]


class _Columns:
    """Rows under construction, as columns."""

    def __init__(self) -> None:
        self._values: dict[str, list] = {}

    def add(self, **row) -> None:
        for name, value in row.items():
            self._values.setdefault(name, []).append(value)

    def table(self, items: list, replicate: int, timestep: int | None) -> pa.Table:
        values = dict(self._values)
        positions = np.array(values.pop("item"))
        labels = _labels(items, positions, replicate)
        if timestep is not None:
            labels["timestep"] = pa.array(np.full(len(positions), timestep, np.int32))
        columns = {
            "site": pa.array(values["site"]).dictionary_encode(),
            "head": pa.array(values["head"], pa.int16()),
            "fill": pa.array(values["fill"]).dictionary_encode(),
        }
        columns |= {name: pa.array(column) for name, column in values.items() if name not in columns}
        return pa.table({**labels, **columns})


def _labels(items: list, positions: np.ndarray, replicate: int) -> dict[str, pa.Array]:
    """The columns that say which item a row is about."""
    texts = {
        name: pa.array([getattr(items[position], name) for position in positions]).dictionary_encode()
        for name in ("group", "source_id", "split")
    }
    numbers = np.array([items[position].index for position in positions], np.int32)
    return {"item": pa.array(numbers), **texts, "replicate": pa.array(np.full(len(positions), replicate, np.int32))}


def _prepend(labels: dict[str, pa.Array], table: pa.Table) -> pa.Table:
    return pa.table({**labels, **{name: table[name] for name in table.column_names}})


def _gates(heads: list[int], count: int) -> Tensor:
    """A row per edit that removes its head: [rows, heads]."""
    gate = torch.ones(len(heads), count)
    gate[torch.arange(len(heads)), torch.tensor(heads)] = 0.0
    return gate


def _chunks(values: list, size: int) -> list[list]:
    return [values[start : start + size] for start in range(0, len(values), size)]
