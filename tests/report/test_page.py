"""The page: self-contained, escaped, parseable, and showing the numbers it was given."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from headscope.report import GroupInfo, write_report, write_sweep_report
from headscope.report.images import sheet
from headscope.report.naming import Names, fitted, number, percent, probability, significant
from headscope.study import analyse, select_heads
from headscope.study.analysis import analyse_sweep
from report import roles_and_circuits as made
from study import simulated

EVIL = '<img src=x onerror=alert(1)></script><script>alert("&")'
STEPS = (100, 500)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes, text by element, and whether tags are balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text, self.unbalanced = [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def figures(self):
        found = [attrs["data-figure"] for tag, attrs in self.elements if "data-figure" in attrs]
        sources = [text for text in self.text["script"] if text.startswith('[{"label"')]
        return {name: json.loads(text) for name, text in zip(found, sources, strict=True)}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with simulated.fewer_draws(999):
        yield


@pytest.fixture(scope="module")
def tables():
    discover = simulated.ablations(timesteps=STEPS, heads=2)
    chosen = select_heads(discover, 2)
    confirm = simulated.ablations(split="confirm", fills=("mean", "zero"), chosen=chosen, timesteps=STEPS, heads=2)
    return simulated.observations(timesteps=STEPS, heads=2), discover, confirm


@pytest.fixture(scope="module")
def result(tables):
    return analyse(*tables, count_per_group=2)


def infos(groups):
    generator = np.random.default_rng(0)
    return [GroupInfo(name, f"about {name}", generator.integers(0, 256, (7, 8, 8, 3), np.uint8)) for name in groups]


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    info = {"Model": "tiny", "Versions": {"torch": "2.13.0"}, "Timesteps": STEPS, "Seed": 0}
    write_report(path, title="A study", run_info=info, groups=infos(["faces", "lfw"]), result=result)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(written):
    return Page(written)


def test_nothing_is_loaded_from_elsewhere(written, page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:image/png;base64,")), (tag, target)
    (policy,) = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    style = "".join(page.text["style"])
    assert "url(" not in style
    assert "@import" not in style
    assert len(written.encode()) < 6e6


def test_the_page_is_well_formed(written, page):
    assert written.lstrip().startswith("<!doctype html>")
    assert page.open == []
    assert page.unbalanced == []
    names = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(names) == len(set(names))
    targets = [a["href"][1:] for t, a in page.elements if t == "a"]
    assert set(targets) <= set(names)
    assert all(attrs.get("alt") for tag, attrs in page.elements if tag == "img")
    assert all(attrs.get("scope") for tag, attrs in page.elements if tag == "th")


def test_the_page_says_demonstration_and_the_numbers(result, written, page):
    assert "Demonstration" in page.text["span"]
    contrast = result.contrast
    ratio = contrast.ratio
    assert f"{number(ratio['low'], 4)} to {number(ratio['high'], 4)}" in written
    assert f"All heads at once, the groups differ (p = {probability(contrast.omnibus['p_value'])})" in written
    assert f"{len(contrast.different)} of {len(contrast.heads)} heads differ (max-t)" in written
    top = result.interventions.of_heads().filter(fill="mean").sort("value", descending=True).row(0, named=True)
    assert any(percent(top["value"]) in text for text in page.text["b"])
    assert f"{percent(top['low'])} to {percent(top['high'])}" in written
    assert "20 and 20 confirm sources" in written
    assert "torch 2.13.0" in written


def test_definitions_and_caveats_stand_on_the_page(page):
    text = " ".join(" ".join(parts) for tag, parts in page.text.items() if tag not in ("script", "style"))
    for phrase in (
        "ratio of sums, not a mean of ratios",
        "Normalised entropy H / ln K",
        "step-down correction",
        "without identities",
        "photographs, confirm: 1 source, 4 images",
        "number of keys K",
        "divides by the clean loss",
        "The model is small",
    ):
        assert phrase in text, phrase


def test_figures_hold_what_the_tables_hold(result, page):
    figures = page.figures()
    assert set(figures) == {
        "entropy_groups",
        "entropy_maps",
        "contrast_heads",
        "contrast_sites",
        "contrast_divergence",
        "controls",
        "ranking",
        "degradation_maps",
        "confirm",
    }
    normalised, nats, deficit = figures["entropy_maps"]
    assert [view["label"][:4] for view in (normalised, nats, deficit)] == ["Norm", "Nats", "From"]
    row = result.entropy_heads.filter(group="lfw", site=simulated.SITES[1][0], head=1, timestep=500)
    panel = normalised["data"][1]
    assert panel["z"][3][1] == pytest.approx(row.filter(measure="normalised")["value"].item())
    assert nats["data"][1]["z"][3][1] == pytest.approx(row.filter(measure="nats")["value"].item())
    overall = figures["contrast_sites"][0]["data"][0]
    site = result.contrast.sites.filter(pl.col("timestep").is_null(), pl.col("site") == simulated.SITES[0][0])
    assert overall["x"][0] == pytest.approx(site["value"].item())
    assert overall["x"][0] - overall["error_x"]["arrayminus"][0] == pytest.approx(site["low"].item())


def test_the_null_stands_beside_every_divergence(result, page):
    for view, measure in zip(
        page.figures()["contrast_divergence"],
        result.contrast.divergences["measure"].unique(maintain_order=True),
        strict=True,
    ):
        rows = result.contrast.divergences.filter(pl.col("measure") == measure)
        points = [trace for trace in view["data"] if "name" in trace]
        assert [trace["name"].partition(":")[0] for trace in points] == ["chance", "observed"]
        assert points[0]["y"] == pytest.approx(rows["null_mean"].to_list())
        tops = [y + up for y, up in zip(points[0]["y"], points[0]["error_y"]["array"], strict=True)]
        assert tops == pytest.approx(rows["null_high"].to_list())
        assert points[1]["y"] == pytest.approx(rows["value"].to_list())


def test_controls_stand_below_the_comparison_or_say_what_they_lack(page):
    energy, ratio = page.figures()["controls"]
    assert energy["layout"]["yaxis"]["ticktext"] == ratio["layout"]["yaxis"]["ticktext"] == [
        "lfw against faces_grey", "halves of lfw", "halves of faces_grey", "faces against faces_grey"
    ]  # fmt: skip
    text = " ".join(page.text["p"])
    assert "No model with untrained weights was observed." in text
    assert "No training items of lfw were observed." in text
    rows = [cell for cell in page.text["td"] if cell == "not made"]
    assert len(rows) == 4


def test_plotly_accepts_the_figures(page):
    check_with_plotly(page)


def check_with_plotly(page):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for views in page.figures().values():
        for view in views:
            layout = json.loads(json.dumps(view["layout"]))
            for shape in layout["shapes"]:
                # the page puts its own colours in place of these names
                assert shape["line"].pop("color") in ("page", "axis")
            graph_objects.Figure({"data": view["data"], "layout": layout})


def test_names_are_escaped_everywhere(tables, tmp_path):
    rename = pl.col("group").replace({"lfw": EVIL})
    observations, discover, confirm = (
        table.with_columns(rename, pl.col("site").replace({simulated.SITES[0][0]: EVIL})) for table in tables
    )
    result = analyse(observations, discover, confirm, natural=EVIL)
    path = write_report(
        tmp_path / "r.html", title=EVIL, run_info={EVIL: EVIL}, groups=infos([EVIL]), result=result, caveats=[EVIL]
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert page.unbalanced == []
    assert page.open == []
    assert not [attrs for _, attrs in page.elements if "onerror" in attrs]
    assert sum(tag == "script" for tag, _ in page.elements) == len(page.figures()) + 2
    assert EVIL in page.text["h1"]
    # Plotly obeys a little markup in labels: none may come from a name
    assert "<img" not in json.dumps(page.figures())


def test_roles_circuits_and_claims_stand_on_the_page(tmp_path):
    path = write_report(tmp_path / "r.html", title="t", run_info={}, groups=[], result=made.result())
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.unbalanced == []
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert {"#roles", "#circuits", "#claims"} <= set(links)
    assert {"role_grid", "role_excess", "role_gating", "role_causal"} <= set(page.figures())
    assert {"circuit_faithfulness", "circuit_curves", "circuit_minimality"} <= set(page.figures())
    assert sum(tag == "svg" for tag, _ in page.elements) == 1
    text = " ".join(" ".join(parts) for tag, parts in page.text.items() if tag not in ("script", "style"))
    for phrase in (
        "None is an answer",
        "The circuit of tiled.",
        "The abstract and this run, line by line",
        "ln 64 = 4.159",
        "A role is the one measured feature",
        "A circuit keeps the loss of the images that it was searched for",
    ):
        assert phrase in text, phrase
    check_with_plotly(page)


def test_names_of_roles_and_circuits_are_escaped(tmp_path):
    renamed = {made.TIED: EVIL, made.SITES[0]: EVIL, "counterpart": EVIL}

    def hostile(table):
        kinds = table.schema
        return table.with_columns(pl.col(name).replace(renamed) for name in kinds if kinds[name] == pl.String)

    roles, circuits = made.roles(), made.circuits()
    for found in (roles, circuits):
        for name in found.tables():
            object.__setattr__(found, name, hostile(getattr(found, name)))
    result = made.result(roles=roles, circuits=circuits, role_effects=hostile(made.role_effects()))
    result.groups[0] = EVIL
    path = write_report(tmp_path / "r.html", title="t", run_info={}, groups=infos([EVIL]), result=result)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.unbalanced == []
    assert page.open == []
    assert not [attrs for _, attrs in page.elements if "onerror" in attrs]
    assert sum(tag == "script" for tag, _ in page.elements) == len(page.figures()) + 2
    assert "<img" not in "".join(obeyed(page.figures()))


def obeyed(figure):
    """The texts of figures in which Plotly obeys markup: not the labels of views, nor names that aren't shown."""
    if isinstance(figure, dict):
        return [text for name, part in figure.items() if name not in ("label", "legendgroup") for text in obeyed(part)]
    if isinstance(figure, list):
        return [text for part in figure for text in obeyed(part)]
    return [figure] if isinstance(figure, str) else []


