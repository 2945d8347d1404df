"""Regions for tests, and the rows of recordings of them."""

import polars as pl
import torch
import torch.nn.functional as functional

NAMES = ("left", "right", "sky", "nowhere")
TIED = {"left": ["right"], "right": ["left", "sky"]}


def masks(samples: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random blocks of regions 0 to 2 and of none; region 3 is empty."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-1, 3, (samples, 1, 3, 4), generator=generator)
    return functional.interpolate(coarse.float(), (height, width)).long()[:, 0]


def rows_of(table: pl.DataFrame, site: str, **labels) -> pl.DataFrame:
    texts = ("site", "query_group", "query_class", "branch")
    table = table.with_columns(pl.col(name).cast(pl.String) for name in texts if name in table.columns)
    table = table.filter(pl.col("site") == site)
    for name, value in labels.items():
        table = table.filter(pl.col(name).is_null() if value is None else pl.col(name) == value)
    return table.sort("sample", "head")
