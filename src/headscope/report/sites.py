"""The attention sites and their labels."""

import math

from headscope.report.naming import Names, number
from headscope.report.tables import Table
from headscope.study.analysis import StudyResult


def sites_table(result: StudyResult, names: Names) -> Table:
    """The module behind each short label, its number of heads on the page, and its number of keys."""
    keys: dict[str, set[int]] = {}
    heads: dict[str, set[int]] = {}
    attributed = None if result.attributions is None else result.attributions.heads
    for table in (result.entropy_heads, result.ablation_ranking, attributed, result.generation_ranking):
        if table is not None:
            for site, head in table.select("site", "head").unique().iter_rows():
                heads.setdefault(site, set()).add(head)
    if result.entropy_heads is not None:
        for site, count in result.entropy_heads.select("site", "keys").unique().iter_rows():
            keys.setdefault(site, set()).add(count)
    rows = [
        [
            names.sites[site],
            site,
            str(len(heads.get(site, ()))),
            ", ".join(str(count) for count in sorted(keys.get(site, ()))) or "–",
            ", ".join(number(math.log(count), 2) for count in sorted(keys.get(site, ()))) or "–",
        ]
        for site in result.sites
    ]
    columns = [("label", False), ("module", False), ("heads shown", True), ("keys K", True), ("ln K, nats", True)]
    return Table("Attention sites, in the order of execution; h0 is a site's first head.", columns, rows)
