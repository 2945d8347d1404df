"""What a `scope.record(...)` context collects."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope._extras import require

if TYPE_CHECKING:
    import pyarrow

HEAD_OUTPUT = "head_output"


@dataclass(frozen=True)
class Forward:
    """One forward of the denoiser.

    Attributes:
        index: its number since the context was entered.
        timestep: [batch], on the model's device.
        branches: the guidance branch of each equal part of the batch, in order; None where there is no guidance.
    """

    index: int
    timestep: Tensor
    branches: tuple[str | None, ...]

    @property
    def batch(self) -> int:
        return self.timestep.shape[0]

    def single_timestep(self) -> float:
        """The timestep of the whole batch, read back from the device.

        Raises:
            ValueError: the samples have different timesteps.
        """
        values = self.timestep.unique().tolist()
        if len(values) != 1:
            raise ValueError(
                f"timestep: got {len(values)} different ones in a batch, expected one for mean head outputs"
            )
        return float(values[0])


@dataclass(frozen=True)
class _Call:
    """One recorded attention call: per statistic its mean and standard deviation over queries, [batch, heads]."""

    forward: Forward
    step: int
    site: str
    call: int
    queries: int
    keys: int
    columns: dict[str, Tensor]


class Recording:
    """Per-head statistics of every attention call made inside the context.

    Statistics are reduced over the call's queries as they are computed, per sample and head: the mean, and the
    standard deviation (population form). They stay on the model's device until a table is asked for.
    """

    def __init__(self, statistics: tuple[str, ...], head_output: bool, query_group: str = "image") -> None:
        self.statistics = statistics
        self.query_group = query_group
        self.records_head_output = head_output
        # how many of the denoiser's forwards the scope had seen when the context was entered
        self.first_forward = 0
        self._calls: list[_Call] = []
        self._sums: dict[tuple[str, int, float, str | None], Tensor] = {}
        self._counts: dict[tuple[str, int, float, str | None], int] = defaultdict(int)

    def __len__(self) -> int:
        """The number of attention calls recorded."""
        return len(self._calls)

    def __repr__(self) -> str:
        what = [*self.statistics, *([HEAD_OUTPUT] if self.records_head_output else [])]
        return f"Recording({', '.join(what)}; {len(self._calls)} attention calls, {len(self._sums)} mean head outputs)"

    def add(
        self, forward: Forward, site: str, call: int, values: dict[str, Tensor], valid_keys: Tensor | int, keys: int
    ) -> None:
        """Reduce one call's row statistics [batch, heads, queries] over queries and keep them.

        Args:
            valid_keys: how many keys each row may see, an int or broadcastable to [batch, heads, queries].
        """
        columns = {}
        queries = 0
        for name, rows in values.items():
            rows = rows.detach()
            queries = rows.shape[-1]
            columns[f"{name}_mean"] = rows.mean(-1)
            columns[f"{name}_std"] = rows.std(-1, correction=0)
            if name == "entropy":
                columns["entropy_normalised_mean"] = _normalised(rows, valid_keys).nanmean(-1)
        step = forward.index - self.first_forward
        self._calls.append(_Call(forward, step, site, call, queries, keys, columns))

    def add_head_output(self, forward: Forward, site: str, call: int, output: Tensor) -> None:
        """Add one call's head outputs [batch, heads, queries, dim] to the running sum of its timestep and branch."""
        timestep = forward.single_timestep()
        parts = output.detach().chunk(len(forward.branches))
        for branch, part in zip(forward.branches, parts, strict=True):
            key = (site, call, timestep, branch)
            total = part.sum(0, dtype=torch.float64 if part.device.type == "cpu" else torch.float32)
            self._sums[key] = self._sums[key] + total if key in self._sums else total
            self._counts[key] += part.shape[0]

    def mean_head_output(self, site: str, call: int, timestep: float, branch: str | None) -> Tensor:
        """The mean over recorded samples, [heads, queries, dim], float32.

        Raises:
            KeyError: nothing was recorded for this site, call, timestep and branch.
        """
        key = (site, call, timestep, branch)
        if key not in self._sums:
            known = sorted({entry[2] for entry in self._sums if entry[0] == site})
            raise KeyError(
                f"no head output was recorded at site {site!r}, call {call}, timestep {timestep:g}, branch {branch!r};"
                f" recorded timesteps there: {known}"
            )
        return (self._sums[key] / self._counts[key]).float()

    def to_tensors(self) -> dict[str, Tensor]:
        """The mean head outputs, named for safetensors; `from_tensors` is the inverse."""
        return {
            "|".join((site, str(call), repr(timestep), branch or "")): self.mean_head_output(*key).cpu().contiguous()
            for key in self._sums
            for site, call, timestep, branch in (key,)
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Recording":
        """A recording of mean head outputs that `to_tensors` wrote."""
        recording = cls((), True)
        for name, tensor in tensors.items():
            site, call, timestep, branch = name.split("|")
            key = (site, int(call), float(timestep), branch or None)
            recording._sums[key] = tensor
            recording._counts[key] = 1
        return recording

    def to_arrow(self) -> "pyarrow.Table":
        """A row per attention call, sample and head.

        Columns: step (the denoiser's forward since the context was entered), timestep (the scheduler's), site, call
        (within that forward), sample (within its guidance branch), branch ("cond", "uncond", or null where there is
        no guidance), head, query_group ("image", or "all" where image and text share a sequence), queries, keys, and
        for each statistic its mean and std over the queries (nats for entropy, logsumexp and max_logit; 0..1 for
        max_prob). entropy_normalised_mean is the mean of H / ln(valid keys), each row divided by its own; null where
        rows see a single key.
        """
        pa = require("pyarrow", "diffusers")
        tables = [self._call_table(call, pa) for call in self._calls]
        if not tables:
            return pa.table({})
        return pa.concat_tables(tables).combine_chunks().unify_dictionaries()

    def to_polars(self):
        """`to_arrow()` as a polars DataFrame."""
        return require("polars", "diffusers").from_arrow(self.to_arrow())

    def _call_table(self, call: _Call, pa) -> "pyarrow.Table":
        forward = call.forward
        heads = next(iter(call.columns.values())).shape[1]
        batch, parts = forward.batch, len(forward.branches)
        part = batch // parts
        rows = torch.arange(batch * heads)
        samples = rows // heads

        def repeated(value, arrow_type):
            return pa.repeat(pa.scalar(value, arrow_type), len(rows))

        def labels(values: list[str | None]):
            names = [name for name in dict.fromkeys(values) if name is not None]
            codes = [None if name is None else names.index(name) for name in values]
            indices = pa.array([codes[int(sample) // part] for sample in samples], pa.int8())
            return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()))

        def constant(name: str):
            indices = pa.array([0], pa.int16()).take(pa.array([0] * len(rows), pa.int32()))
            return pa.DictionaryArray.from_arrays(indices, pa.array([name], pa.string()))

        columns = {
            "step": repeated(call.step, pa.int32()),
            "timestep": pa.array(forward.timestep.double().cpu()[samples].numpy()),
            "site": constant(call.site),
            "call": repeated(call.call, pa.int16()),
            "sample": pa.array((samples % part).int().numpy()),
            "branch": labels(list(forward.branches)),
            "head": pa.array((rows % heads).short().numpy()),
            "query_group": constant(self.query_group),
            "queries": repeated(call.queries, pa.int32()),
            "keys": repeated(call.keys, pa.int32()),
        }
        for name, values in call.columns.items():
            columns[name] = pa.array(
                values.float().cpu().flatten().numpy(), from_pandas=name.startswith("entropy_norm")
            )
        return pa.table(columns)


def _normalised(entropy: Tensor, valid_keys: Tensor | int) -> Tensor:
    """H / ln(valid keys), NaN where a row sees fewer than two keys."""
    counts = torch.as_tensor(valid_keys, device=entropy.device, dtype=entropy.dtype)
    return torch.where(counts > 1, entropy / counts.log(), torch.nan)
