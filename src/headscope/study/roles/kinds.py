"""How many heads have a role, what their entropy is, and which of the abstract's kinds of mechanism that would be."""

import polars as pl

from headscope.study.inference import means
from headscope.study.roles.rows import HEAD

# of the eight mechanisms that the abstract counts it names these three; the other five can't be looked for
ABSTRACT_KINDS = ("edge detection", "texture analysis", "semantic understanding")
ABSTRACT_COUNT = 8
_KIND_OF = {"edge": "edge detection", "boundary": "edge detection", "texture": "texture analysis"}
_KIND_OF |= dict.fromkeys(("object", "counterpart"), "semantic understanding")
KINDS = (
    "Edge detection: heads named edge or boundary; texture analysis: texture; semantic understanding: a part, object"
    " or counterpart. Heads that avoid a feature are roles of their own (avoiding edge) and none of these kinds. The"
    " abstract doesn't name the other five of its eight kinds, so what was found beside these three"
    " can be counted and not compared. Entropy: H in nats and H / ln K of a head, mean over queries, timesteps and"
    " sources of the confirm split; mean ± standard deviation between the heads of a role, as the abstract has it."
    " The interval is that of the mean, these heads in other sources; between sites ln K differs, and raw entropies"
    " with it."
)


# the role of a head, and of one that avoids its feature another: a head that avoids edges doesn't detect them
SIGNED_ROLE = pl.when(pl.col("sign") < 0).then(pl.format("avoiding {}", "role")).otherwise("role").alias("role")


def abstract_kind(role: str) -> str | None:
    """Which of `ABSTRACT_KINDS` a role would be: see `KINDS`. None where it would be none of them."""
    return "semantic understanding" if role.startswith("part ") else _KIND_OF.get(role)


def kinds_of(names: pl.DataFrame, rows: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The roles of one group with the entropy of their heads.

    Args:
        names: site, head, role, sign, entropy, entropy_normalised.
        rows: of the group's confirm split in the table "key_mass", of images that aren't translated.
        seed: of the draws.

    Returns:
        role (see `SIGNED_ROLE`), kind (of the abstract; null: none), heads, entropy (nats), entropy_low, entropy_high,
        entropy_sd (between heads; null for one), normalised, normalised_low, normalised_high, normalised_sd, sources,
        exploratory, void.
    """
    names = names.with_columns(SIGNED_ROLE)
    labels = ["source_id", "item", "replicate", "timestep", *HEAD]
    rows = rows.select(*labels, "call", "entropy", "entropy_normalised").sort(*labels, "call")
    rows = rows.join(names.select(*HEAD, "role"), on=list(HEAD), maintain_order="left")
    # a role has as many rows as its heads: their mean by item, draw and timestep first
    keys = ["role", "source_id", "item", "replicate", "timestep"]
    counts = names.group_by("role", maintain_order=True).agg(heads=pl.len())
    found = counts
    for name, column in (("entropy", "entropy"), ("normalised", "entropy_normalised")):
        value = pl.col(column).cast(pl.Float64)
        whole = pl.when(value.is_finite().all()).then(value.mean())
        table = means(rows.group_by(keys, maintain_order=True).agg(_value=whole), "_value", ["role"], "timestep", seed)
        # a head without a number takes its role's with it
        known = pl.col(column).is_not_null().all()
        between = names.group_by("role", maintain_order=True).agg(
            pl.when(known).then(pl.col(column).std()).alias(f"{name}_sd")
        )
        bounds = {name: "value", f"{name}_low": "low", f"{name}_high": "high"}
        columns = [pl.col(old).alias(new) for new, old in bounds.items()]
        beside = table.select("role", *columns, *(["sources", "exploratory", "void"] if name == "entropy" else []))
        found = found.join(beside, on="role", how="left", maintain_order="left")
        found = found.join(between, on="role", how="left", maintain_order="left")
    kind = pl.col("role").map_elements(abstract_kind, pl.String, skip_nulls=False)
    order = [
        "role",
        "kind",
        "heads",
        *(f"{name}{end}" for name in ("entropy", "normalised") for end in ("", "_low", "_high", "_sd")),
    ]
    return found.with_columns(kind=kind).sort("role").select(*order, "sources", "exploratory", "void")
