"""Tables to estimate from."""

import numpy as np
import polars as pl


def one_item_each(values, name="value", prefix="s"):
    """A row per source."""
    return pl.DataFrame({"source_id": [f"{prefix}{index:04}" for index in range(len(values))], name: values})


def losses(generator, sources=24, heads=3, timesteps=(100, 500), items=2, draws=1):
    """Paired losses of every item, draw of noise, head and timestep."""
    shape = (sources, items, draws, heads, len(timesteps))
    source, item, draw, head, step = (index.ravel() for index in np.indices(shape))
    clean = np.broadcast_to(generator.lognormal(0, 0.5, (*shape[:3], 1, *shape[4:])), shape).ravel()
    edited = clean * (1 + 0.1 * generator.normal(0.3, 1.0, clean.shape))
    return pl.DataFrame(
        {
            "source_id": [f"s{number:03}" for number in source],
            "item": source * items + item,
            "replicate": draw,
            "head": head,
            "timestep": np.array(timesteps)[step],
            "clean": clean,
            "edited": edited,
        }
    )
