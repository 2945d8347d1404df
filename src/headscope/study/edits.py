"""What was edited: single heads and sets of heads as one list of edits, and their losses as one table.

An edit has a *kind*, told from the heads that belong to it:

    head    one head
    site    all heads of one site
    level   all heads of several sites
    all     all heads
    set     any other heads
    dose    heads whose gate is neither 0 (removed) nor 1 (as it is)
    other   heads of which something else is changed: temperature, key_bias, key_scale
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import polars as pl

KINDS = ("head", "site", "level", "set", "all", "dose", "other")
# the columns that tell edits apart
EDIT = ("kind", "edit")
_OTHERS = ("temperature", "key_bias", "key_scale")


@dataclass(frozen=True)
class Edited:
    """Heads that were edited together.

    Attributes:
        name: the set's; of a head its site and number.
        kind: one of `KINDS`.
        heads: (site, head) pairs.
        gate: how much of them is left: 0 is none.
    """

    name: str
    kind: str
    heads: tuple[tuple[str, int], ...]
    gate: float = 0.0


def head_name(site: str, head: int) -> str:
    """The name of the edit of one head."""
    return f"{site} h{head}"


def edits_of(sets: Iterable[Mapping[str, Any]], sites: Mapping[str, int]) -> list[Edited]:
    """The edits of a run.

    Args:
        sets: as in the run's manifest: name, sites (patterns), heads, keep, temperature, key_bias, key_scale.
        sites: the model's, with their numbers of heads, in the order of execution.

    Returns:
        Every head by itself, then the sets.
    """
    every = tuple((site, head) for site, count in sites.items() for head in range(count))
    found = [Edited(head_name(*one), "head", (one,)) for one in every]
    for chosen in sets:
        of_sites = [one for one in every if any(fnmatchcase(one[0], pattern) for pattern in chosen["sites"])]
        heads = tuple(dict.fromkeys([*of_sites, *((site, int(head)) for site, head in chosen["heads"])]))
        other = any(chosen.get(name) not in (None, [], ()) for name in _OTHERS)
        gate = chosen.get("keep")
        gate = (1.0 if other else 0.0) if gate is None else float(gate)
        kind = "other" if other else "dose" if gate != 0.0 else _kind(set(heads), sites)
        found.append(Edited(chosen["name"], kind, heads, gate))
    return found


def heads_in(ablations: pl.DataFrame | None) -> list[Edited]:
    """The edits of single heads in a table "ablations"."""
    if ablations is None:
        return []
    pairs = ablations.select(pl.col("site").cast(pl.String), pl.col("head").cast(pl.Int64)).unique(maintain_order=True)
    return [Edited(head_name(site, head), "head", ((site, head),)) for site, head in pairs.iter_rows()]


def _kind(heads: set[tuple[str, int]], sites: Mapping[str, int]) -> str:
    if len(heads) == sum(sites.values()):
        return "all"
    touched = {site for site, _ in heads}
    # a run's description may come from anywhere
    if not touched <= set(sites) or len(heads) < sum(sites[site] for site in touched):
        return "set"
    return "site" if len(touched) == 1 else "level"


def losses(
    edits: Sequence[Edited], ablations: pl.DataFrame | None = None, sets: pl.DataFrame | None = None
) -> pl.DataFrame | None:
    """The paired losses of all edits: the tables "ablations" and "set_ablations" of runs, one below the other.

    Returns a table: kind, edit, group, split, source_id, item, replicate, timestep, fill, clean, edited; None where
    there is no row.
    """
    kinds = {edit.name: edit.kind for edit in edits if edit.kind != "head"}
    columns = [*EDIT, "group", "split", "source_id", "item", "replicate", "timestep", "fill", "clean", "edited"]
    found = []
    if ablations is not None and len(ablations):
        name = pl.format("{} h{}", "site", "head")
        found.append(ablations.with_columns(name.alias("edit"), pl.lit("head").alias("kind")).select(columns))
    if sets is not None and len(sets):
        kind = pl.col("edit").cast(pl.String).replace_strict(kinds, default="set", return_dtype=pl.String)
        found.append(sets.with_columns(kind.alias("kind")).select(columns))
    texts = pl.col("kind", "edit", "group", "split", "source_id", "fill").cast(pl.String)
    return pl.concat([table.with_columns(texts) for table in found]) if found else None
