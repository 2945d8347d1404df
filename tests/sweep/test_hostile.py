"""A run directory from a stranger can be looked at: none of its code runs, and nothing outside of it changes.

Whoever makes one can seal its files as headscope does, so here they are sealed.
"""

import json
import os
import pickle
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from headscope.cli import app
from headscope.demonstration import runs
from headscope.study.inference import settings
from headscope.sweep import Run
from headscope.sweep.plan.units import CLAIMS, FAILURES, JOBS, KINDS
from headscope.sweep.store import store as files
from headscope.sweep.store.manifest import MANIFEST
from headscope.sweep.store.store import RunStore

READERS = (("sweep", "status"), ("sweep", "verify"), ("sweep", "sheet"), ("report",))
EVIL = '</script><script>alert("&")</script><img src=x onerror=alert(1)>'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer draws: what is tested here does not hang on them."""
    monkeypatch.setattr(settings, "RESAMPLES", 99)


@pytest.fixture
def run(run_of_every_kind, tmp_path) -> Path:
    return shutil.copytree(run_of_every_kind, tmp_path / "received" / "run")


@pytest.fixture
def outside(tmp_path, monkeypatch) -> Path:
    """What is not the run's: files, and a module that Python would find."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("victim.parquet", "victim.safetensors", "victim.json", "victim.png", "victim.html", "0" * 64):
        (folder / name).write_text(f"[{json.dumps(name)}]")
    (folder / "evil_scores.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef largest(*given):\n    raise SystemExit('ran')\n"
    )
    monkeypatch.syspath_prepend(folder)
    return folder


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(*arguments: object) -> str:
    """What a command says; anything but an error in words fails."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.output


def looked_at(run: Path, outside: Path) -> dict[str, str]:
    """What all that reads a run says of it, and that nothing else happened."""
    before = state(outside)
    said = {" ".join(command): call(*command, run) for command in READERS}
    try:
        opened = Run.open(run)
        said["tables"] = "".join(str(opened.table(kind).collect()) for kind in opened.tables)
    except ValueError as error:
        said["tables"] = str(error)
    assert state(outside) == before
    assert "evil_scores" not in sys.modules
    assert not (outside.parent / "ran").exists()
    return said


def mended(run: Path, outside: Path) -> None:
    """`retry` drops what is damaged of the run's own, and nothing else."""
    before = state(outside)
    call("sweep", "retry", run, "--quiet")
    assert state(outside) == before


def manifest_of(run: Path) -> dict:
    return json.loads((run / MANIFEST).read_text())


def rewrite_manifest(run: Path, **entries: object) -> None:
    content = {name: value for name, value in manifest_of(run).items() if name != "seal"}
    (run / MANIFEST).write_bytes(files.seals.to_json({**content, **entries}, MANIFEST))


def store_of(run: Path) -> RunStore:
    return RunStore(run, manifest_of(run)["identity"], {})


def rewrite_table(run: Path, kind: str, change) -> None:
    file = min((run / kind).glob("*.parquet"))
    store_of(run).write_table(kind, file.stem, change(pq.read_table(file)))


def test_an_honest_run_is_read(run, outside):
    said = looked_at(run, outside)
    assert "forwards" in said["sweep status"]
    assert "observations" in said["sweep verify"]
    assert "report.html" in said["report"].replace("\n", "")
    assert "contact-generations" in said["sweep sheet"].replace("\n", "")


@pytest.mark.parametrize("place", ["../../outside/victim", "/outside/victim", "..", "", "0" * 63 + "/", "A" * 64])
def test_ids_that_lead_elsewhere_are_refused(run, outside, place):
    for name in ("id", "kind"):
        units = manifest_of(run)["units"]
        units[0][name] = place
        rewrite_manifest(run, units=units)
        assert all("manifest.json' is damaged" in text.replace("\n", "") for text in looked_at(run, outside).values())
        mended(run, outside)


@pytest.mark.parametrize("folder", [*KINDS, FAILURES, CLAIMS, JOBS])
def test_folders_that_lead_elsewhere_are_refused(run, outside, folder):
    shutil.rmtree(run / folder, ignore_errors=True)
    (run / folder).symlink_to(outside)
    said = looked_at(run, outside)
    assert all(f"{folder}' is a link, expected a folder" in text.replace("\n", "") for text in said.values())
    mended(run, outside)


