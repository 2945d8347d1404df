"""A sweep of every head against the loop a researcher would write, on the same work in one run.

    python bench/sweeps.py [--model bundled] [--device cpu] [--dtype float32] [--sites 0] [--out bench/results]
    python bench/sweeps.py --model sd15 --device cuda --dtype float16

Models: bundled, and with random weights sd15, sdxl, flux: real sizes on a GPU, small stand-ins on a CPU
(headscope.bench.denoisers).

The loop: stock diffusers with torch's SDPA, one edit per forward, a head removed by zeroing its slice before the output
projection, at the batch of images that is fastest for it (tried first). headscope: the same edits as rows of a batch,
with each of its parts taken away in turn. Contenders are interleaved round by round, so that a busy machine slows all
of them; a speed-up is the median over rounds, with its quartiles. Numbers are checked first: wrong ones stop the run.

`--sites N` edits the heads of N sites alone, spread evenly over the order in which sites run, of each kind alike: what
an edit costs depends on how early its site runs. A unit's time is then that of its clean forward and that of its edits
times (all heads / edited ones), and the result says how much of a forward is left to run, on average over all heads and
over those edited, which should be alike. A whole forward takes the loop the same time whichever site it edits.
"""

import argparse
import copy
import datetime
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from headscope._machine import device_name, versions
from headscope.bench.denoisers import DENOISERS
from headscope.bench.encoders import give_encoders
from headscope.models import attending
from headscope.models.hooks import routing
from headscope.models.structure.sites import find_denoiser
from headscope.ops import AttentionResult
from headscope.sweep import Execution, SweepConfig
from headscope.sweep.compute.fitting import is_out_of_memory, prefers_channels_last
from headscope.sweep.compute.opened import Opened
from headscope.sweep.compute.unit import compute_unit
from headscope.sweep.plan.config import IN_MEMORY
from headscope.sweep.work.executors.member import Silent
from headscope.sweep.work.worker import work

TIMESTEP = 500
# of one group; a unit holds as many
ITEMS = 4
# the loop's batches are doubled from the first until two in a row are hardly faster than those before
FIRST_LOOP_BATCH, LAST_LOOP_BATCH = 4, 256
PAYS = 1.02
# of a loss, relative to the loop's
TOLERANCE_OF_FLOAT32 = 1e-5
LOOP, WHOLE = "the loop", "headscope"


@contextmanager
def two_passes() -> Iterator[None]:
    """Inside, edited attention is torch's own, and the gate comes after it: what the fused kernel saves."""

    def attention(query, key, value, *, edit, statistics, **options) -> AttentionResult:
        assert edit.fill is None, "zeros"
        # past the routing, which would come back here
        output = routing._stock(query, key, value, **options)
        return AttentionResult(output * edit.gate.to(output.dtype)[..., None, None], {})

    fused, attending.attention = attending.attention, attention
    try:
        yield
    finally:
        attending.attention = fused


@dataclass(frozen=True)
class Contender:
    """A way for headscope to run the sweep.

    Attributes:
        part: what it does without, to be said in the result; "" where nothing.
        channels_last: None as the sweep chooses.
        around: a context in which it runs.
    """

    part: str = ""
    execution: Execution = field(default_factory=Execution)
    channels_last: bool | None = None
    compile: bool = False
    graphs: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def contenders(denoiser: nn.Module, compile: bool) -> dict[str, Contender]:
    """headscope, and headscope without each of its parts that this model and device have."""
    found = {
        WHOLE: Contender(),
        "headscope without sharing": Contender("sharing", Execution(share=False)),
        "headscope without fused attention": Contender("fused attention", around=two_passes),
    }
    if prefers_channels_last(denoiser):
        found["headscope without channels_last"] = Contender("channels_last", channels_last=False)
        found["headscope with neither"] = Contender(
            "sharing and channels_last", Execution(share=False), channels_last=False
        )
    if compile:
        # compiled forwards run whole
        found["headscope compiled, without sharing"] = Contender("", Execution(share=False), compile=True)
    if next(denoiser.parameters()).is_cuda:
        found["headscope with CUDA graphs"] = Contender(graphs=True)
    return found


