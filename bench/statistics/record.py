"""Record real effects for the simulation: the bundled transformer's losses without single heads.

    python bench/statistics/record.py

The heads with the largest and smallest effects in a pilot of 16 faces, and some between. A row per source and timestep:
group, source_id, timestep, clean, then the loss without each head, named block.head.
"""

import tempfile
from pathlib import Path

import polars as pl
from worlds import EFFECTS

from headscope._files import write_atomic
from headscope.sweep import SweepConfig, run_sweep

HEADS = ((1, 4), (1, 6), (1, 7), (3, 0), (4, 0), (5, 1), (5, 6), (5, 7))


def main() -> None:
    config = SweepConfig(
        model="pixeldit",
        groups=("faces", "lfw", "twins"),
        items=20,
        observe=False,
        fills=("zero",),
        heads=tuple((f"transformer_blocks.{block}.attn1", head) for block, head in HEADS),
    )
    with tempfile.TemporaryDirectory() as folder:
        table = run_sweep(config, Path(folder) / "run").table("ablations").collect()
    names = pl.format("{}.{}", pl.col("site").cast(pl.String).str.extract(r"\.(\d+)\."), "head")
    key = ["group", "source_id", "timestep", "clean"]
    rows = table.with_columns(pl.col("group", "source_id").cast(pl.String), names.alias("name"))
    wide = rows.pivot("name", index=key, values="edited", sort_columns=True).sort(key[:3])
    write_atomic(EFFECTS, wide.with_columns(pl.exclude(key[:3]).round_sig_figs(7)).write_csv().encode())


if __name__ == "__main__":
    main()