def test_one_group_without_ablations(tables, tmp_path):
    result = analyse(tables[0].filter(pl.col("group") == "photographs"))
    path = write_report(tmp_path / "r.html", title="One", run_info={}, groups=[], result=result)
    page = Page(path.read_text(encoding="utf-8"))
    assert any("Not compared." in text for text in page.text["p"])
    assert set(page.figures()) == {"entropy_groups", "entropy_maps"}


def test_sweep_report_shows_what_there_is(tables, tmp_path):
    generations = simulated.generations(simulated.items(("lfw",), sources=5), heads=2)
    path = write_sweep_report(tmp_path / "s.html", title="A sweep", run_info={"Model": "x"}, generations=generations)
    page = Page(path.read_text(encoding="utf-8"))
    assert set(page.figures()) == {"distances"}
    assert "Sweep" in page.text["span"]
    path = write_sweep_report(tmp_path / "t.html", title="A sweep", run_info={}, ablations=tables[2])
    page = Page(path.read_text(encoding="utf-8"))
    assert set(page.figures()) == {"ranking", "degradation_maps"}
    assert not any("corrected p" in text for text in page.text["th"])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every", [False, True])
def test_losses_that_are_no_numbers_void_their_head_and_are_counted(broken, every, tmp_path):
    """Of a model that overflowed: one such loss is enough."""
    labels = {"group": "faces", "split": "confirm", "replicate": 0, "timestep": 100, "site": "mid", "fill": "zero"}
    rows = [
        {**labels, "item": item, "source_id": f"s{item}", "head": head, "clean": item + 1.0, "edited": 2.0 * item + 2}
        for item in range(4)
        for head in range(2)
    ]
    for row in rows:
        if row["head"] == 1 and (every or row["item"] == 3):
            row["edited"] = broken
    path = tmp_path / "report.html"
    write_sweep_report(path, title="t", run_info={}, ablations=pl.DataFrame(rows))
    count = 4 if every else 1
    page = path.read_text()
    assert f"Rows with such a number: {count} in ablations.clean. Void are 1 of 2 in ablation ranking," in page
    assert f'<td class="number">void: {count} missing or not finite</td><td class="number">–</td>' in page
    assert "1 more heads are void: losses without them are not finite." in page
    ranking = analyse_sweep(ablations=pl.DataFrame(rows)).ablation_ranking
    assert ranking is not None
    ranking = ranking.sort("head")
    assert ranking["value"].to_list() == [1.0, None]
    assert ranking["absolute"].to_list() == [2.5, None]