class Models:
    """One pipeline for each way in which its weights lie or run: contenders that agree on that share it."""

    def __init__(self, name: str, device: str, dtype: str) -> None:
        torch.manual_seed(0)
        denoiser = DENOISERS[name](torch.device(device).type != "cpu", device, getattr(torch, dtype))
        self.description = denoiser.description
        self._first = denoiser.pipeline
        give_encoders(self._first)
        self._first.to(device)
        if dtype != "float32":
            self._first.to(getattr(torch, dtype))
        self.device, self.dtype = device, dtype
        self.denoiser: nn.Module = find_denoiser(self._first)
        self._copies: dict[tuple[bool, bool], Any] = {(False, False): self._first}

    def pipeline(self, channels_last: bool | None, compile: bool = False) -> Any:
        chosen = prefers_channels_last(self.denoiser) if channels_last is None else channels_last
        if (chosen, compile) not in self._copies:
            self._copies[chosen, compile] = copy.deepcopy(self._first)
        return self._copies[chosen, compile]

    def open(self, contender: Contender, sites: tuple[str, ...]) -> Opened:
        config = SweepConfig(
            model=IN_MEMORY,
            groups=("faces",),
            splits=("confirm",),
            items=ITEMS,
            timesteps=(TIMESTEP,),
            observe=False,
            fills=("zero",),
            sites=sites,
            device=self.device,
            dtype=self.dtype,
            channels_last=contender.channels_last,
            compile=contender.compile,
            graphs=contender.graphs,
        )
        return Opened(config, contender.execution, self.pipeline(contender.channels_last, contender.compile))


class Loop:
    """One edit per forward, as one would write it, on the sites that the sweep edits."""

    def __init__(self, models: Models, sites: tuple[str, ...]) -> None:
        self.opened = models.open(Contender(channels_last=False), sites)
        self.task = self.opened.task
        edited = {site for site, _ in self.opened.plan.heads}
        self.sites = [site for site in self.opened.scope.sites if site.name in edited]

    def losses(self, inputs: Any, site: Any, head: int) -> torch.Tensor:
        width = slice(head * site.head_dim, (head + 1) * site.head_dim)

        def zero(module, args):
            hidden = args[0].clone()
            hidden[..., width] = 0
            return (hidden, *args[1:])

        handles = [module.register_forward_pre_hook(zero) for module in joining(self.task.denoiser, site.name)]
        try:
            return self.task.loss(inputs)
        finally:
            for handle in handles:
                handle.remove()

    def inputs(self, batch: int) -> Any:
        items = self.opened.groups[0].swept
        prepared = self.task.noisy_inputs(self.task.prepare(items), TIMESTEP)
        return prepared.rows(torch.arange(batch, device=self.task.device) % len(items))

    def edits_per_second(self, batch: int) -> float:
        """One head of every site: a whole forward takes the same time whichever head it edits."""
        inputs = self.inputs(batch)
        synchronise(self.opened.config.device)
        started = time.perf_counter()
        with torch.inference_mode():
            for site in self.sites:
                self.losses(inputs, site, 0)
        synchronise(self.opened.config.device)
        return batch * len(self.sites) / (time.perf_counter() - started)


def joining(denoiser: Any, site: str) -> list[nn.Module]:
    """The projections behind a site's attention, in whose input the heads lie side by side."""
    attention = denoiser.get_submodule(site)
    found: list[nn.Module] = []
    if getattr(attention, "to_out", None) is not None:
        found.append(attention.to_out[0])
    if getattr(attention, "to_add_out", None) is not None:
        found.append(attention.to_add_out)
    # Flux's single blocks project attention and MLP together, the attention first
    return found or [denoiser.get_submodule(f"{site.rpartition('.')[0]}.proj_out")]


