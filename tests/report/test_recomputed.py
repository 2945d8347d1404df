"""Every table and figure of a study's page against means by hand: none of the code that makes them takes part."""

import json
import math
import re
from html.parser import HTMLParser

import polars as pl
import pytest

from headscope.report import write_report
from headscope.study import analyse, select_heads
from study import simulated

STEPS = (100, 500)
HEADS, OF_GROUP = 2, 2
# not the order of the rows
ORDER = [site for site, _ in reversed(simulated.SITES)]
KEYS = dict(simulated.SITES)
EVERY = [(site, head) for site in ORDER for head in range(HEADS)]
NATURAL, SYNTHETIC = "lfw", "faces_grey"


class Tables(HTMLParser):
    """The rows of every table by its caption, and the figures by their names."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.figures: dict[str, list[dict]] = {}
        self.rows: list[list[str]] = []
        self.cell: str | None = None
        self.figure: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th", "caption"):
            self.cell = ""
        self.figure = dict(attrs).get("data-figure") if tag == "script" else self.figure

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        if self.figure:
            self.figures[self.figure], self.figure = json.loads(data), None

    def handle_endtag(self, tag):
        text = (self.cell or "").strip()
        if tag == "caption":
            self.tables[text] = self.rows
        elif tag in ("td", "th"):
            self.rows[-1].append(text)
        if tag in ("td", "th", "caption"):
            self.cell = None


@pytest.fixture(scope="module")
def tables():
    # photographs are several of a source, and weigh as one
    observed = simulated.observations(timesteps=STEPS, heads=HEADS)
    discover = simulated.ablations(timesteps=STEPS, heads=HEADS)
    chosen = select_heads(discover, OF_GROUP)
    fills = ("mean", "zero")
    confirm = simulated.ablations(split="confirm", fills=fills, chosen=chosen, timesteps=STEPS, heads=HEADS)
    return observed, discover, confirm


@pytest.fixture(scope="module")
def page(tables, tmp_path_factory):
    with simulated.fewer_draws(99):
        result = analyse(*tables, count_per_group=OF_GROUP, sites=ORDER)
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, title="t", run_info={}, groups=[], result=result)
    return Tables(path.read_text(encoding="utf-8"))


def table(page, beginning):
    (found,) = (rows for caption, rows in page.tables.items() if caption.startswith(beginning))
    return found[1:]


@pytest.fixture(scope="module")
def labels(page):
    rows = table(page, "Attention sites")
    assert [(row[1], row[2:]) for row in rows] == [
        (site, [str(HEADS), str(KEYS[site]), f"{math.log(KEYS[site]):.2f}"]) for site in ORDER
    ]
    return {row[0]: row[1] for row in rows}


def head(labels, text):
    label, _, number = text.rpartition(" h")
    return labels[label], int(number)


def check(shown, expected, factor=1.0):
    """A number on the page is the expected one, rounded to the decimals that it has."""
    digits = shown.replace("−", "-").replace(" %", "")
    mantissa, _, exponent = digits.partition("e")
    half = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    assert abs(float(digits) - factor * expected) <= half * (1 + 1e-6), (shown, factor * expected)


def over_sources(rows, value, by):
    """By the columns: the mean over sources of the mean over a source's items."""
    of_source = rows.group_by(*by, "source_id").agg(pl.col(value).mean())
    means = of_source.group_by(by).agg(pl.col(value).mean())
    return {row[:-1]: row[-1] for row in means.select(*by, value).iter_rows()}


def overall(found):
    """Over the timesteps, which come last in the keys."""
    return {key[:-1]: sum(found[(*key[:-1], step)] for step in STEPS) / len(STEPS) for key in found}


def degradations(rows, group, fill):
    """relative and absolute by (site, head, timestep)."""
    rows = rows.filter(group=group, fill=fill).with_columns(change=pl.col("edited") - pl.col("clean"))
    by = ["site", "head", "timestep"]
    change, clean = over_sources(rows, "change", by), over_sources(rows, "clean", by)
    return {key: change[key] / clean[key] for key in change}, change


