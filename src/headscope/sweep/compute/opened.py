"""A sweep that is ready to be worked on: its model is loaded, its items are read, its units are planned."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headscope._machine import device_name, git_revision, versions
from headscope.counter import whole
from headscope.models import Scope, Task
from headscope.models.tasks import NoisyInputs
from headscope.sweep.compute.context import Context, learned_prefix
from headscope.sweep.compute.edits import check_keys
from headscope.sweep.compute.features import own_features
from headscope.sweep.compute.fitting import Sharing, fit, prefers_channels_last
from headscope.sweep.compute.kinds import KINDS
from headscope.sweep.compute.scores import image_scores, own_scores
from headscope.sweep.compute.sharing import Prefix
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.items import GroupItems, PromptItem, load_task, open_items
from headscope.sweep.plan.planning import make_plan
from headscope.sweep.plan.units import Plan, Unit
from headscope.sweep.store.room import room
from headscope.sweep.store.store import Fit, RunStore


@dataclass(frozen=True)
class Execution:
    """How a sweep is run, which changes its speed and not its numbers (beyond rounding).

    Attributes:
        rows: how many pass through the denoiser at once, the "batch" of `run_sweep`; None measures what fits.
        share: let edited forwards take over what the clean one computed before the edited site; not of compiled models.
        threads: of torch in each process, on a CPU; None leaves it.
    """

    rows: int | None = None
    share: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        for field, name in (("rows", "batch"), ("threads", "threads")):
            if (value := getattr(self, field)) is not None:
                # frozen for everybody else
                object.__setattr__(self, field, whole(name, value, least=1))


class Opened:
    """A sweep with its model, items and plan, ready to be worked on.

    Args:
        pipeline: the model, where it is one in memory.

    Raises:
        ValueError: the configuration can't be run.
    """

    def __init__(self, config: SweepConfig, execution: Execution, pipeline: Any = None) -> None:
        if execution.threads is not None:
            torch.set_num_threads(execution.threads)
        self.config = config
        self.execution = execution
        # the user's functions are there, before anything is written
        own_scores(config.scores)
        image_scores(config.image_scores)
        own_features(config.features)
        self.task: Task = load_task(config, pipeline)
        self.groups: list[GroupItems] = open_items(config, self.task)
        self.scope = Scope(self.task.denoiser)
        self.plan: Plan = make_plan(config, self.task, self.groups, self.scope.sites)
        by_key = [edit for edit in self.plan.sets if edit.key_bias or edit.key_scale]
        if by_key:
            self.plan = replace(self.plan, keys=self._keys(frozenset().union(*(edit.sites for edit in by_key))))
            check_keys(by_key, self.plan.keys)
        of_grids = [name for name in dict.fromkeys(unit.kind for unit in self.plan.units) if KINDS[name].grids]
        if of_grids:
            self.plan = replace(self.plan, grids=self._grids(of_grids[0]))
        self._prefix: Prefix | None = None
        self._prepare_denoiser()

    def _prepare_denoiser(self) -> None:
        config, denoiser = self.config, self.task.denoiser
        if config.channels_last or (config.channels_last is None and prefers_channels_last(denoiser)):
            denoiser.to(memory_format=torch.channels_last)
        if config.autocast is not None:
            # of this module alone: encoders keep their dtype
            autocast = torch.autocast(self.task.device.type, getattr(torch, config.autocast))
            denoiser.forward = autocast(denoiser.forward)
        if config.compile:
            denoiser.compile()

    @property
    def notes(self) -> list[str]:
        """Remarks that a person should read before work starts."""
        return [group.note for group in self.groups if group.note]

    @property
    def share(self) -> bool:
        """True if edited forwards may take over work of clean ones."""
        return self.execution.share and not self.config.compile

    def _keys(self, sites: frozenset[str]) -> dict[str, int]:
        """How many keys sites have, from a forward."""
        with torch.inference_mode(), self.scope.record("entropy", sites=sorted(sites)) as recording:
            self.forward(1)
        table = recording.to_arrow()
        return dict(zip(table["site"].to_pylist(), table["keys"].to_pylist(), strict=True))

    def _grids(self, kind: str) -> dict[str, tuple[int, int]]:
        """The grids of tokens that sites of self-attention have as queries and keys, from a forward.

        Raises:
            ValueError: there is none, or a site has several; names the kind of unit that needs them.
        """
        found: dict[str, tuple[int, int]] = {}
        sites = [site.name for site in self.scope.sites if site.kind == "self"]
        if sites:
            with torch.inference_mode(), self.scope.record("entropy", sites=sites) as recording:
                self.forward(1)
            for row in recording.to_arrow().to_pylist():
                grid = row["grid_height"], row["grid_width"]
                if row["query_group"] != "image" or None in grid or row["keys"] != grid[0] * grid[1]:
                    continue
                if found.setdefault(row["site"], grid) != grid:
                    raise ValueError(
                        f"kinds: got {kind!r}, which needs one grid of tokens of each site, and {row['site']!r} has"
                        f" {found[row['site']]} and {grid}"
                    )
        if not found:
            raise ValueError(
                f"kinds: got {kind!r}, which is of self-attention from an image's tokens to the same ones; the model"
                " has no site of it"
            )
        return found

    def store(self, out: Path) -> RunStore:
        """The run directory, made if it is new.

        Raises:
            ValueError: it holds something else.
            DiskFull: there is no room for it.
        """
        units = [{**asdict(unit), "items": len(unit.items)} for unit in self.plan.units]
        with room():
            return RunStore(out, self.plan.identity, self.describe(), units)

    def describe(self) -> dict[str, Any]:
        """The manifest of a run but for its identity and units."""
        return {
            "config": self.config.absolute().as_dict(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "git_revision": git_revision(),
            "device": device_name(self.config.device),
            "threads": torch.get_num_threads(),
            "timesteps": list(self.plan.timesteps),
            "sites": [
                {"name": s.name, "kind": s.kind, "heads": s.heads, "head_dim": s.head_dim} for s in self.scope.sites
            ],
            "groups": [
                {
                    "name": group.name,
                    "description": group.description,
                    "items": len(group.swept),
                    "sources": group.source_count,
                    "reference_items": len(group.reference),
                }
                for group in self.groups
            ],
            "forwards": sum(unit.forwards for unit in self.plan.units),
        }

    @cached_property
    def _example(self) -> NoisyInputs:
        """The first items' inputs."""
        chosen: list[Any] = list(self.groups[0].swept[:2])
        edge = self.task.image_size
        gray = np.full((edge, edge, 3), 127, np.uint8)
        chosen = [replace(item, image=gray) if isinstance(item, PromptItem) else item for item in chosen]
        return self.task.noisy_inputs(self.task.prepare(chosen), self.plan.timesteps[0], self.config.seed)

    def forward(self, rows: int) -> torch.Tensor:
        """An unedited forward of so many rows of the first item, for measuring."""
        index = torch.zeros(rows, dtype=torch.long, device=self.task.device)
        return self.task.predict(self._example.rows(index))

    @property
    def prefix(self) -> Prefix:
        """The part of clean forwards that edited ones can take over, learned when it is first asked for."""
        if self._prefix is None:
            with torch.inference_mode():
                example = self._example
            self._prefix = learned_prefix(self.task, self.scope, example)
        return self._prefix

    def fit(self, store: RunStore | None = None) -> Fit:
        """How many rows go through at once, as it was chosen, or measured by whoever measured first in this run."""
        if self.execution.rows is not None:
            return Fit(self.execution.rows, self.execution.rows)
        if store is None:
            return self._measured_fit()
        with room():
            return store.fit() or store.fit(self._measured_fit()) or Fit(1, 1)

    def _measured_fit(self) -> Fit:
        with torch.inference_mode():
            self._example  # noqa: B018 (encoding it takes memory that forwards don't)
            items = max((len(unit.items) for unit in self._sharing_units), default=1)
            return fit(self.task.device, self.forward, self.sharing, items)

    @property
    def _sharing_units(self) -> list[Unit]:
        """The units whose edited forwards may take over work of clean ones."""
        return [unit for unit in self.plan.units if KINDS[unit.kind].shares]

    @cached_property
    def sharing(self) -> Sharing:
        """The memory of what edited forwards take over: of the kind of unit that needs most."""
        if not self.share or not self._sharing_units or not self.prefix.shares:
            return Sharing()
        found = []
        for kind in {unit.kind for unit in self._sharing_units}:
            edited = frozenset(edit.sites for edit in KINDS[kind].edits(self.plan))
            if not edited:
                continue
            with torch.inference_mode(), self.prefix.clean(edited) as cache:
                self.forward(1)
            copied = max(self.prefix.copied_bytes(cache, sites) for sites in edited)
            found.append(Sharing(cache.nbytes, copied))
        return Sharing(max((each.cached for each in found), default=0), max((each.copied for each in found), default=0))

    def context(self, store: RunStore) -> Context:
        """The context that the units of a run are computed with."""
        # measuring what fits may learn the prefix
        fit = self.fit(store)
        return Context(self.plan, self.groups, store, fit, self.share, self._prefix)
