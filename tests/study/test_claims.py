"""The abstract's claims beside the numbers of a study: they are those of its tables, or said to be lacking."""

from dataclasses import replace

import polars as pl
import pytest

from headscope.study import analyse, select_heads
from headscope.study.claims import CLAIMS, COMPARISON, MEASURED, NONE_FOUND, NOT_MEASURED, claims_of
from report import roles_and_circuits as made
from study import simulated

STEPS = (100, 500)


@pytest.fixture(scope="module")
def study():
    with simulated.fewer_draws(199):
        discover = simulated.ablations(timesteps=STEPS, heads=2)
        chosen = select_heads(discover, 2)
        confirm = simulated.ablations(split="confirm", fills=("mean",), chosen=chosen, timesteps=STEPS, heads=2)
        yield analyse(simulated.observations(timesteps=STEPS, heads=2), discover, confirm, count_per_group=2)


def lines(table, claim):
    found = table.filter(pl.col("claim").str.starts_with(claim))
    assert len(found), claim
    return found.to_dicts()


def test_every_claim_has_a_line_and_its_texts(study):
    table = study.claims()
    assert table["claim"].unique(maintain_order=True).to_list() == [claim.name for claim in CLAIMS]
    assert not table.select("there", "here", "why").null_count().sum_horizontal().sum()
    assert set(table["status"]) <= {MEASURED, NONE_FOUND, NOT_MEASURED}
    # the abstract's own numbers
    there = dict(zip(table["claim"], table["there"], strict=True))
    assert there["complexity ratio, natural over synthetic"] == "1.084 ± 0.008, p < 0.001"
    assert there["entropy divergence between the domains, over timesteps"] == "0.015 to 0.166"
    assert there["edge detection, entropy"] == "3.18 ± 0.12"
    assert there["texture analysis, entropy"] == "4.16 ± 0.08"
    assert there["semantic understanding, entropy"] == "2.67 ± 0.15"
    assert there["degradation under targeted ablation"] == "25.6 to 128.3 %"
    assert study.tables()["claims"].equals(table)


def test_numbers_are_those_of_the_studys_tables(study):
    table = study.claims()
    (ratio,) = lines(table, "complexity ratio")
    for name in ("value", "low", "high", "p_value"):
        assert ratio[name] == study.contrast.ratio[name]
    smallest, largest = lines(table, "entropy divergence")
    rows = study.contrast.divergences.filter(measure="jensen_shannon_pooled").drop_nulls("timestep").sort("value")
    assert [smallest["value"], largest["value"]] == [rows["value"][0], rows["value"][-1]]
    assert largest["chance"] == rows["null_mean"][-1]
    images = {row["group"]: row["value"] for row in lines(table, "images")}
    assert images["lfw"] == study.sources.filter(group="lfw")["items"].sum()
    assert images[None] == study.sources["items"].sum()
    # single heads alone were removed, and no roles were looked for
    for claim in ("degradation", "functionally", "edge", "texture", "semantic", "circuits"):
        assert [row["status"] for row in lines(table, claim)] == [NOT_MEASURED], claim


def test_roles_and_circuits_bring_their_numbers():
    result = made.result()
    table = result.claims()
    assert result.roles is not None
    nats, normalised = (row for row in lines(table, "edge detection") if row["group"] == made.TIED)
    edge = result.roles.kinds.filter(role="edge").row(0, named=True)
    assert [nats["value"], nats["low"], nats["high"]] == [edge["entropy"], edge["entropy_low"], edge["entropy_high"]]
    assert [normalised["value"], normalised["unit"]] == [edge["normalised"], "H / ln K"]
    assert nats["spread"] is None
    spread = [row["spread"] for row in lines(table, "semantic") if row["group"] == made.TIED]
    assert spread == [0.1, 0.02]
    assert {row["status"] for row in lines(table, "texture")} == {NONE_FOUND}
    uniform = result.roles.kinds.filter(role="none").with_columns(role=pl.lit("uniform"))
    kinds = pl.concat([result.roles.kinds, uniform])
    beside = lines(replace(result, roles=replace(result.roles, kinds=kinds)).claims(), "texture")
    assert [row["quantity"] for row in beside] == ["", COMPARISON, COMPARISON, ""]
    assert [row["status"] for row in lines(table, "edge") if row["group"] == made.CONTROL] == [NONE_FOUND]
    mechanisms = [(row["group"], row["unit"], row["value"], row["status"]) for row in lines(table, "functionally")]
    assert mechanisms == [
        (made.TIED, "features", 3.0, MEASURED),
        (made.TIED, "clusters", 2.0, MEASURED),
        (made.CONTROL, "features", 0.0, NONE_FOUND),
        (made.CONTROL, "clusters", 1.0, MEASURED),
    ]
    circuit, tied, control = lines(table, "circuits")
    assert [circuit["value"], circuit["count"]] == [0.931, 6]
    assert tied["quantity"] == "role named and confirmed by removal, of 2 that could be tested: counterpart"
    assert [control["value"], control["status"]] == [0.0, NONE_FOUND]
    assert "ln 64 = 4.159" in lines(table, "texture")[0]["why"]


def test_heads_that_avoid_edges_do_not_detect_them():
    result = made.result()
    assert result.roles is not None
    assert [row["status"] for row in lines(result.claims(), "edge")] == [MEASURED, MEASURED, NONE_FOUND]
    names = result.roles.names.with_columns(sign=pl.when(pl.col("role") == "edge").then(-1).otherwise("sign"))
    # as `kinds_of` has them
    edge, kinds = pl.col("role") == "edge", result.roles.kinds
    kinds = kinds.with_columns(
        role=pl.when(edge).then(pl.lit("avoiding edge")).otherwise("role"),
        kind=pl.when(edge).then(None).otherwise("kind"),
    )
    table = replace(result, roles=replace(result.roles, names=names, kinds=kinds)).claims()
    assert [row["status"] for row in lines(table, "edge")] == [NONE_FOUND, NONE_FOUND]
    features = next(row for row in lines(table, "functionally") if row["unit"] == "features")
    assert [features["value"], features["quantity"]] == [
        2.0, "features that heads are named for: counterpart, luminance"
    ]  # fmt: skip


def test_targeted_sets_count_on_their_own_group_alone(study):
    labels = {"fill": "mean", "kind": "set", "sources": 20, "void": 0, "low": 0.1, "p_maxt": 0.001}
    effects = pl.DataFrame(
        [
            {**labels, "group": "a", "edit": "of a", "value": 0.3, "high": 0.5},
            {**labels, "group": "b", "edit": "of a", "value": 9.0, "high": 9.5},
            {**labels, "group": "b", "edit": "of b", "value": 1.2, "high": 1.5},
            {**labels, "group": "b", "edit": "weak of b", "value": 0.2, "high": 0.5, "p_maxt": 0.2},
        ]
    )
    targets = {"of a": "a", "of b": "b", "weak of b": "b"}
    found = replace(study.interventions, effects=effects, targets=targets)
    table = claims_of(sources=study.sources, interventions=found)
    assert [row["value"] for row in lines(table, "degradation")] == [0.3, 1.2]
    nothing = replace(found, effects=effects.with_columns(p_maxt=pl.lit(0.5)))
    (row,) = lines(claims_of(sources=study.sources, interventions=nothing), "degradation")
    assert [row["status"], row["count"]] == [NONE_FOUND, 3]


def test_a_plain_sweep_claims_nothing(study):
    assert replace(study, contrast=None).claims() is None
    assert "claims" not in replace(study, contrast=None).tables()