def titles(view):
    return [re.sub("<.*?>", "", note["text"]) for note in view["layout"]["annotations"]]


def test_entropies(page, labels, tables):
    observed = tables[0]
    by = ["group", "site", "head", "timestep"]
    means = {name: over_sources(observed, f"entropy_{name}", by) for name in ("normalised_mean", "mean")}
    rows = table(page, "Entropy of every head")
    assert [head(labels, row[0]) for row in rows] == EVERY
    for row in rows:
        for place, group in enumerate(simulated.SHIFTS):
            key = (group, *head(labels, row[0]))
            check(row[2 + 2 * place].partition(" (")[0], overall(means["normalised_mean"])[key])
            check(row[3 + 2 * place], overall(means["mean"])[key])
    normalised, nats, deficit = page.figures["entropy_maps"]
    for view in (normalised, nats, deficit):
        assert titles(view) == list(simulated.SHIFTS)
        for group, panel in zip(simulated.SHIFTS, view["data"], strict=True):
            for (site, number), cells in zip(EVERY, panel["z"], strict=True):
                for step, cell in zip(STEPS, cells, strict=True):
                    key = group, site, number, step
                    # ln K - H
                    far = math.log(KEYS[site]) - means["mean"][key]
                    expected = {"N": means["normalised_mean"][key], "F": far}
                    expected = means["mean"][key] if view is nats else expected[view["label"][0]]
                    assert cell == pytest.approx(expected, rel=1e-9)
    pooled = pooled_items(observed)
    points = {trace["name"]: trace["y"] for trace in page.figures["entropy_groups"][0]["data"] if "name" in trace}
    for group in simulated.SHIFTS:
        at = over_sources(pooled.filter(group=group), "entropy_normalised_mean", ["timestep"])
        assert points[group] == pytest.approx([*(at[(step,)] for step in STEPS), overall(at)[()]])


def pooled_items(observed):
    """Every head counts alike."""
    item = ["group", "split", "source_id", "item", "timestep"]
    return observed.group_by(item).agg(pl.col("entropy_normalised_mean").mean())


def test_the_contrast(page, labels, tables):
    confirm = tables[0].filter(split="confirm")
    found = over_sources(pooled_items(confirm), "entropy_normalised_mean", ["group", "timestep"])
    rows = table(page, "Normalised entropy, mean over heads")
    assert [row[0] for row in rows] == [*map(str, STEPS), "overall"]
    for row in rows:
        natural, synthetic = (
            overall(found)[(group,)] if row[0] == "overall" else found[group, int(row[0])]
            for group in (NATURAL, SYNTHETIC)
        )
        for shown, value in zip(row[1:4], (natural, synthetic, natural / synthetic), strict=True):
            check(shown, value)
    at = over_sources(confirm, "entropy_mean", ["group", "site", "head", "timestep"])
    change = {key[1:]: at[key] - at[SYNTHETIC, *key[1:]] for key in at if key[0] == NATURAL}
    mean = overall(change)
    rows = table(page, "Difference of every head")
    assert {head(labels, row[0]) for row in rows} == set(EVERY)
    for row in rows:
        check(row[1], mean[head(labels, row[0])])
    for view in page.figures["contrast_heads"]:
        (trace,) = view["data"]
        names = view["layout"]["yaxis"]["ticktext"]
        for place, value in zip(trace["y"], trace["x"], strict=True):
            assert value == pytest.approx(mean[head(labels, names[round(place)])])

    def ratio(site, step=None):
        steps = STEPS if step is None else (step,)
        return math.exp(sum(change[site, one, at] for one in range(HEADS) for at in steps) / HEADS / len(steps))

    rows = table(page, "exp(difference of H)")
    assert [labels[row[0]] for row in rows] == ORDER
    for row in rows:
        check(row[2], ratio(labels[row[0]]))
        for cell, step in zip(row[6:], STEPS, strict=True):
            check(cell.partition(" (")[0], ratio(labels[row[0]], step))
    for view, step in zip(page.figures["contrast_sites"], (None, *STEPS), strict=True):
        assert view["data"][0]["x"] == pytest.approx([ratio(site, step) for site in ORDER])


