"""Time and memory to write, verify and summarise a large run; polars and DuckDB beside each other.

    python bench/sweep_store.py [--rows 50000000] [--out bench/results] [--folder DIR]

Rows like those of a sweep of ablations over 1000 items, 50 timesteps and 40 sites of 25 heads, a unit per file. The
largest memory is the process's own peak (ru_maxrss), torch included.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from rich.console import Console

from headscope.bench import records
from headscope.bench.memory import peak_resident_bytes
from headscope.sweep import Run
from headscope.sweep.plan.heads import Edit
from headscope.sweep.store.rows import Grid
from headscope.sweep.store.store import RunStore

SITES, HEADS, ITEMS = 40, 25, 25


class Item:
    """An item's labels."""

    def __init__(self, index: int) -> None:
        self.index, self.group, self.split = index, "images", ("discover", "confirm")[index % 2]
        self.source_id = f"photograph-{index:05d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--folder", help="where the run is written for the while")
    arguments = parser.parse_args()
    edits = [
        Edit(f"blocks.{site}.attn", ((f"blocks.{site}.attn", head),)) for site in range(SITES) for head in range(HEADS)
    ]
    each = len(edits) * ITEMS
    units = [
        {
            "id": f"{number:064x}",
            "kind": "ablations",
            "group": "images",
            "items": ITEMS,
            "timestep": 0,
            "forwards": each,
        }
        for number in range(-(-arguments.rows // each))
    ]
    random = np.random.default_rng(0)
    loss = random.gamma(2.0, 0.05, (len(edits), 1, ITEMS))
    stages: list[dict[str, float | str]] = []
    console = Console()

    def stage(name: str, started: float) -> None:
        peak = peak_resident_bytes() / 2**20
        stages.append({"stage": name, "seconds": time.perf_counter() - started, "peak_megabytes": peak})
        console.print(f"{name:<22} {stages[-1]['seconds']:7.1f} s   peak {stages[-1]['peak_megabytes']:,.0f} MB")

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        stage("imports", time.perf_counter())
        store = RunStore(Path(folder) / "run", {"bench": "store"}, {"forwards": 0}, units)
        started = time.perf_counter()
        for number, unit in enumerate(units):
            grid = Grid(edits, ("zero",), ITEMS)
            index = np.arange(len(edits))[:, None]
            for name, values in (("clean", loss), ("edited", loss * random.uniform(0.9, 1.5, loss.shape))):
                grid.put(name, index, 0, np.arange(ITEMS), values[:, 0])
            items = [Item(number % 40 * ITEMS + position) for position in range(ITEMS)]
            table = grid.table(items, 0, True, timestep=pa.scalar(number // 40, pa.int32()))
            store.write_table("ablations", unit["id"], table)
            if number == len(units) // 10:
                stage("a tenth written", started)
        stage("written", started)
        size = sum(file.stat().st_size for file in store.path.rglob("*.parquet"))
        run = Run.open(store.path)
        started = time.perf_counter()
        verification = run.verify()
        if not verification.sound:
            raise SystemExit("the run isn't sound")
        stage("verified", started)
        started = time.perf_counter()
        summary = (
            run.table("ablations")
            .group_by("site", "head")
            .agg(degradation=pl.col("edited").sum() / pl.col("clean").sum() - 1)
            .collect(engine="streaming")
        )
        stage("summarised, polars", started)
        if len(summary) != len(edits) or not summary["degradation"].is_between(0.19, 0.21).all():
            raise SystemExit("the summary is wrong")
        started = time.perf_counter()
        question = "select site, head, sum(edited) / sum(clean) - 1 from ablations group by site, head"
        if len(run.duckdb().sql(question).fetchall()) != len(edits):
            raise SystemExit("DuckDB's summary is wrong")
        stage("summarised, DuckDB", started)
    result = {
        **records.machine("cpu"),
        "rows": verification.rows["ablations"],
        "units": len(units),
        "megabytes_on_disk": size / 1e6,
        "stages": stages,
    }
    file = records.write(arguments.out / "sweep-store.json", result)
    console.print(f"{result['rows']:,} rows, {size / 1e6:,.0f} MB on disk; written: {file}")


if __name__ == "__main__":
    main()
