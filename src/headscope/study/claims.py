"""The abstract of arXiv 2506.17237 and a study, line by line: what it claims, and what the same question gives here.

Only the abstract can be read: neither its model nor its images are here, and it defines none of its numbers. So every
claim stands beside a definition of its own, and beside why the two numbers may differ. They aren't reproductions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from headscope.study.ablation import headline_fill
from headscope.study.circuits import Circuits
from headscope.study.contrast.comparison import PAPER_RATIO, Comparison
from headscope.study.contrast.divergence import PAPER_RANGE
from headscope.study.inference import SIGNIFICANT, is_finding
from headscope.study.interventions import Interventions
from headscope.study.roles import Roles
from headscope.study.roles.kinds import ABSTRACT_COUNT

# of the degradation by targeted removals
ABSTRACT_RANGE = "25.6 to 128.3 %"
# of the heads of each kind that the abstract names, as it gives them
ENTROPIES = {
    "edge detection": "3.18 ± 0.12",
    "texture analysis": "4.16 ± 0.08",
    "semantic understanding": "2.67 ± 0.15",
}
_ROLES = {
    "edge detection": "edge or boundary",
    "texture analysis": "texture",
    "semantic understanding": "a part, object or counterpart",
}
# of a role whose heads were removed
CONFIRMED, UNNAMED, NOT_CONFIRMED = "confirmed", "confirmed, but not named on confirm", "not confirmed"
NO_PIXELS, NO_CONTROLS = "no pixels to compare", "not confirmed: no control sets"
UNTESTED = "not tested: too few sources, or void"
COMPARISON = "heads named uniform, for comparison"
# what the names of groups end with whose images are other groups' with one histogram
MATCHED = "_matched"
MEASURED, NONE_FOUND, NOT_MEASURED = "measured", "none found", "not measured here"


@dataclass(frozen=True)
class Claim:
    """A claim of the abstract.

    Attributes:
        there: the abstract's own figure.
        here: how the question is put here.
        why: why the two may differ.
    """

    name: str
    there: str
    here: str
    why: str


CLAIMS = (
    Claim(
        "images",
        "2,000 synthetic and 2,000 CelebA faces",
        "Groups of images; what is counted is sources (photographs, identities), split once into discover and confirm.",
        "CelebA is not here, and what its synthetic images are is not in the abstract.",
    ),
    Claim(
        "complexity ratio, natural over synthetic",
        f"{PAPER_RATIO}, p < 0.001",
        "Mean H / ln K of natural images over that of synthetic ones, pooled over all heads; confirm split, interval"
        " over sources.",
        "Its formula, and what ± is, are unknown. Heads that differ in opposite directions cancel in a pooled ratio.",
    ),
    Claim(
        "entropy divergence between the domains, over timesteps",
        f"{PAPER_RANGE[0]} to {PAPER_RANGE[1]}",
        "Plug-in Jensen-Shannon divergence of the sources' normalised entropies, 20 bins, in nats, smallest and largest"
        " timestep; beside it what permuted sources give.",
        "The formula is unknown. Plug-in divergences are above 0 by chance, the more so the fewer the images.",
    ),
    Claim(
        "functionally distinct attention mechanisms",
        f"{ABSTRACT_COUNT}, three of them named",
        "How many different features of images heads are named for, by excess attention (not by avoiding one) chosen on"
        " discover and tested on confirm; beside it the number of clusters on which halves of the sources agree"
        " (exploratory).",
        "Five of the eight are not named in the abstract, and how heads were assigned is unknown. A role here is one of"
        " the features that were measured.",
    ),
    *(
        Claim(
            f"{kind}, entropy",
            there,
            f"H in nats, and H / ln K, of the heads named for {_ROLES[kind]}: mean ± SD between heads, interval of the"
            " mean over sources.",
            "Log base, number of keys and the meaning of ± are unknown; nats grow with ln K."
            + (
                " ln 64 = 4.159 is uniform attention over 8 x 8 tokens: there, 4.16 ± 0.08 would exceed the maximum."
                if kind == "texture analysis"
                else ""
            ),
        )
        for kind, there in ENTROPIES.items()
    ),
    Claim(
        "degradation under targeted ablation",
        ABSTRACT_RANGE,
        "Relative rise of the denoising loss on the group that a set of heads was selected for, mean fill, confirm"
        " split, corrected p below 0.05: smallest and largest.",
        "Its metric, its fill and its sets are unknown. A percentage depends on the clean loss, and a set of more heads"
        " costs more.",
    ),
    Claim(
        "circuits with causal validation",
        "claimed, without a figure",
        "The smallest set of heads found on discover that keeps 0.9 of what all heads do: its faithfulness on confirm."
        " Roles count as confirmed where removing their heads (the five strongest at most) raises the error on their"
        " feature's pixels by more percent than on others, beyond control sets.",
        "What is a circuit there, and what validates it, is not in the abstract.",
    ),
)


@dataclass(frozen=True)
class Line:
    """One number for a claim.

    Attributes:
        quantity: which; empty where there is none.
        spread: standard deviation between heads.
        chance: what there would be by chance.
        count: of what the number is one (heads, images), as the quantity says.
    """

    claim: str
    status: str
    group: str | None = None
    quantity: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    chance: float | None = None
    p_value: float | None = None
    unit: str = ""
    count: int | None = None
    sources: str | None = None


def content_roles(names: pl.DataFrame, group: str) -> list[str]:
    """The features of images that some head of a group is named for; not those that heads only avoid."""
    return sorted(names.filter(pl.col("group") == group, pl.col("sign") > 0)["feature"].drop_nulls().unique())


def untested(names: pl.DataFrame, group: str) -> str | None:
    """Why no head of a group could have a name; None where they could."""
    rows = names.filter(pl.col("group") == group)
    # whether a head is local besides is known of all that were tested
    return rows["reason"][0] if len(rows) and rows["local"].is_null().all() else None


def verdicts_of(role_effects: pl.DataFrame, names: pl.DataFrame) -> pl.DataFrame:
    """The table of `roles.causal` with named, how many heads of that group are named for the role; chosen, how many
    discover chose for it, as far as they were removed; verdict; tested, whether one could be reached; and main: whether
    it is the role's own set, which counts as the role, and not all heads of a larger one or one head alone.

    Its heads were chosen on discover: removal may tell of them what their attention on confirm doesn't.
    """
    seeking = names.filter(pl.col("sign") > 0).group_by("group", role="feature").agg(named=pl.len())
    table = role_effects.join(seeking, on=["group", "role"], how="left", maintain_order="left")
    unknown, confirmed, named = pl.col("difference").is_null(), pl.col("confirmed"), pl.col("named") > 0
    hurts = (pl.col("difference") > 0) & (pl.col("p_holm") < SIGNIFICANT)
    verdict = (
        pl.when(unknown & (pl.col("sources") == 0))
        .then(pl.lit(NO_PIXELS))
        .when(pl.col("p_holm").is_null())
        .then(pl.lit(UNTESTED))
        .when(confirmed & named)
        .then(pl.lit(CONFIRMED))
        .when(confirmed)
        .then(pl.lit(UNNAMED))
        .when(hurts & (pl.col("controls") == 0))
        .then(pl.lit(NO_CONTROLS))
        .otherwise(pl.lit(NOT_CONFIRMED))
    )
    main = pl.col("set") == pl.format("{} heads of {}", "role", "group")
    chosen = pl.col("heads").max().over("group", "role")
    table = table.with_columns(pl.col("named").fill_null(0).cast(pl.Int64), chosen=chosen)
    tested = ~pl.col("verdict").is_in([NO_PIXELS, UNTESTED])
    return table.with_columns(verdict=verdict, main=main).with_columns(tested=tested)


def targeted(found: Interventions, effects: pl.DataFrame) -> list[dict[str, Any]]:
    """The effects of sets of heads on the group that each was selected for; on others they are controls."""
    sets = effects.filter(pl.col("kind") == "set").to_dicts()
    return [row for row in sets if found.targets.get(row["edit"], row["group"]) == row["group"]]


def claims_of(
    *,
    sources: pl.DataFrame,
    contrast: Comparison | None = None,
    interventions: Interventions | None = None,
    roles: Roles | None = None,
    role_effects: pl.DataFrame | None = None,
    circuits: Circuits | None = None,
) -> pl.DataFrame:
    """Every claim with what was measured here.

    Returns a table, a row per claim and number, at least one per claim: claim, there, status ("measured", "none found",
    "not measured here"), group, quantity, value, low, high, spread, chance, p_value, unit, count, sources, here, why.
    """
    texts = {claim.name: claim for claim in CLAIMS}
    made = {
        "images": _images(sources, contrast),
        "complexity ratio, natural over synthetic": _ratio(contrast),
        "entropy divergence between the domains, over timesteps": _divergences(contrast),
        "functionally distinct attention mechanisms": _mechanisms(roles),
        **{f"{kind}, entropy": _entropies(roles, kind) for kind in ENTROPIES},
        "degradation under targeted ablation": _degradations(interventions),
        "circuits with causal validation": _circuits(circuits, role_effects, roles),
    }
    rows = []
    for name, claim in texts.items():
        found = [{"claim": name, **fields} for fields in made[name]] or [{"claim": name, "status": NOT_MEASURED}]
        rows += [{**asdict(Line(**one)), "there": claim.there, "here": claim.here, "why": claim.why} for one in found]
    texts_of = ("claim", "status", "group", "quantity", "unit", "sources", "there", "here", "why")
    schema = dict.fromkeys(texts_of, pl.String)
    schema |= dict.fromkeys(("value", "low", "high", "spread", "chance", "p_value"), pl.Float64)
    columns = ["claim", "there", "status", "group", "quantity", "value", "low", "high", "spread", "chance", "p_value"]
    columns += ["unit", "count", "sources", "here", "why"]
    return pl.DataFrame(rows, schema=schema | {"count": pl.Int64}).select(columns)


Fields = Mapping[str, Any]


def _images(sources: pl.DataFrame, contrast: Comparison | None) -> Iterator[Fields]:
    compared = [] if contrast is None else [contrast.first, contrast.second]
    for group in compared:
        rows = sources.filter(pl.col("group") == group)
        splits = ", ".join(f"{row['items']} {row['split']}" for row in rows.sort("split").iter_rows(named=True))
        yield _count(group, splits, rows["items"].sum(), "images") | {"sources": str(rows["sources"].sum())}
    # with one common histogram they are the same images once more
    own = sources.filter(~pl.col("group").str.ends_with(MATCHED))
    yield _count(None, f"of {own['group'].n_unique()} groups, all splits", own["items"].sum(), "images")


def _count(group: str | None, quantity: str, value: int, unit: str) -> dict[str, Any]:
    return {"status": MEASURED, "group": group, "quantity": quantity, "value": float(value), "unit": unit}


def _ratio(contrast: Comparison | None) -> Iterator[Fields]:
    if contrast is not None:
        yield {
            **_numbers(contrast.ratio),
            "status": MEASURED,
            "group": f"{contrast.first} / {contrast.second}",
            "quantity": "pooled ratio",
            "p_value": contrast.ratio["p_value"],
        }


def _divergences(contrast: Comparison | None) -> Iterator[Fields]:
    if contrast is None:
        return
    rows = contrast.divergences.filter(
        (pl.col("measure") == "jensen_shannon_pooled") & pl.col("timestep").is_not_null()
    )
    rows = rows.drop_nulls("value").sort("value")
    for which, index in (("smallest", 0), ("largest", -1)):
        if len(rows):
            row = rows.row(index, named=True)
            yield {
                "status": MEASURED,
                "group": f"{contrast.first}, {contrast.second}",
                "quantity": f"{which}, timestep {row['timestep']}",
                "value": row["value"],
                "chance": row["null_mean"],
                "p_value": row["p_holm"],
                "unit": "nats",
                "sources": " and ".join(map(str, contrast.sources)),
            }


def _mechanisms(roles: Roles | None) -> Iterator[Fields]:
    if roles is None:
        return
    names = roles.names
    agreement = roles.cluster_agreement
    for group in names["group"].unique(maintain_order=True):
        reason = untested(names, group)
        if reason is not None:
            yield {"status": NOT_MEASURED, "group": group, "quantity": reason}
            continue
        found = content_roles(names, group)
        listed = f": {', '.join(found)}" if found else ""
        quantity = f"{'feature' if len(found) == 1 else 'features'} that heads are named for{listed}"
        yield _count(group, quantity, len(found), "features") | {"status": MEASURED if found else NONE_FOUND}
        tried = agreement.filter(pl.col("group") == group)
        if len(tried):
            chosen = tried.filter(pl.col("chosen"))["clusters"].to_list()
            count = chosen[0] if chosen else 1
            quantity = f"{'cluster' if count == 1 else 'clusters'} of heads (exploratory)"
            yield _count(group, quantity, count, "clusters")


def _entropies(roles: Roles | None, kind: str) -> Iterator[Fields]:
    if roles is None:
        return
    kinds = roles.kinds
    for group in roles.names["group"].unique(maintain_order=True):
        reason = untested(roles.names, group)
        if reason is not None:
            yield {"status": NOT_MEASURED, "group": group, "quantity": reason}
            continue
        every = kinds.filter(pl.col("group") == group).to_dicts()
        rows = [row for row in every if row["kind"] == kind]
        if not rows:
            yield {"status": NONE_FOUND, "group": group}
        # what the abstract says of texture is next to what uniform attention has
        beside = [row for row in every if row["role"] == "uniform" and kind == "texture analysis"]
        for row in [*rows, *beside]:
            for name, unit in (("entropy", "nats"), ("normalised", "H / ln K")):
                yield {
                    "status": MEASURED,
                    "group": group,
                    "quantity": COMPARISON if row in beside else row["role"],
                    "value": row[name],
                    "low": row[f"{name}_low"],
                    "high": row[f"{name}_high"],
                    "spread": row[f"{name}_sd"],
                    "unit": unit,
                    "count": row["heads"],
                }


def _degradations(found: Interventions | None) -> Iterator[Fields]:
    if found is None or not len(found.effects):
        return
    effects = found.effects.filter(pl.col("fill") == headline_fill(found.effects))
    sets = [row for row in targeted(found, effects) if row["value"] is not None]
    if not sets:
        return
    established = [
        row
        for row in sets
        if row["value"] > 0 and is_finding(row["p_maxt"]) and row["low"] is not None and row["low"] > 0
    ]
    if not established:
        yield {"status": NONE_FOUND, "quantity": f"of {len(sets)} removals of a targeted set", "count": len(sets)}
    for which, pick in (("smallest", min), ("largest", max)) if established else ():
        row = pick(established, key=lambda one: one["value"])
        yield {
            **_numbers(row),
            "status": MEASURED,
            "group": row["group"],
            "quantity": f"{which}, {row['edit']}",
            "p_value": row["p_maxt"],
            "unit": "fraction of the clean loss",
            "count": len(established),
        }


def _circuits(circuits: Circuits | None, role_effects: pl.DataFrame | None, roles: Roles | None) -> Iterator[Fields]:
    refused = [] if circuits is None or circuits.refused is None else circuits.refused.rows(named=True)
    for row in refused:
        yield {"status": NONE_FOUND, "group": row["group"], "quantity": f"no circuit: {row['reason']}"}
    without = [row["group"] for row in refused]
    faithfulness = None if circuits is None else circuits.faithfulness
    if faithfulness is not None:
        chosen = faithfulness.filter(pl.col("kind") == "circuit", ~pl.col("group").is_in(without))
        for row in chosen.iter_rows(named=True):
            yield {
                **_numbers(row),
                "status": MEASURED,
                "group": row["group"],
                "quantity": f"faithfulness of {row['size']} heads",
                "count": row["size"],
            }
    if role_effects is not None and roles is not None:
        found = verdicts_of(role_effects, roles.names).filter("main")
        for (group,), rows in found.group_by("group", maintain_order=True):
            confirmed, tested = rows.filter(verdict=CONFIRMED)["role"].to_list(), rows["tested"].sum()
            listed = f": {', '.join(confirmed)}" if confirmed else ""
            noun = "role" if len(confirmed) == 1 else "roles"
            quantity = f"{noun} named and confirmed by removal, of {tested} that could be tested{listed}"
            status = {"status": MEASURED if confirmed else NONE_FOUND if tested else NOT_MEASURED}
            yield _count(str(group), quantity, len(confirmed), "roles") | status


def _numbers(row: Mapping[str, Any]) -> Fields:
    sources = row.get("sources")
    listed = " and ".join(map(str, sources)) if isinstance(sources, (list, tuple)) else sources
    return {
        "value": row["value"],
        "low": row["low"],
        "high": row["high"],
        "sources": None if listed is None else str(listed),
    }
