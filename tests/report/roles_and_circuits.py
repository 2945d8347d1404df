"""Roles and circuits as a study's tables hold them, made up: a tied group with them, and its control without."""

import numpy as np
import polars as pl

from headscope.study.analysis import StudyResult
from headscope.study.circuits import Circuits
from headscope.study.roles import Roles

SITES = [f"transformer_blocks.{index}.attn1" for index in range(6)]
HEADS = 8
TIED, CONTROL = "tiled", "untiled"
FEATURES = ("edge", "texture", "luminance", "counterpart")
STEPS = {132: 3.0, 495: 0.0, 858: -3.0}
# (site, head): role, feature
NAMED = {
    (SITES[0], 1): ("edge", "edge"),
    (SITES[1], 2): ("counterpart", "counterpart"),
    (SITES[2], 0): ("counterpart", "counterpart"),
    (SITES[2], 6): ("luminance", "luminance"),
    (SITES[3], 3): ("counterpart", "counterpart"),
    (SITES[4], 4): ("uniform", None),
    (SITES[4], 5): ("local", None),
    (SITES[5], 7): ("sink", None),
}


def numbers(value, error=0.02, p=None, sources=20):
    """The columns of an estimate."""
    return {
        "value": value, "low": value - 2 * error, "high": value + 2 * error, "p_value": p, "p_maxt": p,
        "standard_error": error, "sources": sources, "exploratory": False, "void": 0,
    }  # fmt: skip


def roles(groups=(TIED, CONTROL)):
    generator = np.random.default_rng(3)
    names, excess, steps, clusters = [], [], [], []
    for group in groups:
        for site in SITES:
            for head in range(HEADS):
                role, feature = NAMED.get((site, head), ("none", None)) if group == TIED else ("none", None)
                for name in FEATURES:
                    size = 0.6 if name == feature else generator.normal(0, 0.02)
                    p = 0.0004 if name == feature else 0.9
                    key = {"group": group, "split": "confirm", "site": site, "head": head, "feature": name}
                    unit = "share of attention" if name == "counterpart" else "standard deviations"
                    excess.append({**key, **numbers(size, p=p), "unit": unit})
                    for step, log_snr in STEPS.items():
                        moved = size * (1 + log_snr / 6)
                        steps.append({**key, "timestep": step, "log_snr": log_snr, **numbers(moved, p=p)})
                found = numbers(0.6, p=0.0004) if role != "none" else dict.fromkeys(numbers(0.0))
                names.append({
                    "group": group, "site": site, "head": head, "role": role, "feature": feature,
                    "sign": 1 if feature else None, "unit": "standard deviations" if role != "none" else None, **found,
                    "discover": 0.7 if feature else None,
                    "reason": "nothing was found on discover" if role == "none" else None, "entropy": 3.0 + head / 10,
                    "entropy_normalised": (3.0 + head / 10) / np.log(64), "distance": 2.5,
                    "local": role == "counterpart",
                    "gating": "acts at high log-SNR" if role == "counterpart" else None,
                    **dict.fromkeys(("slope", "slope_low", "slope_high", "slope_p_holm"), 0.1 if feature else None),
                })  # fmt: skip
                clusters.append({"group": group, "site": site, "head": head, "cluster": 1 + (role != "none")})
    table = pl.DataFrame(names, infer_schema_length=None)
    kinds = [
        {
            "group": TIED, "role": role, "kind": kind, "heads": count, "entropy": 3.2, "entropy_low": 3.1,
            "entropy_high": 3.3,
            "entropy_sd": None if count == 1 else 0.1, "normalised": 0.77, "normalised_low": 0.745,
            "normalised_high": 0.793, "normalised_sd": None if count == 1 else 0.02,
        }
        for role, kind, count in (
            ("counterpart", "semantic understanding", 3), ("edge", "edge detection", 1), ("luminance", None, 1),
            ("none", None, 40),
        )
    ]  # fmt: skip
    agreement = [
        {
            "group": group,
            "clusters": count,
            "agreement": 0.91 if count == 2 else 0.5,
            "chance": 0.33,
            "chance_high": 0.6,
            "chosen": group == TIED and count == 2,
        }
        for group in groups
        for count in (2, 3)
    ]
    features = pl.DataFrame(
        [
            {
                "group": group,
                "split": split,
                "grid_height": 8,
                "grid_width": 8,
                "feature": name,
                "kept": name in FEATURES,
                "reason": "" if name in FEATURES else "other features say the same",
            }
            for group in groups
            for split in ("discover", "confirm")
            for name in (*FEATURES, "saturation")
        ]
    )
    return Roles(
        table,
        table.select("group", "site", "head", "role", "feature", "sign", "discover"),
        pl.DataFrame(excess, infer_schema_length=None),
        pl.DataFrame(steps, infer_schema_length=None),
        pl.DataFrame(kinds, infer_schema_length=None),
        pl.DataFrame(clusters),
        pl.DataFrame(agreement),
        features,
        ties_of(table),
    )


def ties_of(names):
    """Excess on counterparts on the tied group minus that on its control, on both splits."""
    heads = names.filter(pl.col("group") == TIED).select("site", "head", "role")
    rows = []
    for split in ("discover", "confirm"):
        for number, (site, head, role) in enumerate(heads.iter_rows()):
            tied = 0.2 + 0.01 * number if role == "counterpart" else 0.0
            rows.append({
                "group": TIED, "control": CONTROL, "split": split, "site": site, "head": head, "tied": tied,
                "control_value": 0.05, "value": tied - 0.05, "low": tied - 0.07, "high": tied - 0.03, "p_value": 0.002,
                "p_maxt": 0.004 if tied else 0.9, "standard_error": 0.01, "sources": [24, 21], "exploratory": False,
                "void": 0,
            })  # fmt: skip
    return pl.DataFrame(rows)


