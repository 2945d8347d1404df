"""Recorded head outputs, queries, keys and values, by site, call, timestep and guidance branch."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headscope.models.hooks.calls import SiteCall
from headscope.models.hooks.forwards import Forward, comparable, single

QUANTITIES = ("head_output", "q", "k", "v")
Reduce = Literal["mean"] | None
# forwards whose timesteps are read back from a GPU together
_FORWARDS_AT_ONCE = 16
# the most bytes of means that stay on the device that edits took them to
_PLACED_BYTES = 256 * 2**20


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device; the host doesn't wait for a copy that it starts.

    Such a copy has left the host's memory, or its staging buffer has, when the call returns; one that ends in the
    host's memory may not have arrived, and MPS reads the host's memory later.
    """
    return tensor.to(device, dtype, non_blocking=tensor.device.type == "cpu" and device.type != "mps")


class Key(NamedTuple):
    """The place in a run of a recorded tensor; see `of`.

    Attributes:
        visit: `Forward.visit` where every sample is recorded; 0 for means over samples.
    """

    quantity: str
    site: str
    call: int
    timestep: float
    branch: str | None
    visit: int = 0

    @classmethod
    def of(
        cls, quantity: str, site: str, call: int, timestep: float, branch: str | None = None, visit: int = 0
    ) -> "Key":
        return cls(quantity, site, call, comparable(timestep), branch, visit)

    def __str__(self) -> str:
        again = f", visit {self.visit}" if self.visit else ""
        return (
            f"{self.quantity} at site {self.site!r}, call {self.call}, timestep {self.timestep:g},"
            f" branch {self.branch!r}{again}"
        )


class _Pending(NamedTuple):
    forward: Forward
    first_sample: int
    quantity: str
    site: str
    call: int
    branch: str | None
    rows: Tensor
    count: int


