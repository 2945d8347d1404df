"""The recording that a `scope.record(...)` context makes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor

from headscope._extras import require
from headscope._files import local_path, write_atomic
from headscope.models.hooks.caches import Reused
from headscope.models.hooks.calls import SiteCall
from headscope.models.hooks.forwards import Forward
from headscope.models.recording.parts import (
    COUNT,
    ENTROPY,
    NORMALISED,
    ClassNumbers,
    Part,
    PartRows,
    Reduced,
    normalised,
    reduced,
    split_queries,
)
from headscope.models.recording.plots import heatmaps
from headscope.models.recording.regions import (
    CounterpartMass,
    Inside,
    QueryClasses,
    check_samples,
    placed,
    regions_of,
)
from headscope.models.recording.tables import build_dataset, build_table, query_maps
from headscope.models.recording.tensors import HeadTensors, Key, Reduce
from headscope.models.structure.layout import ALL, IMAGE, Segment
from headscope.ops import STATISTICS, GroupMass, Statistic

if TYPE_CHECKING:
    import pyarrow

HEAD_OUTPUT = "head_output"
# beside the names of statistics of regions, among what a recording met with
_CLASSES = "classes of queries"
TABLE_FILE, TENSOR_FILE = "statistics.parquet", "tensors.safetensors"


class Recording:
    """Per-head statistics and tensors of every attention call made inside the context.

    Statistics are reduced over the queries of each query group, per sample and head, when a forward of the denoiser
    ends: calls of one shape together. All stays on the model's device until a table is asked for, and then comes over
    at once.

    Attributes:
        requested: the recorded statistics; empty in one that was loaded.
        statistics: their names.
        quantities: which of head_output, q, k and v are recorded.
        reduce: "mean" (statistics over queries, tensors over samples), or None (each query and each sample).
        classes: the classes of queries per which statistics are reduced besides; None in one that was loaded.
        query_classes: their names.
        regions: of each statistic of regions the regions' names, in the order of its lists.
        reused: the sites that forwards went without, because a cache of diffusers had their attention or their layer
            was skipped: (site, step, branch). Nothing of them is recorded in those forwards.
    """

    def __init__(
        self,
        requested: Sequence[Statistic],
        quantities: Sequence[str] = (),
        reduce: Reduce = "mean",
        classes: QueryClasses | None = None,
    ) -> None:
        self.requested = tuple(requested)
        self.statistics = tuple(statistic.name for statistic in requested)
        self.classes = classes
        self.query_classes = () if classes is None else classes.names
        of_regions = {one.name: regions_of(one) for one in requested if not isinstance(one, CounterpartMass)}
        self.regions = {name: regions.names for name, regions in of_regions.items() if regions is not None}
        self.quantities = tuple(quantities)
        self.reduce: Reduce = reduce
        self.reused: list[Reused] = []
        self.tensors = HeadTensors(reduce)
        # how many of the denoiser's forwards the scope had seen when the context was entered
        self.first_forward = 0
        # the forwards of earlier contexts, where it goes on in a new one, and those of all so far
        self._forwards_before = 0
        self._forwards = 0
        self._active = False
        self.reduced: list[Reduced] = []
        self._pending: list[PartRows] = []
        self._numbers: list[ClassNumbers] = []
        # what of regions and classes was met with
        self._met: set[str] = set()
        self._calls = 0
        self._calls_in_forward = 0
        self._loaded: Any = None
        # made of a file's means, which don't say of how many samples they are
        self._read = False

    def __len__(self) -> int:
        """The number of attention calls recorded."""
        return self._calls

    def __repr__(self) -> str:
        what = ", ".join([*self.statistics, *self.quantities])
        return f"Recording({what}; {self._calls} attention calls, {len(self.tensors)} tensors)"

    @property
    def records_head_output(self) -> bool:
        return HEAD_OUTPUT in self.quantities

    def same_request(self, other: "Recording") -> bool:
        return self._request == other._request

    @property
    def _request(self) -> tuple[Any, ...]:
        return self.statistics, self.quantities, self.reduce, self.query_classes, self.regions

    def check_continues(self, asked: "Recording") -> None:
        """Raises ValueError unless this recording can go on with what another one was asked for."""
        request = ", ".join([*asked.statistics, *asked.quantities])
        if not self.same_request(asked):
            classes = f", queries of {', '.join(asked.query_classes)}" if asked.query_classes else ""
            raise ValueError(f"into: got {self!r}, expected a recording of {request}, reduce={asked.reduce!r}{classes}")
        if self._active:
            raise ValueError(f"into: got {self!r}, whose context is active still, expected one that has ended")
        if self._read:
            raise ValueError(
                f"into: got {self!r}, which was read from a file and doesn't say how many samples its means are of,"
                " expected one of this session"
            )

    def go_on(self, asked: "Recording") -> None:
        """Go on with what another one was asked for: masks are those of the samples to come."""
        self.check_continues(asked)
        self.requested, self.classes = asked.requested, asked.classes

    def enter(self, first_forward: int) -> None:
        """A context begins, after so many of the scope's forwards."""
        self.first_forward = first_forward
        self._forwards_before = self._forwards
        self._active = True

    def leave(self) -> None:
        """The context has ended."""
        self._active = False

    def step_of(self, forward: Forward) -> int:
        """The pipeline's step, or the number of the forward where no pipeline counts."""
        return self._number_of(forward) if forward.step is None else forward.step

    def _number_of(self, forward: Forward) -> int:
        return self._forwards_before + forward.index - self.first_forward

    def add_statistics(self, call: SiteCall, values: dict[str, Tensor], valid_keys: Tensor | int, keys: int) -> None:
        """Take one call's statistics, which are reduced when the forward ends.

        Args:
            values: by name, [rows, heads, queries], or with a last dimension of groups; sums over queries are
                [rows, heads, keys]. Statistics of regions are missing where the keys are no image.
            valid_keys: how many keys each row may see, an int or broadcastable to [rows, heads, queries].
        """
        self._calls_in_forward += 1
        site, number, forward, layout = call
        step, forward_number = self.step_of(forward), self._number_of(forward)

        def part_of(segment: Segment, heads: int, queries: int) -> Part:
            place = (len(self._pending), forward, forward_number, step, site.name, number, segment)
            return Part(*place, layout.first_sample, layout.samples, heads, queries, keys)

        # the classes of each piece's queries, and a part of theirs
        classed: dict[Segment, tuple[Part, Inside]] = {}
        for statistic in self.requested:
            name = statistic.name
            if name not in values:
                continue
            tensor = values[name].detach() if values[name].requires_grad else values[name]
            heads, apart = tensor.shape[1], isinstance(statistic, CounterpartMass)
            if statistic.sums_over_queries:
                # one number per key, of all queries together
                total = tensor.unflatten(0, (layout.samples, layout.fold)).transpose(1, 2).flatten(2)
                self._pending.append(PartRows(part_of(Segment(ALL, None, 0, 0), heads, 0), name, total[:, :, None]))
                continue
            rows = {name: tensor}
            if name == ENTROPY and isinstance(valid_keys, Tensor):
                rows[NORMALISED] = normalised(tensor, valid_keys)
            for column, whole in rows.items():
                for segment, piece in split_queries(whole, layout):
                    part = part_of(segment, heads, piece.shape[2])
                    inside = self._classes_of(call, segment, tensor.device)
                    if inside is not None:
                        classed[segment] = part, inside
                    elif apart:
                        continue
                    self._pending.append(PartRows(part, column, piece, inside, apart))
            self._met.add(name)
        self._number_classes(call, classed)

    def _classes_of(self, call: SiteCall, segment: Segment, device: torch.device) -> Inside | None:
        """The classes of the queries of a group; None where there are none, or nothing is known of their places."""
        if self.classes is None or segment.group != IMAGE:
            return None
        inside = self.classes.at(call, device)
        return inside if inside is not None and segment.stop - segment.start == inside.tokens else None

    def _number_classes(self, call: SiteCall, classed: Mapping[Segment, tuple[Part, Inside]]) -> None:
        """Take the sizes of a call's classes, and the shares of its keys that are in each region."""
        for part, inside in classed.values():
            self._met.add(_CLASSES)
            self._numbers.append(ClassNumbers(part, COUNT, inside.counts, inside))
            for statistic in self.requested:
                if not isinstance(statistic, GroupMass) or statistic.regions is None:
                    continue
                found = placed(statistic, call, part.keys, inside.mask.device)
                if found is not None:
                    share = found.of_classes(len(inside.names))
                    self._numbers.append(ClassNumbers(part, f"{statistic.name}_share", share, inside))

    def begin_forward(self, forward: Forward) -> None:
        """Forget what is left of a forward that neither ended nor was dropped: an interrupt came in between.

        Raises:
            ValueError: regions or classes of queries are of other samples than the forward's.
        """
        check_samples(self.requested, self.classes, forward)
        self._pending, self._numbers = [], []
        self._calls_in_forward = 0
        self.tensors.begin_forward()

    def end_forward(self, forward: Forward) -> None:
        """Reduce what the forward gave: calls of one shape in one go."""
        self._forwards = self._number_of(forward) + 1
        self._calls += self._calls_in_forward
        self._calls_in_forward = 0
        pending, numbers, self._pending, self._numbers = self._pending, self._numbers, [], []
        self.reduced += reduced(pending, numbers, keep_rows=self.reduce is None)
        self.tensors.end_forward(forward)

    def drop(self, forward: Forward) -> None:
        """Forget a forward that did not end."""
        self._forwards = self._number_of(forward) + 1
        self._pending, self._numbers = [], []
        self._calls_in_forward = 0
        self.tensors.drop(forward)

    def check_met(self) -> None:
        """Raises ValueError where statistics of regions, or classes of queries, were met with in no attention call."""
        for name in [one.name for one in self.requested if regions_of(one) is not None] if self._calls else ():
            if name not in self._met:
                raise ValueError(
                    f"statistics: {name!r} is of regions of the picture, and no attention call of the recorded sites"
                    " has image tokens of known places as keys; expected sites of self- or joint attention among them"
                )
        if self._calls and self.classes is not None and _CLASSES not in self._met:
            raise ValueError(
                "queries: no attention call of the recorded sites has image tokens of known places as queries, of which"
                " there could be classes"
            )

    # means over samples

    def mean(self, quantity: str, site: str, call: int, timestep: float, branch: str | None = None) -> Tensor:
        """The mean of head_output, q, k or v over recorded samples, [heads, tokens, dim], float32.

        Where the model folds frames or pixels into the batch, [rows per sample, heads, tokens, dim].

        Raises:
            KeyError: nothing was recorded for this site, call, timestep and branch.
        """
        mean = self.tensors.mean(Key.of(quantity, site, call, timestep, branch))
        return mean[0] if mean.shape[0] == 1 else mean

    def mean_head_output(self, site: str, call: int, timestep: float, branch: str | None) -> Tensor:
        """`mean("head_output", ...)`."""
        return self.mean(HEAD_OUTPUT, site, call, timestep, branch)

    def samples(
        self, quantity: str, site: str, call: int, timestep: float, branch: str | None = None, visit: int = 0
    ) -> Tensor:
        """head_output, q, k or v of every recorded sample, [samples, heads, tokens, dim], in the model's dtype.

        Args:
            visit: how many earlier steps of the pipeline's call had this timestep (PNDM's and Heun's schedules repeat
                some).

        Raises:
            KeyError: nothing was recorded for this site, call, timestep and branch.
            ValueError: the recording holds means.
        """
        found = self.tensors.samples(Key.of(quantity, site, call, timestep, branch, visit))
        return found[:, 0] if found.shape[1] == 1 else found

    def include_means(self, other: "Recording") -> None:
        """Take another recording's samples into the means of this one, as if both had been recorded together.

        Raises:
            ValueError: one of them isn't of tensors alone, holds every sample, or was read from a file; or they are of
                other quantities.
        """
        for one in (self, other):
            if one.statistics or one._read:
                raise ValueError(f"other: got {other!r} for {self!r}, expected two of tensors alone, of this session")
        if self.quantities != other.quantities:
            raise ValueError(f"other: got {other!r}, expected a recording of {', '.join(self.quantities)}")
        self.tensors.include(other.tensors)

    def take(self, samples: Sequence[int]) -> "Resampled":
        """A fill or patch that gives row i of a batch what sample `samples[i]` of this recording had.

        A single index serves every row.

        Raises:
            TypeError: an index that is no whole number.
            ValueError: a negative one, or none.
        """
        for index in samples:
            if isinstance(index, bool) or not isinstance(index, Integral):
                raise TypeError(f"samples: got an entry {index!r} of type {type(index).__name__}, expected indices")
            if index < 0:
                raise ValueError(f"samples: got {index}, expected indices from 0")
        if not len(samples):
            raise ValueError("samples: got none, expected one per row, or one for all")
        return Resampled(self, tuple(samples))

    # tables

    def to_arrow(self) -> "pyarrow.Table":
        """A row per forward, attention call, query group, sample and head; calls in the order of execution.

        What is in `reused` has none.

        Columns: forward (of the denoiser, since the context was entered; `into` counts on), step (the pipeline's; the
        forward where no pipeline counts), timestep (the scheduler's), site, call (within that forward), sample (within
        its guidance branch), branch ("uncond", "cond", "perturbed", "skip", "modality", "image", "part_0", "part_1",
        ... where the pipeline's source doesn't name a part of the batch, "unknown"; null where there is no guidance),
        head, query_group ("image", "text", "frame", or "all" where the model doesn't tell), frame (of a video, else
        null), queries, keys, grid_height and grid_width (those queries, row by row; null where the model doesn't tell),
        and for each statistic its mean, std (population form), min and max over those queries (nats for entropy,
        logsumexp and max_logit; 0..1 for max_prob). entropy_normalised_mean is the mean of H / ln(valid keys), each row
        divided by its own; null where rows see a single key. Statistics of several numbers are lists. With reduce=None
        a column of the statistic's own name holds the list of every query's value.

        With classes of queries there are further rows for each of them, and a column query_class, their name; it is
        null in the rows over all queries of a group. Of a class's rows, queries is the number of its tokens, the
        statistics have their mean over those (null where there are none), and a mass of regions has a column NAME_share
        besides: of the call's keys, which share is in each region, as its mass would be under uniform attention.
        Statistics of regions are null in rows of attention to other keys than the image's.
        """
        if self._loaded is not None:
            return self._loaded
        return build_table(self.reduced, self.classes is not None)

    def to_polars(self):
        """`to_arrow()` as a polars DataFrame."""
        return require("polars", "diffusers").from_arrow(self.to_arrow())

    def to_xarray(self):
        """The numbers of `to_arrow()` as an xarray Dataset.

        A variable per statistic and reduction, with dimensions forward, site, call, branch, sample, head, query_group
        and frame, NaN where the model has no such number (sites differ in their heads and groups); coordinates step and
        timestep along forward (timestep along branch and sample as well, where a batch has several). Lists (statistics
        of several numbers, every query's value) are left to `to_arrow`.

        Raises:
            ImportError: xarray is not installed; the message names the extra.
        """
        return build_dataset(self.to_arrow(), require("xarray", "xarray"))

    def plot(
        self,
        statistic: str,
        site: str,
        heads: Sequence[int] | None = None,
        *,
        step: int | None = None,
        sample: int = 0,
        branch: str | None = None,
        frame: int | None = None,
        call: int | None = None,
        image: Any = None,
    ) -> Any:
        """A plotly figure: a statistic of each query over the picture, a map per head.

        Args:
            statistic: one that was recorded with reduce=None.
            heads: all if None.
            step: the pipeline's step; the mean over all if None.
            branch: a guidance branch; the mean over all if None.
            frame: of a video.
            call: the attention call within the site; to be named where there are several (IP-Adapter).
            image: what was drawn for that sample (PIL, or an array [height, width, 3]), shown first.

        Raises:
            ValueError: the recording holds means only, nothing in it fits, or the model does not tell where a query
                is.
        """
        maps = query_maps(self.to_arrow(), statistic, site, heads, step, sample, branch, frame, call)
        units = [STATISTICS[statistic].unit] if statistic in STATISTICS else []
        return heatmaps(
            {f"head {head}": values for head, values in maps.items()}, ", ".join([statistic, *units]), image
        )

    # files

    def save(self, folder: str | Path) -> None:
        """Write statistics.parquet and tensors.safetensors; each is written whole or not at all.

        Both carry the same id, so that `load` never mixes an old file with a new one.
        """
        parquet = require("pyarrow.parquet", "diffusers")
        save_tensors = require("safetensors.torch", "diffusers").save
        folder, identity = local_path("folder", folder), uuid4().hex
        settings = {
            "statistics": self.statistics,
            "quantities": self.quantities,
            "reduce": self.reduce,
            "reused": self.reused,
            "query_classes": self.query_classes,
            "regions": self.regions,
        }
        described = {"headscope": json.dumps(settings), "id": identity}
        tensors = {json.dumps(key): tensor for key, tensor in self.tensors.stored()}
        write_atomic(folder / TENSOR_FILE, save_tensors(tensors, metadata=described))
        table = self.to_arrow().replace_schema_metadata(described)
        write_atomic(folder / TABLE_FILE, lambda file: parquet.write_table(table, file, compression="zstd"))

    @classmethod
    def load(cls, folder: str | Path) -> "Recording":
        """A recording that `save` wrote: its table, and its tensors for fills and patches.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the two files are not of one recording.
        """
        parquet = require("pyarrow.parquet", "diffusers")
        safe_open = require("safetensors", "diffusers").safe_open
        folder = local_path("folder", folder)
        table = parquet.read_table(folder / TABLE_FILE)
        described = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        with safe_open(str(folder / TENSOR_FILE), "pt") as file:
            if (file.metadata() or {}).get("id") != described.get("id") or "headscope" not in described:
                raise ValueError(f"folder: the files in {str(folder)!r} are not of one recording; save it again")
            settings = json.loads(described["headscope"])
            recording = cls((), settings["quantities"], settings["reduce"])
            recording.statistics = tuple(settings["statistics"])
            # files of earlier versions don't say
            recording.reused = [Reused(*entry) for entry in settings.get("reused", ())]
            recording.query_classes = tuple(settings.get("query_classes", ()))
            recording.regions = {name: tuple(names) for name, names in settings.get("regions", {}).items()}
            for name in file.keys():  # noqa: SIM118
                recording.tensors.put(Key.of(*json.loads(name)), file.get_tensor(name))
        recording._loaded, recording._read = table, True
        return recording

    def to_tensors(self) -> dict[str, Tensor]:
        """The mean head outputs, named for safetensors; `from_tensors` is the inverse."""
        return {
            "|".join((key.site, str(key.call), repr(key.timestep), key.branch or "")): self.mean(*key[:5])
            .cpu()
            .contiguous()
            for key in self.tensors.kept()
            if key.quantity == HEAD_OUTPUT
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Recording":
        """A recording of mean head outputs that `to_tensors` wrote."""
        recording = cls((), (HEAD_OUTPUT,))
        recording._read = True
        for name, tensor in tensors.items():
            site, call, timestep, branch = name.split("|")
            key = Key.of(HEAD_OUTPUT, site, int(call), float(timestep), branch or None)
            # [heads, queries, dim], or with the rows per sample in front
            recording.tensors.put(key, tensor[None, None] if tensor.ndim == 3 else tensor[None])
        return recording


@dataclass(frozen=True)
class Resampled:
    """Other samples' tensors, as fills and patches take them: see `Recording.take`."""

    recording: Recording
    chosen: tuple[int, ...]