class Engine:
    """One unit of ablations, computed and kept in memory."""

    def __init__(self, models: Models, contender: Contender, sites: tuple[str, ...]) -> None:
        self.opened = models.open(contender, sites)
        self.contender = contender
        self.folder = tempfile.TemporaryDirectory()
        store = self.opened.store(Path(self.folder.name) / "run")
        self.context = self.opened.context(store)
        self.unit = next(unit for unit in self.opened.plan.units if unit.kind == "ablations")
        self.tables: list[Any] = []
        self.heads = sum(site.heads for site in self.opened.scope.sites)

    def edits_per_second(self) -> float:
        """Of a sweep of all heads."""
        device, edited = self.opened.config.device, len(self.opened.plan.heads)
        clean: list[float] = []

        def advance(forwards: int) -> None:
            # the first to be heard of are the clean ones
            if not clean:
                synchronise(device)
                clean.append(time.perf_counter() - started)

        synchronise(device)
        started = time.perf_counter()
        with self.contender.around():
            self.tables.append(compute_unit(self.unit, self.context, advance).table)
        synchronise(device)
        taken = time.perf_counter() - started
        pieces = math.ceil(len(self.unit.items) / self.context.rows.most)
        edits = taken - pieces * clean[0]
        return len(self.unit.items) * self.heads / (taken + (self.heads / edited - 1) * edits)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def spread(models: Models, count: int) -> tuple[tuple[str, ...], dict[str, float]]:
    """The names of `count` sites (all for 0), and the mean share of a forward's module calls that is left to an edited
    one, over all heads and over those sites' heads."""
    opened = models.open(Contender(), ())
    context = opened.context(opened.store(Path(tempfile.mkdtemp()) / "run"))
    with torch.inference_mode():
        inputs = opened.task.noisy_inputs(opened.task.prepare(opened.groups[0].swept), TIMESTEP)
        prefix = context.shared(inputs)
    sites = list(opened.scope.sites)
    chosen = sites
    if count and prefix:
        ordered = sorted(sites, key=lambda site: prefix._attention_at[site.name])
        chosen = []
        by_kind = {kind: [s for s in ordered if s.kind == kind] for kind in sorted({site.kind for site in sites})}
        for own in by_kind.values():
            part = min(len(own), max(1, round(count / len(by_kind))))
            # the middles of equal parts
            chosen += [own[(2 * index + 1) * len(own) // (2 * part)] for index in range(part)]

    def left(of: list) -> float:
        if prefix is None:
            return 1.0
        return float(np.average([prefix.fraction_left([s.name]) for s in of], weights=[s.heads for s in of]))

    return tuple(site.name for site in chosen), {"all heads": left(sites), "edited heads": left(chosen)}


def expected_losses(loop: Loop, batch: int) -> dict[tuple[str, int], np.ndarray]:
    """The loop's, of each item (of the first alone where the batch is smaller), by site and head."""
    inputs = loop.inputs(batch)
    with torch.inference_mode():
        return {
            (site.name, head): loop.losses(inputs, site, head)[:ITEMS].cpu().numpy()
            for site in loop.sites
            for head in range(site.heads)
        }


def largest_difference(found: dict[Any, np.ndarray], expected: dict[Any, np.ndarray]) -> float:
    """Relative, NaN where one is."""
    return float(np.max([np.abs(found[key] / losses[: len(found[key])] - 1).max() for key, losses in expected.items()]))


def check(loop: Loop, engines: dict[str, Engine]) -> dict[str, float]:
    """The largest relative difference of any head's loss from the loop's; stops the run where it is too large.

    The loop's own losses change with its batch, by rounding, in 16 bits and TF32 visibly. headscope's may be off by
    four times as much, or by 1e-5 in float32 and the rounding of a prediction in 16 bits (a thousandth in float16),
    whichever is more. How that compares with what heads do to the loss is said beside it, root mean squares of both: a
    sweep of other heads would have 1.4.
    """
    expected = expected_losses(loop, ITEMS)
    own = max(largest_difference(expected_losses(loop, batch), expected) for batch in (1, 2 * ITEMS))
    dtype = getattr(torch, loop.opened.config.dtype)
    tolerance = max(4 * own, TOLERANCE_OF_FLOAT32 if dtype == torch.float32 else torch.finfo(dtype).eps)
    with torch.inference_mode():
        clean = loop.task.loss(loop.inputs(ITEMS)).cpu().numpy()
    found = {"tolerance": tolerance, "the loop in other batches": own}
    effect = np.concatenate([losses / clean - 1 for losses in expected.values()])
    found["median effect of a head"] = float(np.median(np.abs(effect)))
    for name, engine in engines.items():
        engine.edits_per_second()
        table = engine.tables.pop().to_pydict()
        if engine.contender.graphs:
            # the second use of a graph is compared with the forward itself
            engine.edits_per_second()
            if engine.context.forwards.reason:
                raise SystemExit(f"{name}: {engine.context.forwards.reason}")
        losses: dict[tuple[str, int], list[float]] = {}
        for site, head, edited in zip(table["site"], table["head"], table["edited"], strict=True):
            losses.setdefault((site, head), []).append(edited)
        own_losses = {key: np.array(values) for key, values in losses.items()}
        found[name] = largest_difference(own_losses, expected)
        error = np.concatenate([own_losses[key] / losses - 1 for key, losses in expected.items()])
        found[f"{name}, over the effect"] = float(np.sqrt(np.square(error).mean() / np.square(effect).mean()))
        if not found[name] <= tolerance:
            raise SystemExit(f"{name}: a head's loss is off by {found[name]:.2g}, expected at most {tolerance:.2g}")
    return found


def overhead(models: Models, sites: tuple[str, ...]) -> float:
    """The share of a sweep's time, with claims and commits to disk, that isn't spent in the denoiser's forward."""
    opened = models.open(Contender(), sites)
    inside = 0.0
    predict = opened.task.predict

    def timed(inputs):
        nonlocal inside
        started = time.perf_counter()
        answer = predict(inputs)
        synchronise(models.device)
        inside += time.perf_counter() - started
        return answer

    with tempfile.TemporaryDirectory() as folder:
        context = opened.context(opened.store(Path(folder) / "run"))
        unit = opened.plan.units[0]
        with torch.inference_mode():
            inputs = opened.task.noisy_inputs(opened.task.prepare(context.items(unit)), TIMESTEP)
        # learnt once for a whole run
        context.shared(inputs)
        opened.task.predict = timed
        started = time.perf_counter()
        work(context, "", Silent())
        return 1 - inside / (time.perf_counter() - started)


def best_batch(loop: Loop) -> tuple[int, dict[int, float]]:
    """The number of images at which the loop is fastest, and its edits a second at each that was tried."""
    speeds: dict[int, float] = {}
    batch = FIRST_LOOP_BATCH
    while batch <= LAST_LOOP_BATCH:
        try:
            speeds[batch] = max(loop.edits_per_second(batch) for _ in range(2))
        except Exception as error:
            if not is_out_of_memory(error) or not speeds:
                raise
            break
        *earlier, last, latest = [0.0, 0.0, *speeds.values()]
        if earlier and max(last, latest) < PAYS * max(earlier):
            break
        batch *= 2
    return max(speeds, key=speeds.__getitem__), speeds


def summary(rates: dict[str, list[float]], kinds_of: dict[str, Contender], heads: int) -> list[dict[str, Any]]:
    """A row for each contender: its speed, over the loop's, and what the part that it lacks is worth."""
    forward_rate = np.median(rates[LOOP])
    rows = []
    for name, values in rates.items():
        rate = np.array(values)
        row = {
            "contender": name,
            "edits_per_second": float(np.median(rate)),
            # an image is done when all of its heads are
            "images_per_second": float(np.median(rate) / heads),
            "forward_equivalents_per_item": float(heads * forward_rate / np.median(rate)),
            "times_the_loop": quartiles(rate / np.array(rates[LOOP])),
        }
        part = kinds_of[name].part if name in kinds_of else ""
        if part:
            row["worth"] = {"part": part, **quartiles(np.array(rates[WHOLE]) / rate)}
        rows.append(row)
    return rows


def quartiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{round(100 * at)}": float(np.quantile(values, at)) for at in (0.25, 0.5, 0.75)}


def shown(rows: list[dict[str, Any]]) -> Table:
    columns = ("edits/s", "images/s", "forward-equivalents per item", "times the loop (quartiles)", "the part is worth")
    table = Table("", *columns)
    for row in rows:
        over, worth = row["times_the_loop"], row.get("worth")
        table.add_row(
            row["contender"],
            f"{row['edits_per_second']:.1f}",
            f"{row['images_per_second']:.3g}",
            f"{row['forward_equivalents_per_item']:.1f}",
            f"{over['p50']:.2f} ({over['p25']:.2f} to {over['p75']:.2f})",
            f"{worth['part']} {worth['p50']:.2f}" if worth else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", choices=list(DENOISERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--sites", type=int, default=0, help="how many sites to edit; 0 for all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="by default on a GPU")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device).type
    models = Models(arguments.model, arguments.device, arguments.dtype)
    sites, left = spread(models, arguments.sites)
    loop = Loop(models, sites)
    compiled = device == "cuda" if arguments.compile is None else arguments.compile
    chosen = contenders(models.denoiser, compiled)
    engines = {name: Engine(models, contender, sites) for name, contender in chosen.items()}
    print(f"{models.description}, {len(engines)} contenders", flush=True)
    differences = check(loop, engines)
    print(f"numbers agree: {differences}", flush=True)
    batch, batches = best_batch(loop)
    print(f"the loop's edits a second by batch: {batches}", flush=True)
    calls: dict[str, Callable[[], float]] = {LOOP: lambda: loop.edits_per_second(batch)}
    calls |= {name: engine.edits_per_second for name, engine in engines.items()}
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            rates[name].append(call())
            print(
                f"{name}: {rates[name][-1]:.1f} edits/s, {rates[name][-1] / rates[LOOP][-1]:.2f} of the loop",
                flush=True,
            )
    heads = engines[WHOLE].heads
    rows = summary(rates, chosen, heads)
    result = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(arguments.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "model": arguments.model,
        "description": models.description,
        "dtype": arguments.dtype,
        "heads": heads,
        "edited_heads": len(engines[WHOLE].opened.plan.heads),
        "edited_sites": list(sites),
        "left_of_a_forward": left,
        "items": ITEMS,
        "rows_at_once": engines[WHOLE].context.rows.most,
        "loop_batch": batch,
        "loop_edits_per_second_by_batch": batches,
        "largest_relative_differences": differences,
        "overhead_share": overhead(models, sites),
        "rounds": arguments.rounds,
        "rows": rows,
    }
    console = Console(width=150)
    console.print(f"{result['device']}, {arguments.model} ({models.description}), {arguments.dtype}")
    console.print(shown(rows))
    console.print(
        f"{result['edited_heads']} of {heads} heads edited ({len(sites)} sites); left of a forward: all heads"
        f" {left['all heads']:.3f}, edited ones {left['edited heads']:.3f}; the loop's best batch is {batch} images;"
        f" a loss differs by at most {max(differences[name] for name in engines):.1e} (tolerance"
        f" {differences['tolerance']:.1e}; the loop in other batches {differences['the loop in other batches']:.1e}; of"
        f" what heads do to it {differences[f'{WHOLE}, over the effect']:.1%});"
        f" {result['overhead_share']:.1%} of a unit's time is outside of the denoiser"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = "" if arguments.model == "bundled" else f"{arguments.model}-"
    file = arguments.out / f"sweeps-{model}{device}-{arguments.dtype}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