def role_effects():
    rows = []
    for group, role, inside, outside, confirmed in (
        (TIED, "counterpart", 3.2, 0.4, True),
        (TIED, "edge", 0.02, 0.03, False),
        (CONTROL, "counterpart", 0.3, 0.28, False),
    ):
        ends = {f"{name}_{end}": value + step for name, value in (("inside", inside), ("outside", outside))
                for end, step in (("low", -0.1), ("high", 0.1))}  # fmt: skip
        p = 0.0004 if confirmed else 0.8
        rows.append({
            "group": group, "role": role, "feature": role, "set": f"{role} heads of {group}",
            "heads": 3 if role == "counterpart" else 1, "inside": inside,
            "outside": outside, **ends, "absolute": 2 * inside, "absolute_low": 1.8 * inside,
            "absolute_high": 2.2 * inside, "control_ratio": 7.0, "low": inside - outside - 0.04,
            "high": inside - outside + 0.04, "p_value": p, "p_holm": p, "standard_error": 0.02, "sources": 20,
            "exploratory": False, "void": 0,
            "difference": inside - outside, "ratio": inside / outside, "ratio_low": 0.8 * inside / outside,
            "ratio_high": 1.2 * inside / outside, "share": 0.3, "controls": 3, "control_difference": 0.01,
            "beyond": inside - outside - 0.01, "beyond_low": inside - outside - 0.06,
            "beyond_high": inside - outside + 0.04, "confirmed": confirmed, "left_out": 0,
        })  # fmt: skip
    return pl.DataFrame(rows)


def circuits(group=TIED):
    heads = list(NAMED)[:6]
    sizes = (2, 4, 6, 8)
    faithfulness = [
        {
            "group": group,
            "set": "circuit",
            "kind": "circuit",
            "size": 6,
            **numbers(0.931),
            "metric": "loss",
            "reaches": "just",
        },
        {
            "group": group,
            "set": "circuit, 4 heads",
            "kind": "nested",
            "size": 4,
            **numbers(0.71),
            "metric": "loss",
            "reaches": "no",
        },
        {
            "group": group,
            "set": "circuit, 8 heads",
            "kind": "nested",
            "size": 8,
            **numbers(0.962),
            "metric": "loss",
            "reaches": "clearly",
        },
    ]
    curves = [
        {"group": group, "method": method, "size": size, **numbers(1 - slow / size)}
        for method, slow in (
            ("greedy", 0.4), ("attribution", 0.9), ("magnitude", 1.4), ("random 1", 1.8), ("random 2", 1.7)
        )
        for size in sizes
    ]  # fmt: skip
    minimality = [
        {
            "group": group,
            "site": site,
            "head": head,
            **numbers(0.4 / (index + 1), p=0.0004 if index < 4 else 0.3),
            "needed": index < 4,
        }
        for index, (site, head) in enumerate(heads)
    ]
    edges = [
        {
            "group": group, "sender_site": one[0], "sender_head": one[1], "receiver_site": two[0],
            "receiver_head": two[1], "part": part, **numbers(size, p=0.0004 if size > 0.1 else 0.5),
        }
        for (one, two, part, size) in (
            (heads[0], heads[1], "v", 0.3), (heads[1], heads[2], "q", 0.2), (heads[1], heads[4], "k", 0.15),
            (heads[2], heads[4], "v", 0.45), (heads[0], heads[5], "q", 0.01), (heads[4], (None, None), "output", 0.6),
            (heads[5], (None, None), "output", 0.12),
        )
    ]  # fmt: skip
    pairs = [{
        "group": group, "first_site": heads[1][0], "first_head": heads[1][1], "second_site": heads[2][0],
        "second_head": heads[2][1], "kind": "either suffices", "joint": 0.8, "sum": 0.1, "first": 0.04, "second": 0.06,
        **numbers(0.7, p=0.0004),
    }]  # fmt: skip
    return Circuits(
        pl.DataFrame(faithfulness),
        pl.DataFrame(curves),
        pl.DataFrame(
            [
                {"group": group, "site": site, "head": head, "depth": SITES.index(site), **numbers(0.1)}
                for site, head in heads
            ]
        ),
        pl.DataFrame(edges, infer_schema_length=None),
        pl.DataFrame(
            [
                {"group": group, "set": name, "measure": measure, "size": size, **numbers(value)}
                for name, measure, size, value in (
                    ("the circuit", "faithfulness", 6, 0.04),
                    (f"{SITES[0]} h1, {SITES[1]} h2", "circuit − model", 2, -0.11),
                )
            ]
        ),
        pl.DataFrame(minimality),
        pl.DataFrame(
            [
                {
                    "first": group,
                    "second": CONTROL,
                    "shared": 2,
                    "jaccard": 0.25,
                    "expected": 0.1,
                    "expected_shared": 0.8,
                    "p_value": 0.2,
                    "exploratory": True,
                }
            ]
        ),
        pl.DataFrame(pairs),
    )


def result(**fields):
    """A study's result with roles, their effects and circuits; fields take the place of these."""
    sources = pl.DataFrame({"group": [TIED, CONTROL], "split": "confirm", "items": 20, "sources": 20})
    found = {"roles": roles(), "role_effects": role_effects(), "circuits": circuits()}
    return StudyResult([TIED, CONTROL], SITES, list(STEPS), sources, **(found | fields))