def test_sites_stand_in_the_order_of_execution(tables, tmp_path):
    """Not in that of the rows, which is another one."""
    executed = [site for site, _ in reversed(simulated.SITES)]
    labels = [Names(executed, []).sites[site] for site in executed]
    observations, discover, confirm = tables
    study = analyse(observations, discover, confirm, sites=executed)
    write_report(tmp_path / "study.html", title="A study", run_info={}, groups=[], result=study)
    write_sweep_report(
        tmp_path / "sweep.html", title="A sweep", run_info={}, sites=executed, observations=observations,
        ablations=discover,
    )  # fmt: skip
    for name in ("study", "sweep"):
        page = Page((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
        for figure in ("entropy_maps", "degradation_maps"):
            for view in page.figures()[figure]:
                assert view["layout"]["yaxis"]["ticktext"] == labels
        # the sites table, then the heads of the table of entropies
        text = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        first_cells = re.findall(r'<th scope="row">([^<]+)</th>', text)
        assert [cell for cell in first_cells if cell in labels][: len(labels)] == labels
        heads = [f"{label} h{head}" for label in labels for head in (0, 1)]
        assert [cell for cell in first_cells if cell in heads][: len(heads)] == heads


def test_image_and_text_queries_of_a_head_stay_apart(tmp_path):
    """As of joint attention: two rows of a head, two views of the map, and the image's alone in sentences."""
    image = simulated.observations(simulated.items(("lfw",), sources=3), timesteps=STEPS, heads=2)
    text = image.with_columns(
        pl.col("entropy_mean", "entropy_normalised_mean") / 2, query_group=pl.lit("text"), queries=pl.lit(7, pl.Int64)
    )
    path = write_sweep_report(tmp_path / "s.html", title="t", run_info={}, observations=pl.concat([image, text]))
    page = Page(path.read_text(encoding="utf-8"))
    views = {view["label"]: np.array(view["data"][0]["z"]) for view in page.figures()["entropy_maps"]}
    assert [name.rpartition(", ")[2] for name in views] == ["image queries"] * 3 + ["text queries"] * 3
    for name in ("Normalised, H / ln K", "Nats, H"):
        np.testing.assert_allclose(views[f"{name}, image queries"], 2 * views[f"{name}, text queries"], rtol=1e-12)
    site, head = simulated.SITES[0][0], 1
    one = image.filter(site=site, head=head, timestep=STEPS[0]).group_by("source_id").agg(pl.col("entropy_mean").mean())
    assert views["Nats, H, image queries"][1][0] == pytest.approx(one["entropy_mean"].mean())
    assert {f"down 1.0 h1, {kind} queries" for kind in ("image", "text")} <= set(page.text["th"])
    assert any("Across the 14 heads" in sentence for sentence in page.text["li"])
    # nothing is added where all queries are of one kind
    path = write_sweep_report(tmp_path / "t.html", title="t", run_info={}, observations=image)
    assert "queries" not in "".join(view["label"] for view in Page(path.read_text()).figures()["entropy_maps"])


def test_a_head_without_a_number_has_no_colour(tmp_path):
    """Rather than that of the smallest degradation."""
    table = simulated.ablations(timesteps=STEPS, heads=2)
    site = simulated.SITES[2][0]
    void = (pl.col("site") == site) & (pl.col("head") == 1) & (pl.col("timestep") == STEPS[1])
    table = table.with_columns(edited=pl.when(void).then(math.nan).otherwise("edited"))
    path = write_sweep_report(tmp_path / "s.html", title="t", run_info={}, ablations=table)
    (view,) = Page(path.read_text(encoding="utf-8")).figures()["degradation_maps"]
    for panel in view["data"]:
        missing = [(row, column) for row, line in enumerate(panel["z"]) for column, z in enumerate(line) if z is None]
        assert missing == [(2 * 2 + 1, 1)]


def test_reports_repeat(result, written, tmp_path):
    info = {"Model": "tiny", "Versions": {"torch": "2.13.0"}, "Timesteps": STEPS, "Seed": 0}
    path = write_report(
        tmp_path / "r.html", title="A study", run_info=info, groups=infos(["faces", "lfw"]), result=result
    )
    assert path.read_text(encoding="utf-8") == written


def test_sheet_is_a_png_of_every_image():
    images = np.zeros((12, 5, 4, 3), np.uint8)
    uri, width, height = sheet(images)
    assert (width, height) == (10 * 6 - 2, 2 * 7 - 2)
    assert base64.b64decode(uri.partition(",")[2]).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="images"):
        sheet(images.astype(np.float32))


def test_numbers_are_written_for_people():
    assert number(-0.01234, 3) == "−0.012"
    assert number(-0.00001, 3) == "0.000"
    assert number(None) == number(float("nan")) == "–"
    assert percent(0.4567) == "45.7 %"
    assert percent(1.283) == "128 %"
    assert percent(0.00026123) == "0.026 %"
    assert percent(0.0) == "0 %"
    assert significant(0.05) == "0.0500"
    assert probability(0.0002) == "0.0002"
    assert probability(0.0321) == "0.032"
    assert probability(1.0) == "1"
    assert probability(0.00004) == "< 0.0001"


def test_decimals_follow_the_narrowest_interval():
    assert fitted((-0.000091, 0.000077))(-0.0000121) == "−0.000012"
    assert fitted((0.0, 0.5), (0.1, 0.12))(1 / 3) == "0.333"
    assert fitted((None, None), (0.2, 0.2), least=4)(0.5) == "0.5000"


def test_short_site_names_stay_distinct():
    assert Names(["down_blocks.1.attentions.0"], []).head("down_blocks.1.attentions.0", 3) == "down 1.0 h3"
    clash = Names(["mid_block.attentions.0", "mid 0"], [])
    assert clash.head("mid_block.attentions.0", 1) == "mid_block.attentions.0 h1"
