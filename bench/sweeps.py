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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from headscope.bench import records
from headscope.bench.denoisers import DENOISERS
from headscope.bench.timing import interleaved, ratio, wait
from headscope.sweep.compute.fitting import is_out_of_memory
from headscope.sweep.work.executors.member import Silent
from headscope.sweep.work.worker import work
from sweep_contenders import ITEMS, TIMESTEP, WHOLE, Contender, Engine, Loop, Models, contenders

# the loop's batches are doubled from the first until two in a row are hardly faster than those before
FIRST_LOOP_BATCH, LAST_LOOP_BATCH = 4, 256
PAYS = 1.02
# of a loss, relative to the loop's
TOLERANCE_OF_FLOAT32 = 1e-5
LOOP = "the loop"


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
        for alike in by_kind.values():
            part = min(len(alike), max(1, round(count / len(by_kind))))
            # the middles of equal parts
            chosen += [alike[(2 * index + 1) * len(alike) // (2 * part)] for index in range(part)]

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
    rounding = max(largest_difference(expected_losses(loop, batch), expected) for batch in (1, 2 * ITEMS))
    dtype = getattr(torch, loop.opened.config.dtype)
    tolerance = max(4 * rounding, TOLERANCE_OF_FLOAT32 if dtype == torch.float32 else torch.finfo(dtype).eps)
    with torch.inference_mode():
        clean = loop.task.loss(loop.inputs(ITEMS)).cpu().numpy()
    found = {"tolerance": tolerance, "the loop in other batches": rounding}
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
        found_losses = {key: np.array(values) for key, values in losses.items()}
        found[name] = largest_difference(found_losses, expected)
        error = np.concatenate([found_losses[key] / losses - 1 for key, losses in expected.items()])
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
        wait(models.device)
        inside += time.perf_counter() - started
        return answer

    with tempfile.TemporaryDirectory() as folder:
        context = opened.context(opened.store(Path(folder) / "run"))
        unit = opened.plan.units[0]
        with torch.inference_mode():
            inputs = opened.task.noisy_inputs(opened.task.prepare(context.items(unit)), TIMESTEP)
        # learned once for a whole run
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


def summary(rates: dict[str, np.ndarray], kinds_of: dict[str, Contender], heads: int) -> list[dict[str, Any]]:
    """A row for each contender: its speed, over the loop's, and what the part that it lacks is worth."""
    forward_rate = np.median(rates[LOOP])
    rows = []
    for name, rate in rates.items():
        row = {
            "contender": name,
            "edits_per_second": float(np.median(rate)),
            # an image is done when all of its heads are
            "images_per_second": float(np.median(rate) / heads),
            "forward_equivalents_per_item": float(heads * forward_rate / np.median(rate)),
            "times_the_loop": spread_of(rate, rates[LOOP]),
        }
        part = kinds_of[name].part if name in kinds_of else ""
        if part:
            row["worth"] = {"part": part, **spread_of(rates[WHOLE], rate)}
        rows.append(row)
    return rows


def spread_of(rate: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Quartiles of the ratio, round by round."""
    return dict(zip(("p25", "p50", "p75"), ratio(rate, other), strict=True))


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
    latest: dict[str, float] = {}

    def told(name: str) -> float:
        rate = latest[name] = calls[name]()
        print(f"{name}: {rate:.1f} edits/s, {rate / latest[LOOP]:.2f} of the loop", flush=True)
        return rate

    rates = interleaved({name: lambda name=name: told(name) for name in calls}, arguments.rounds, warm_up=0)
    heads = engines[WHOLE].heads
    rows = summary(rates, chosen, heads)
    result = {
        **records.machine(arguments.device),
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
    model = "" if arguments.model == "bundled" else f"{arguments.model}-"
    file = records.write(arguments.out / f"sweeps-{model}{device}-{arguments.dtype}.json", result)
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
