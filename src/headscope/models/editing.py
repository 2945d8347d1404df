"""From what a user writes in `scope.edit(...)` to the HeadEdit of one attention call."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from headscope.models.recording import Forward, Recording
from headscope.ops import HeadEdit

if TYPE_CHECKING:
    from headscope.models.scope import Scope

Edits = Mapping[str, Sequence[int] | HeadEdit]
Fill = Tensor | Recording | Literal["uniform"] | None


class ActiveEdit:
    """The edits of one context.

    Attributes:
        sites: the names of the sites it edits.
        first_forward: the number of denoiser forwards the scope had seen when the context was entered.
    """

    def __init__(self, gates: dict[str, Tensor], fills: dict[str, Fill], rows: int, steps: range | None) -> None:
        self._gates = gates
        self._fills = fills
        self._rows = rows
        self._steps = steps
        self.first_forward = 0
        self.sites = frozenset(gates)

    @classmethod
    def build(cls, edits: Edits | Sequence[Edits], fill: Fill, steps: range | None, scope: "Scope") -> "ActiveEdit":
        """Check everything before the model runs, and turn lists of heads into gates [rows, heads]."""
        if steps is not None and not isinstance(steps, range):
            raise TypeError(f"steps: got {type(steps).__name__}, expected a range of denoiser forwards or None")
        if not isinstance(fill, (Tensor, Recording)) and fill not in (None, "uniform"):
            raise ValueError(f'fill: got {fill!r}, expected None, "uniform", a tensor or a Recording of head_output')
        if isinstance(fill, Recording) and not fill.records_head_output:
            raise ValueError('fill: got a Recording without head outputs, expected one of scope.record("head_output")')
        samples: Sequence[Edits] = [edits] if isinstance(edits, Mapping) else list(edits)
        if not samples:
            raise ValueError("edits: got an empty sequence, expected one mapping per sample")
        gates: dict[str, Tensor] = {}
        fills: dict[str, Fill] = {}
        for row, sample in enumerate(samples):
            for name, wanted in sample.items():
                site = scope.site(name)
                if isinstance(wanted, HeadEdit):
                    if len(samples) > 1:
                        raise TypeError(
                            f"edits[{row}][{name!r}]: got a HeadEdit, expected heads where edits differ by sample"
                        )
                    if wanted.gate is None:
                        raise ValueError(f"edits[{name!r}]: got a HeadEdit without a gate, expected edit.gate")
                    gates[name], fills[name] = wanted.gate, fill if wanted.fill is None else wanted.fill
                    continue
                gate = gates.setdefault(name, torch.ones(len(samples), site.heads))
                for head in wanted:
                    if not 0 <= head < site.heads:
                        raise ValueError(f"edits[{name!r}]: got head {head}, expected 0 to {site.heads - 1}")
                    gate[row, head] = 0.0
                fills[name] = fill
        return cls(gates, fills, len(samples), steps)

    def acts_in(self, forward: Forward) -> bool:
        return self._steps is None or forward.index - self.first_forward in self._steps

    def at(self, site: str, call: int, forward: Forward, query: Tensor) -> HeadEdit:
        """The edit of one attention call on `query` [batch, heads, queries, dim].

        Raises:
            ValueError: the batch isn't made of one row per sample of the edit.
        """
        batch, parts = query.shape[0], len(forward.branches)
        gate = self._gates[site].to(query.device)
        # a gate given as a tensor may name every row of the batch; a sequence of edits has one entry per sample
        by_row = self._rows == 1 and gate.shape[0] == batch
        if gate.shape[0] != 1 and not by_row:
            if gate.shape[0] * parts != batch:
                raise ValueError(
                    f"edits: got {gate.shape[0]} rows, expected 1 or one per sample; the batch at {site!r} has {batch}"
                    f" rows in {parts} guidance branch(es)"
                )
            gate = gate.repeat(parts, 1)
        fill = self._fills[site]
        if isinstance(fill, Recording):
            timestep = forward.single_timestep()
            means = [fill.mean_head_output(site, call, timestep, branch) for branch in forward.branches]
            stacked = torch.stack(means).to(query.device, query.dtype)
            fill = stacked if parts == 1 else stacked.repeat_interleave(batch // parts, 0)
        elif isinstance(fill, Tensor):
            fill = fill.to(query.device)
        return HeadEdit(gate, fill)
