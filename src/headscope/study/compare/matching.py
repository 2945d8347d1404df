"""What two runs have in common, as pairs of rows; all else is listed with what follows from it.

Two rows are a pair where they are of the same image (or prompt), noise draw, timestep, head and fill. That images are
the same is known from the manifests: by the digest of a group's items, or, of the zoo's own groups, by item and source
where both runs were made by the same version. Of folders whose digests differ nothing is paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import polars as pl

from headscope.study.compare.schedules import matched_timesteps, target_of
from headscope.study.compare.sides import Differing, Side, listing
from headscope.study.inference import plain_text
from headscope.sweep.plan.config import fold_of

_ITEM = ("group", "split", "source_id", "item", "replicate", "timestep")
PROMPTS = "prompts"


class Kind(NamedTuple):
    """Columns of a table: those that tell rows of an item apart, and the numbers, as far as a table has them."""

    labels: tuple[str, ...]
    values: tuple[str, ...]


KINDS = {
    "observations": Kind(("site", "head", "query_group", "keys"), ("entropy_mean", "entropy_normalised_mean")),
    "ablations": Kind(("site", "head", "fill"), ("clean", "edited")),
    "set_ablations": Kind(("edit", "fill"), ("clean", "edited")),
    "attributions": Kind(("site", "head", "fill"), ("loss", "importance", "integrated")),
}
# settings that the runs are known by, and what follows where they differ
_SETTINGS = {
    "version": "the runs were made by different versions of headscope",
    "device_type": "kernels differ, and so rounding does",
    "dtype": "rounding differs",
    "autocast": "rounding differs",
    "reference_items": "mean fills are taken over different numbers of images",
    "cotangents": "the importances' second-order term is estimated more closely in one",
}


@dataclass(frozen=True)
class Matched:
    """Pairs of rows of two runs.

    Attributes:
        tables: by kind: the labels, and every number of `KINDS` as NAME_1 and NAME_2. Timesteps are the first run's.
        timesteps: first, second, log_snr (of the first; null where the schedule is unknown).
        groups: group: items, sources, how they were matched.
        same_target: whether the losses have one unit: both models predict the same (noise, velocity, image).
        differing: everything else.
    """

    tables: dict[str, pl.DataFrame]
    timesteps: pl.DataFrame
    groups: pl.DataFrame
    same_target: bool
    differing: list[Differing] = field(default_factory=list)


def match(first: Side, second: Side) -> Matched:
    """Pair the rows of two runs.

    Raises:
        ValueError: they have nothing in common, or their bands of noise can't be matched; says why.
    """
    differing: list[Differing] = _settings(first, second)
    groups = _groups(first, second, differing)
    timesteps = matched_timesteps(first, second, differing)
    steps = dict(timesteps.select("second", "first").iter_rows())
    sites = _sites(first, second, differing)
    sets = _sets(first, second, differing)
    same_target = target_of(first) == target_of(second)
    if not same_target:
        differing.append(
            Differing(
                "target of the loss",
                target_of(first),
                target_of(second),
                "losses have other units: ratios are compared",
            )
        )
    tables: dict[str, pl.DataFrame] = {}
    for kind, columns in KINDS.items():
        one, two = first.tables.get(kind), second.tables.get(kind)
        if one is None or two is None:
            if one is not None or two is not None:
                differing.append(
                    Differing(f"table of {kind}", *("–" if t is None else "there" for t in (one, two)), "not compared")
                )
            continue
        kept = [_rows(table, columns, groups, sites, sets) for table in (one, two)]
        kept[1] = (
            kept[1]
            .filter(pl.col("timestep").is_in(list(steps)))
            .with_columns(pl.col("timestep").replace_strict(steps, return_dtype=pl.Int64))
        )
        kept[0] = kept[0].filter(pl.col("timestep").is_in(list(steps.values())))
        _list_lacking(kind, columns, kept[0], kept[1], differing)
        pairs = _joined(kept[0], kept[1], columns)
        if len(pairs):
            order = {name: place for place, name in enumerate(groups)}
            tables[kind] = pairs.sort(pl.col("group").replace_strict(order), maintain_order=True)
        else:
            differing.append(Differing(f"table of {kind}", "there", "there", "no row of one has its pair in the other"))
    if not tables:
        raise ValueError(f"second: the runs have nothing in common to compare: {_told(differing)}")
    return Matched(tables, timesteps, _counted(tables, groups), same_target, differing)


def _settings(first: Side, second: Side) -> list[Differing]:
    found = []
    for name, consequence in _SETTINGS.items():
        one, two = (side.manifest["identity"].get(name) for side in (first, second))
        if one != two:
            found.append(Differing(name.replace("_", " "), str(one), str(two), consequence))
    if first.manifest["identity"]["model"] == second.manifest["identity"]["model"]:
        found.append(
            Differing(
                "weights", "–", "the same", "both runs are of one model: differences are of settings or rounding alone"
            )
        )
    return found


@dataclass(frozen=True)
class _GroupMatch:
    """How the items of a group are told: the columns of their key."""

    key: tuple[str, ...]
    how: str


def _groups(first: Side, second: Side, differing: list[Differing]) -> dict[str, _GroupMatch]:
    """The groups whose images are known to be the same.

    Raises:
        ValueError: there is none.
    """
    digests = [{entry[0]: entry[1:] for entry in side.manifest["identity"]["groups"]} for side in (first, second)]
    zoo = [{text for text in side.manifest["config"]["groups"] if "=" not in text} for side in (first, second)]
    version = [side.manifest["identity"]["version"] for side in (first, second)]
    # a zoo group is drawn by code, the same at every number of items
    drawn = zoo[0] & zoo[1] if version[0] == version[1] else set()
    found: dict[str, _GroupMatch] = {}
    for name in dict.fromkeys([*digests[0], *digests[1]]):
        one, two = digests[0].get(name), digests[1].get(name)
        if one is None or two is None:
            differing.append(_absent(f"group {name}", one is not None, two is not None))
            continue
        if name == PROMPTS:
            found[name] = _GroupMatch(("source_id",), "by the prompt's text; each model drew its own images of it")
        elif one[0] == two[0]:
            found[name] = _GroupMatch(("source_id", "item"), "all items, the same by their digest")
        elif name in drawn:
            found[name] = _GroupMatch(("source_id", "item"), "by item and source of the zoo's group")
        else:
            differing.append(
                Differing(
                    f"group {name}",
                    "one choice of images",
                    "another",
                    "not compared: the manifests can't tell which images are in both; sweep the same",
                )
            )
            continue
        if one[1:] != two[1:] and any("mean" in side.manifest["config"]["fills"] for side in (first, second)):
            differing.append(
                Differing(
                    f"reference images of {name}",
                    "some",
                    "others",
                    "the runs' mean fills are of other images",
                )
            )
    if not found:
        raise ValueError(f"second: the runs have no group of images in common: {_told(differing)}")
    return found


def _absent(what: str, in_first: bool, in_second: bool, consequence: str = "not compared") -> Differing:
    return Differing(what, "there" if in_first else "–", "there" if in_second else "–", consequence)


def _sites(first: Side, second: Side, differing: list[Differing]) -> list[str]:
    """The sites that both models have, of one kind, number and size of heads."""
    known = [{site["name"]: site for site in side.manifest["sites"]} for side in (first, second)]
    absent = [[name for name in known[i] if name not in known[1 - i]] for i in (0, 1)]
    if any(absent):
        differing.append(
            Differing("attention sites that the other lacks", listing(absent[0]), listing(absent[1]), "not compared")
        )
    shared = []
    for name in known[0]:
        if name not in known[1]:
            continue
        shapes = [f"{s['kind']}, {s['heads']} heads of {s['head_dim']}" for s in (known[0][name], known[1][name])]
        if shapes[0] == shapes[1]:
            shared.append(name)
        else:
            differing.append(Differing(f"site {name}", *shapes, "not compared: its heads are others"))
    return shared


def _sets(first: Side, second: Side, differing: list[Differing]) -> list[str]:
    """The names of the sets of heads that are one in both runs."""
    known = [{chosen["name"]: chosen for chosen in side.manifest["config"]["sets"]} for side in (first, second)]
    shared = []
    for name in dict.fromkeys([*known[0], *known[1]]):
        if name not in known[0] or name not in known[1]:
            differing.append(_absent(f"set {name}", name in known[0], name in known[1]))
        elif known[0][name] != known[1][name]:
            differing.append(Differing(f"set {name}", "one choice of heads or edits", "another", "not compared"))
        else:
            shared.append(name)
    return shared


def _rows(
    table: pl.DataFrame,
    columns: Kind,
    groups: Mapping[str, _GroupMatch],
    sites: Sequence[str],
    sets: Sequence[str],
) -> pl.DataFrame:
    """The rows of a table whose group, site and set both runs have: one per item, draw, timestep and labels."""
    rows = plain_text(table).filter(pl.col("group").is_in(list(groups))).with_columns(pl.col("timestep").cast(pl.Int64))
    if "split" not in rows.columns:
        rows = rows.with_columns(split=pl.lit("all"))
    if "fill" in columns.labels:
        # means over part of the reference images tell of the mean fill's own error
        folds = [fill for fill in rows["fill"].unique() if fold_of(fill) is not None]
        rows = rows.filter(~pl.col("fill").is_in(folds))
    if "site" in columns.labels:
        rows = rows.filter(pl.col("site").is_in(list(sites)))
    if "edit" in columns.labels:
        rows = rows.filter(pl.col("edit").is_in(list(sets)))
    by_text = [name for name, how in groups.items() if "item" not in how.key]
    if by_text:
        # where a prompt stands in its file doesn't matter
        rows = rows.with_columns(pl.when(pl.col("group").is_in(by_text)).then(0).otherwise("item").alias("item"))
    values = [name for name in columns.values if name in rows.columns]
    # an item's calls and branches are averaged, as in every other number of a study
    return rows.group_by(*_ITEM, *columns.labels, maintain_order=True).agg(
        *(pl.col(name).cast(pl.Float64).mean() for name in values)
    )


def _list_lacking(kind: str, columns: Kind, one: pl.DataFrame, two: pl.DataFrame, differing: list[Differing]) -> None:
    """Note what labels of one table the other lacks, the widest first, each among the rows that are left."""
    asked = (
        ("splits", ("split",)),
        ("noise draws (replicates)", ("replicate",)),
        ("items", ("group", "split", "source_id", "item")),
        ("fills", ("fill",)),
        ("sets of heads", ("edit",)),
        ("heads", ("site", "head")),
        ("kinds of queries", ("query_group",)),
        ("keys of a site", ("site", "query_group", "keys")),
        ("rows", (*_ITEM, *columns.labels)),
    )
    for name, labels in asked:
        if not set(labels) <= {*_ITEM, *columns.labels}:
            continue
        lacking = [a.join(b, on=labels, how="anti").select(labels).unique(maintain_order=True)
                   for a, b in ((one, two), (two, one))]  # fmt: skip
        if any(map(len, lacking)):
            shown = [_few(part) for part in lacking]
            differing.append(Differing(f"{name} of {kind} that the other lacks", *shown, "left out"))
        one, two = (a.join(b, on=labels, how="semi", maintain_order="left") for a, b in ((one, two), (two, one)))


def _few(labels: pl.DataFrame, most: int = 4) -> str:
    """Some rows of labels in words, and how many more there are."""
    if not len(labels):
        return "–"
    if labels.columns == ["group", "split", "source_id", "item"]:
        counts = labels.group_by("group", "split", maintain_order=True).len()
        return ", ".join(f"{count} of {group} ({split})" for group, split, count in counts.iter_rows())
    if len(labels.columns) > 3:
        return f"{len(labels):,}"
    texts = [" ".join(map(str, row)) for row in labels.head(most).iter_rows()]
    return ", ".join(texts) + (f" and {len(labels) - most:,} more" if len(labels) > most else "")


def _joined(one: pl.DataFrame, two: pl.DataFrame, columns: Kind) -> pl.DataFrame:
    values = [name for name in columns.values if name in one.columns and name in two.columns]
    key = [*_ITEM, *columns.labels]
    sides = [
        table.select(*key, *(pl.col(name).alias(f"{name}_{number}") for name in values))
        for number, table in enumerate((one, two), 1)
    ]
    return sides[0].join(sides[1], on=key, how="inner", maintain_order="left", nulls_equal=True)


def _counted(tables: Mapping[str, pl.DataFrame], groups: Mapping[str, _GroupMatch]) -> pl.DataFrame:
    """Items and sources that are compared, of every group that has some."""
    items = pl.concat(table.select("group", "split", "source_id", "item") for table in tables.values()).unique()
    counts = items.group_by("group").agg(pl.len().alias("items"), pl.col("source_id").n_unique().alias("sources"))
    rows = {group: (items, sources) for group, items, sources in counts.iter_rows()}
    found = [(name, *rows[name], how.how) for name, how in groups.items() if name in rows]
    schema = {"group": pl.String, "items": pl.Int64, "sources": pl.Int64, "how": pl.String}
    return pl.DataFrame(found, schema=schema, orient="row")


def _told(differing: Sequence[Differing]) -> str:
    """The list in words, for an error."""
    return "; ".join(f"{one.what}: {one.first} against {one.second} ({one.consequence})" for one in differing) or "–"