class HeadTensors:
    """Tensors [samples, rows per sample, heads, tokens, dim], or their sums over samples.

    Timesteps are on the device while the model runs; tensors wait under their forward until some are read together.
    """

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self._pending: list[_Pending] = []
        self._recorded: dict[Key, list[Tensor]] = defaultdict(list)
        self._counts: dict[Key, int] = defaultdict(int)
        # for each key with visit 0, the visits that were recorded, in order
        self._visits: dict[Key, dict[int, None]] = defaultdict(dict)
        self._placed: dict[tuple[Key, torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        self._settle()
        return len(self._recorded)

    def add_inputs(
        self, quantities: Collection[str], call: SiteCall, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Add those of one call's query, key and value that are among the quantities."""
        for quantity, tensor in (("q", query), ("k", key), ("v", value)):
            if quantity in quantities:
                self.add(quantity, call, tensor)

    def add(self, quantity: str, call: SiteCall, tensor: Tensor) -> None:
        """Add one call's tensor [rows, heads, tokens, dim]."""
        site, number, forward, layout = call
        rows = tensor.detach().unflatten(0, (layout.samples, layout.fold))
        for part, branch in enumerate(forward.branches):
            samples = forward.samples_of(part, layout)
            if not samples:
                continue
            start = part * forward.samples + samples.start
            chosen = rows[start - layout.first_sample :][: len(samples)]
            if self.reduce == "mean":
                dtype = torch.float64 if chosen.device.type == "cpu" else torch.float32
                chosen = chosen.sum(0, keepdim=True, dtype=dtype)
            else:
                chosen = chosen.clone()
            self._pending.append(_Pending(forward, start, quantity, site.name, number, branch, chosen, len(samples)))

    def begin_forward(self) -> None:
        """Forget what is left of a forward that never ended."""
        # its tensors came last, and as a rule there are none
        if self._pending and self._pending[-1].forward.totals is None:
            self.drop(self._pending[-1].forward)

    def end_forward(self, forward: Forward) -> None:
        forwards = len({id(pending.forward) for pending in self._pending})
        if forward.timestep.device.type == "cpu" or forwards >= _FORWARDS_AT_ONCE:
            self._settle()

    def drop(self, forward: Forward) -> None:
        """Forget a forward that did not end."""
        self._pending = [pending for pending in self._pending if pending.forward is not forward]

    def _settle(self) -> None:
        """Give pending tensors their timesteps, with one read for all of them."""
        forwards = list({id(pending.forward): pending.forward for pending in self._pending}.values())
        if not forwards:
            return
        flat = torch.cat([forward.timestep.double() for forward in forwards]).tolist()
        timesteps, position = {}, 0
        for forward in forwards:
            length = forward.timestep.numel()
            timesteps[id(forward)] = flat[position : position + length]
            position += length
        pending, self._pending = self._pending, []
        self._placed.clear()
        for entry in pending:
            known = timesteps[id(entry.forward)]
            if len(known) > 1:
                known = known[entry.first_sample : entry.first_sample + entry.count]
            visit = 0 if self.reduce == "mean" else entry.forward.visit
            key = Key(entry.quantity, entry.site, entry.call, single(known), entry.branch, visit)
            recorded = self._recorded[key]
            _check_alike(key, recorded, entry.rows)
            if self.reduce == "mean" and recorded:
                recorded[0] = recorded[0] + entry.rows
            else:
                recorded.append(entry.rows)
            self._counts[key] += entry.count
            self._add_visit(key)

    def include(self, other: "HeadTensors") -> None:
        """Add another's sums over samples to these, in float64 on the CPU.

        Raises:
            ValueError: one of the two holds every sample, or the samples' numbers of tokens differ.
        """
        if self.reduce != "mean" or other.reduce != "mean":
            raise ValueError("recording: it holds every sample, expected two of means over samples")
        for key in other.kept():
            rows, recorded = other._recorded[key][0].to("cpu", torch.float64), self._recorded[key]
            _check_alike(key, recorded, rows)
            self._recorded[key] = [recorded[0].to("cpu", torch.float64) + rows] if recorded else [rows]
            self._counts[key] += other._counts[key]
            self._add_visit(key)
        self._placed.clear()

    def _add_visit(self, key: Key) -> None:
        self._visits[_first_visit(key)][key.visit] = None

    def kept(self) -> list[Key]:
        """The keys of the recorded tensors."""
        self._settle()
        return list(self._recorded)

    def mean(self, key: Key) -> Tensor:
        """The mean over samples (and visits), [rows per sample, heads, tokens, dim], float32."""
        self._settle()
        first = _first_visit(key)
        if first not in self._visits:
            self._require(key)
        visits = [first._replace(visit=visit) for visit in self._visits[first]]
        rows = [tensor for visit in visits for tensor in self._recorded[visit]]
        total = torch.cat(rows).sum(0, dtype=None if self.reduce == "mean" else torch.float32)
        return (total / sum(self._counts[visit] for visit in visits)).float()

    def placed_mean(self, key: Key, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`mean` on that device and in that dtype, worked out and moved once for the forwards that ask for it."""
        self._settle()
        found = self._placed.get((key, device, dtype))
        if found is None:
            # ordinary tensors, which a later forward may save for its backward
            with torch.inference_mode(False), torch.no_grad():
                found = moved(self.mean(key), device, dtype)
            if sum(tensor.nbytes for tensor in self._placed.values()) + found.nbytes > _PLACED_BYTES:
                self._placed.clear()
            self._placed[key, device, dtype] = found
        return found

    def samples(self, key: Key) -> Tensor:
        """Every sample's tensor, in the order they were recorded, [samples, rows per sample, heads, tokens, dim]."""
        if self.reduce == "mean":
            raise ValueError("recording: it holds means over samples, expected one made with reduce=None")
        self._require(key)
        return torch.cat(self._recorded[key])

    def _require(self, key: Key) -> None:
        self._settle()
        if key not in self._recorded:
            alike = [known for known in self._recorded if (known.quantity, known.site) == (key.quantity, key.site)]
            if not alike:
                there = sorted({f"{known.quantity} at {known.site!r}" for known in self._recorded})
                listed = ", ".join(there) or "a run of the model inside the context"
                raise KeyError(f"no {key.quantity} at site {key.site!r} was recorded, expected {listed}")
            timesteps = sorted({known.timestep for known in alike})
            branches = sorted({str(known.branch) for known in alike})
            calls = sorted({known.call for known in alike})
            raise KeyError(
                f"no {key} was recorded; recorded timesteps there: {timesteps}, branches: {', '.join(branches)},"
                f" calls: {calls}"
            )

    def stored(self) -> Iterator[tuple[Key, Tensor]]:
        """The tensors for a file: means, or all samples; float32 or the model's dtype, on the CPU."""
        for key in self.kept():
            yield key, (self.mean(key)[None] if self.reduce == "mean" else self.samples(key)).cpu().contiguous()

    def put(self, key: Key, tensor: Tensor) -> None:
        """The inverse of `stored`."""
        self._recorded[key] = [tensor]
        self._add_visit(key)
        self._placed.clear()
        self._counts[key] = 1 if self.reduce == "mean" else tensor.shape[0]


def _check_alike(key: Key, recorded: list[Tensor], rows: Tensor) -> None:
    if recorded and recorded[0].shape[1:] != rows.shape[1:]:
        raise ValueError(
            f"recording: {key} has {rows.shape[3]} tokens in one sample and {recorded[0].shape[3]} in another, expected"
            " as many in all whose tensors are kept together (prompts of one length)"
        )


def _first_visit(key: Key) -> Key:
    return key._replace(visit=0) if key.visit else key