def test_links_to_files_are_replaced_not_followed(run, outside):
    # reports and sheets take the links' places
    (run / "report.html").symlink_to(outside / "victim.html")
    call("sweep", "sheet", run)
    for sheet in list(run.glob("contact-*.png")):
        sheet.unlink()
        sheet.symlink_to(outside / "victim.png")
    # results that are links to what isn't a result are damaged, and dropped
    for kind, victim in (("ablations", "victim.parquet"), ("reference", "victim.safetensors")):
        file = min((run / kind).iterdir())
        file.unlink()
        file.symlink_to(outside / victim)
    (run / FAILURES).mkdir(exist_ok=True)
    (run / FAILURES / "victim.json").symlink_to(outside / "victim.json")
    assert "torn: ablations/" in looked_at(run, outside)["sweep verify"]
    mended(run, outside)
    assert Run.open(run).verify().sound
    call("report", run)
    assert not (run / "report.html").is_symlink()
    assert not any(path.is_symlink() for path in run.rglob("*"))


def test_no_function_that_a_manifest_names_is_imported(run, outside):
    config = manifest_of(run)["config"]
    config["scores"].append("evil_scores:largest")
    config["image_scores"] = ["evil_scores:largest"]
    config["model"] = str(outside)
    config["groups"] = [f"mine={outside}", "evil_scores:largest=x", f"also={outside}/none"]
    identity = {**manifest_of(run)["identity"], "code of evil_scores:largest": "0" * 64}
    rewrite_manifest(run, config=config, identity=identity)
    said = looked_at(run, outside)
    assert "forwards" in said["sweep status"]
    assert "report.html" in said["report"].replace("\n", "")


@pytest.mark.parametrize("place", ["../../../outside/victim", "/tmp/victim", "a\0b"])
def test_names_in_tables_lead_nowhere(run, outside, place):
    for name in ("group", "fill"):

        def renamed(table: pa.Table, name=name) -> pa.Table:
            column = pa.array([place] * len(table)).dictionary_encode()
            return table.set_column(table.schema.get_field_index(name), name, column)

        rewrite_table(run, "generations", renamed)
        assert "expected a name without /" in looked_at(run, outside)["sweep sheet"].replace("\n", "")
        mended(run, outside)


