"""The table beside the abstract: every number of the claims' table, what belongs together in one line."""

from dataclasses import replace

import polars as pl

from headscope.report.naming import Names
from headscope.report.sections import claims as section
from headscope.study.claims import CLAIMS
from report import roles_and_circuits as made

NAMES = Names(made.SITES, [made.TIED, made.CONTROL])


def lines(result):
    found = section.section(result, NAMES, [made.TIED, made.CONTROL])
    assert found is not None
    return {line["claim"]: line["found"] for line in found.values["lines"]}


def test_every_claim_has_its_lines():
    found = lines(made.result())
    assert list(found) == [claim.name for claim in CLAIMS]
    assert found["images"] == [("40 images; of 2 groups, all splits", True)]
    assert found["complexity ratio, natural over synthetic"] == [("not measured here", False)]
    assert found["functionally distinct attention mechanisms"] == [
        (
            "tiled: 3 features that heads are named for: counterpart, edge, luminance; 2 clusters of heads"
            " (exploratory)",
            True,
        ),
        ("untiled: 0 features that heads are named for; 1 cluster of heads (exploratory)", False),
    ]
    assert found["edge detection, entropy"] == [
        ("tiled: 3.20 nats (3.10 to 3.30), 0.770 of ln K (0.745 to 0.793); edge, 1 head", True),
        ("none found on untiled", False),
    ]
    assert found["texture analysis, entropy"] == [("none found on tiled, untiled", False)]
    assert found["semantic understanding, entropy"][0] == (
        "tiled: 3.20 ± 0.10 nats (3.10 to 3.30), 0.770 ± 0.020 of ln K (0.745 to 0.793); counterpart, 3 heads",
        True,
    )
    assert found["circuits with causal validation"] == [
        ("tiled: 0.931 (0.891 to 0.971); faithfulness of 6 heads, 20 sources", True),
        ("tiled: 1 role named and confirmed by removal, of 2 that could be tested: counterpart", True),
        ("untiled: 0 roles named and confirmed by removal, of 1 that could be tested", False),
    ]


def test_uniform_heads_stand_beside_texture():
    result = made.result()
    assert result.roles is not None
    rows = result.roles.kinds.filter(role="none")
    uniform = [
        rows.with_columns(role=pl.lit("uniform"), entropy=pl.lit(value), group=pl.lit(group))
        for group, value in ((made.TIED, 4.1), (made.CONTROL, 4.15))
    ]
    kinds = pl.concat([result.roles.kinds, *uniform])
    found = lines(replace(result, roles=replace(result.roles, kinds=kinds)))
    assert found["texture analysis, entropy"] == [
        ("none found on tiled, untiled", False),
        ("heads named uniform, for comparison: 4.10 to 4.15 nats", True),
    ]


def test_a_plain_sweep_has_no_such_section():
    assert section.section(made.result(roles=None, circuits=None, role_effects=None), NAMES, []) is None