def test_what_entropies_vary_with(page, tables):
    """Of one item a source and one draw an item: the variance between sources."""
    rows = {row[0]: row for row in table(page, "Variance of a head's entropy")}
    assert list(rows) == list(simulated.SHIFTS)
    for group in ("faces", "faces_grey", "lfw"):
        own = tables[0].filter(group=group)
        of_source = own.group_by("site", "head", "source_id").agg(pl.col("entropy_mean").mean())
        heads = of_source.group_by("site", "head").agg(pl.col("entropy_mean").var())
        check(rows[group][4].partition(" (")[0], heads["entropy_mean"].mean())
        assert rows[group][1:4] == ["40", "40", "40"]
        assert rows[group][5:] == ["–", "–", "–", "0"]


def test_degradations(page, labels, tables):
    _, discover, confirm = tables
    groups = (SYNTHETIC, NATURAL)
    relative, absolute, at = {}, {}, {}
    for rows, split, fills in ((discover, "discover", ("mean",)), (confirm, "confirm", ("mean", "zero"))):
        for group in groups:
            for fill in fills:
                at[split, group, fill], change = degradations(rows, group, fill)
                relative[split, group, fill] = overall(at[split, group, fill])
                absolute[split, group, fill] = overall(change)
    chosen = set()
    for group in groups:
        own = relative["discover", group, "mean"]
        chosen |= set(sorted(own, key=own.get, reverse=True)[:OF_GROUP])
    rows = table(page, "Degradation of every ablated head")
    assert len(rows) == len(EVERY) * 2
    for row in rows:
        one, own = head(labels, row[0]), relative["discover", row[1], row[2]]
        assert int(row[3]) == 1 + sum(value > own[one] for value in own.values())
        check(row[4], own[one], 100)
        check(row[6], absolute["discover", row[1], row[2]][one])
        assert row[8] == "20"
    rows = table(page, "Degradation of the selected heads")
    assert {head(labels, row[0]) for row in rows} == chosen
    assert len(rows) == 4 * len(chosen)
    for row in rows:
        one = head(labels, row[0])
        if row[2] == "mean":
            check(row[3], relative["discover", row[1], "mean"][one], 100)
        else:
            assert row[3] == "–"
        check(row[4], relative["confirm", row[1], row[2]][one], 100)
        check(row[7], absolute["confirm", row[1], row[2]][one])
    (view,) = page.figures["degradation_maps"]
    for group, panel in zip(titles(view), view["data"], strict=True):
        for one, cells in zip(EVERY, panel["z"], strict=True):
            for step, cell in zip(STEPS, cells, strict=True):
                value = at["discover", group, "mean"][*one, step]
                floor = view["layout"]["coloraxis"]["cmin"]
                assert cell == pytest.approx(math.log10(max(value, 10.0**floor)))
    for found, view in zip((relative, absolute), page.figures["ranking"], strict=True):
        for number, (group, trace) in enumerate(zip(titles(view), view["data"], strict=True), 1):
            own = found["discover", group, "mean"]
            order = sorted(own, key=own.get, reverse=True)
            names = view["layout"]["yaxis" if number == 1 else f"yaxis{number}"]["ticktext"]
            assert [head(labels, name) for name in names] == order
            assert trace["x"] == pytest.approx([own[one] for one in order])
            solid = [one for one, symbol in zip(order, trace["marker"]["symbol"], strict=True) if "open" not in symbol]
            assert set(solid) == chosen
    for found, view in zip((relative, absolute), page.figures["confirm"], strict=True):
        names = view["layout"]["yaxis"]["ticktext"]
        traces = iter(view["data"])
        for group in titles(view):
            for fill in ("mean", "zero"):
                trace = next(traces)
                assert trace["name"] == f"{fill} fill"
                for place, value in zip(trace["y"], trace["x"], strict=True):
                    one = head(labels, names[round(place)])
                    assert value == pytest.approx(found["confirm", group, fill][one])