class Scripts(HTMLParser):
    """Which elements a page has, with the names of their attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))


def test_no_text_of_a_run_is_markup_in_its_report(run, outside):
    call("report", run)
    before = Scripts(run / "report.html").elements

    def marked(table: pa.Table) -> pa.Table:
        for name in ("group", "site", "fill", "source_id"):
            if name in table.column_names:
                column = pa.array([text + EVIL for text in table[name].cast(pa.string()).to_pylist()])
                table = table.set_column(table.schema.get_field_index(name), name, column.dictionary_encode())
        return table

    for kind in ("observations", "ablations", "generations", "attributions"):
        rewrite_table(run, kind, marked)
    manifest = manifest_of(run)
    for name in ("device", "created", "threads"):
        manifest[name] = EVIL
    manifest["versions"] = {EVIL: EVIL}
    manifest["config"]["dtype"] = manifest["config"]["model"] = manifest["identity"]["model"] = EVIL
    for group in manifest["groups"]:
        group |= {"name": group["name"] + EVIL, "description": EVIL, "items": EVIL}
    for site in manifest["sites"]:
        site["name"] += EVIL
    manifest["config"]["seed"], manifest["timesteps"] = 0, [EVIL]
    del manifest["seal"]
    (run / MANIFEST).write_bytes(files.seals.to_json(manifest, MANIFEST))
    assert "report.html" in looked_at(run, outside)["report"].replace("\n", "")
    assert "alert" in (run / "report.html").read_text()
    after = Scripts(run / "report.html").elements
    assert {element for element in after if element not in before} == set()
    for tag in ("script", "img"):
        assert [element for element in after if element[0] == tag] == [e for e in before if e[0] == tag]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("config", "groups"), value) for value in ([5], "faces", None)),
        (("config", "sets"), [{"name": "a", "sites": [1], "heads": []}]),
        (("config", "sets"), [{"name": "a", "sites": [], "heads": [["mid"]]}]),
        *((("config", "seed"), value) for value in ("0", -1, None)),
        *((("config", "model"), value) for value in (5, "\ud800")),
        (("config",), []),
        (("identity", "model"), {}),
        (("sites",), [{"name": "mid", "heads": "2"}]),
        (("groups",), [None]),
        (("forwards",), "many"),
    ],
)
def test_manifests_of_another_shape_are_an_error_in_words(run, outside, place, value):
    entries = {place[0]: value if len(place) == 1 else {**manifest_of(run)[place[0]], place[1]: value}}
    rewrite_manifest(run, **entries)
    said = call("report", run).replace("\n", "")
    expected = "expected 0 to" if value == -1 else f"says something else of {place[0]} than headscope writes"
    assert said.startswith("error")
    assert expected in said
    assert not (run / "report.html").exists()


class Runs:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_in_a_table_is_read(run, outside, tmp_path):
    """Arrow once restored its extension types from pickles."""
    payload = pickle.dumps(Runs(tmp_path / "ran"), protocol=0)

    def extended(table: pa.Table) -> pa.Table:
        storage = pa.array(np.arange(len(table)))
        notes = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
        field = pa.field("extra", storage.type, metadata=notes)
        return table.append_column(field, storage)

    for kind in ("observations", "ablations", "generations"):
        rewrite_table(run, kind, extended)
    looked_at(run, outside)
    store = store_of(run)
    (unit,) = [unit["id"] for unit in Run.open(run).units if unit["kind"] == "generations"]
    _, file = files.unit_files(store.path, "generations", unit)
    notes = {"headscope.seal": files.seals.blank(f"generations/{file.name}"), "pickle": payload.hex()}
    files._write_sealed(file, files.save(load_file(file), notes))
    looked_at(run, outside)


def without(name: str):
    return lambda table: table.drop_columns(name)


def as_text(name: str):
    return lambda table: table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("ablations", without("edited")),
        ("ablations", as_text("edited")),
        ("ablations", without("group")),
        ("observations", without("entropy_mean")),
        ("generations", without("distance")),
        ("generations", lambda table: table.slice(0, 0)),
        ("generations", lambda table: pa.concat_tables([table] * 3)),
        ("observations", lambda table: pa.table({"a": [[{"b": 1}]]})),
    ],
)
def test_tables_of_another_shape_are_an_error_in_words(run, outside, kind, change):
    rewrite_table(run, kind, change)
    looked_at(run, outside)


def test_reports_of_more_rows_than_memory_holds_are_refused(run, outside, monkeypatch):
    """A few bytes may stand for any number of equal rows."""
    monkeypatch.setattr(runs, "memory_bytes", lambda: 999)
    assert "rows, about 0.0 GiB; reports are made of" in looked_at(run, outside)["report"].replace("\n", "")


@pytest.mark.parametrize(
    "tensors",
    [{}, {"clean": torch.zeros(1)}, {"clean": torch.zeros(1, 4, 4, 3), "edited": torch.zeros(0, dtype=torch.uint8)}],
)
def test_images_of_another_shape_are_an_error_in_words(run, outside, tensors):
    (unit,) = [unit["id"] for unit in Run.open(run).units if unit["kind"] == "generations"]
    store_of(run).write_tensors("generations", unit, tensors)
    assert "expected uint8" in looked_at(run, outside)["sweep sheet"].replace("\n", "")


def test_what_is_no_ordinary_file_is_not_waited_for(run, outside):
    for folder in (FAILURES, CLAIMS):
        (run / folder).mkdir(exist_ok=True)
        os.mkfifo(run / folder / f"{'0' * 64}.json")
        os.mkfifo(run / folder / ("1" * 64))
        (run / folder / ("2" * 64)).mkdir()
    file = min((run / "ablations").iterdir())
    file.unlink()
    os.mkfifo(file)
    looked_at(run, outside)
    mended(run, outside)
    assert Run.open(run).complete


def test_what_files_say_doesn_t_steer_the_terminal(run, outside):
    steering = "\x1b]0;owned\x07\x1b[2J\u202e"
    unit = next(unit["id"] for unit in manifest_of(run)["units"] if unit["kind"] == "ablations")
    (run / "ablations" / f"{unit}.parquet").unlink()
    (run / FAILURES).mkdir(exist_ok=True)
    tries = [{"error": steering, "death": False, "session": ""}]
    record = files.seals.to_json({"tries": tries}, f"{FAILURES}/{unit}.json")
    (run / FAILURES / f"{unit}.json").write_bytes(record)
    (run / "ablations" / f"{steering.replace('/', '')}.parquet").write_text("")
    for text in looked_at(run, outside).values():
        assert not set(text) & set("\x1b\x07\u202e")
