"""What was asked for is there, or is an error that says what is; what a sweep takes by itself is said."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from headscope.cli import app
from headscope.demonstration import StudyConfig
from headscope.sweep import Execution, SweepConfig, run_sweep
from headscope.sweep.compute.opened import Opened
from headscope.sweep.plan import items
from headscope.sweep.plan.choosing import choose_items
from headscope.sweep.plan.items import load_task, open_items


def folder(path, count):
    """A folder of so many images."""
    path.mkdir()
    for index in range(count):
        Image.fromarray(np.full((16, 16, 3), index, np.uint8)).save(path / f"{index:02d}.png")
    return f"mine={path}"


@pytest.fixture(scope="module")
def task(ddpm_directory):
    return load_task(SweepConfig(model=ddpm_directory, groups=("faces",)))


def taken(task, **fields):
    """Numbers of swept items by split and of reference items, and the note."""
    (group,) = open_items(SweepConfig(**fields), task)
    splits = [item.split for item in group.swept]
    assert not {item.key for item in group.swept} & {item.key for item in group.reference}
    return splits.count("discover"), splits.count("confirm"), len(group.reference), group.note


def test_bundled_groups_have_all_that_a_sweep_takes_by_itself(task):
    assert taken(task, groups=("lfw",)) == (20, 20, 60, "")
    assert taken(task, groups=("lfw",), reference_items=16) == (20, 20, 16, "")
    assert taken(task, groups=("lfw",), items=20, reference_items=60) == (20, 20, 60, "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"items": 5000}, "items: got 5000 of each split, and 'lfw' has 20 in discover and 20 in confirm; expected at"),
        ({"items": 21, "splits": ("confirm",)}, "items: got 21 of each split, and 'lfw' has 20 in confirm; expected"),
        ({"reference_items": 61}, "reference_items: got 61, and 'lfw' has 60 beside the swept ones; expected at most"),
    ],
)
def test_bundled_groups_that_have_less_are_errors(task, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        taken(task, groups=("lfw",), **fields)


def test_training_items_are_the_reference(task):
    """All of them, up to 2,000; where they are swept, too, the others."""
    (group,) = open_items(SweepConfig(groups=("unmirrored",), items=1), task)
    assert len(group.reference) == 1200
    assert {item.split for item in group.reference} == {"train"}
    (group,) = open_items(SweepConfig(groups=("lfw",), splits=("train", "confirm")), task)
    swept = [item.split for item in group.swept]
    assert (swept.count("train"), swept.count("confirm"), len(group.reference)) == (20, 20, 40)
    assert {item.split for item in group.reference} == {"train"}
    assert not {item.source_id for item in group.reference} & {item.source_id for item in group.swept}
    (group,) = open_items(SweepConfig(groups=("lfw",), splits=("train",), items=60, fills=("zero",)), task)
    assert len(group.swept) == 60
    with pytest.raises(ValueError, match="items: all training items of 'lfw' are swept, and the fills mean and"):
        open_items(SweepConfig(groups=("lfw",), splits=("train",), items=60), task)


def test_groups_without_training_items_have_larger_references_than_sweeps(task, tmp_path):
    mine = folder(tmp_path / "images", 60)
    assert taken(task, groups=(mine,)) == (20, 20, 20, "mine: the reference has 20 items (by default up to 200)")
    many = {"discover": range(20), "confirm": range(20, 40)}
    chosen = choose_items(
        SweepConfig(groups=("faces",)), "many", many, (), range(400), lambda members, count: list(members)[:count]
    )
    assert (len(chosen.swept), len(chosen.reference), chosen.note) == (40, 200, "")


def test_folders_that_have_less_are_errors(task, tmp_path):
    mine = folder(tmp_path / "images", 13)
    with pytest.raises(
        ValueError, match=r"got 10 of each split, and 'mine' has 7 in discover and 6 in confirm; expected at most 6"
    ):
        taken(task, groups=(mine,), items=10, fills=("zero",))
    assert taken(task, groups=(mine,), items=6, fills=("zero",)) == (6, 6, 0, "")
    # one is left for the reference
    assert taken(task, groups=(mine,), items=6)[:3] == (6, 6, 1)
    assert "the reference has 1 items (by default up to 200)" in taken(task, groups=(mine,), items=6)[3]
    with pytest.raises(ValueError, match="reference_items: got 2, and 'mine' has 1 beside the swept ones"):
        taken(task, groups=(mine,), items=6, reference_items=2)
    even = folder(tmp_path / "even", 12)
    message = "items: all that 'mine' has are swept, and the fills mean and resample need .*; expected at most 5 items"
    with pytest.raises(ValueError, match=message):
        taken(task, groups=(even,), items=6)
    assert taken(task, groups=(even,), items=5)[:3] == (5, 5, 2)


def test_by_default_what_there_is_is_taken_and_said(task, tmp_path):
    mine = folder(tmp_path / "images", 12)
    assert taken(task, groups=(mine,), fills=("zero",)) == (
        6,
        6,
        0,
        "mine: 6 in discover and 6 in confirm are all that it has (by default up to 20 of each are taken)",
    )
    discover, confirm, reference, note = taken(task, groups=(mine,))
    assert (discover + confirm, reference) == (9, 3)
    assert f"{discover} in discover and {confirm} in confirm are all" in note
    assert "the reference has 3 items (by default up to 200)" in note


def test_a_split_that_is_empty_is_an_error_or_said(task, tmp_path):
    mine = folder(tmp_path / "images", 1)
    assert "1 in discover and 0 in confirm are all" in taken(task, groups=(mine,), fills=("zero",))[3]
    with pytest.raises(ValueError, match="'mine' has 1 in discover and 0 in confirm; expected splits"):
        taken(task, groups=(mine,), fills=("zero",), items=1)
    with pytest.raises(ValueError, match="groups: 'mine' has no items in the splits confirm"):
        taken(task, groups=(mine,), fills=("zero",), splits=("confirm",))


def test_an_image_counts_once(task, tmp_path):
    """As a copy of another file, a link to it or in another format: others take its place, or there are fewer."""
    mine = folder(tmp_path / "images", 12)
    images = tmp_path / "images"
    (images / "05.png").write_bytes((images / "01.png").read_bytes())
    Image.open(images / "02.png").save(images / "06.bmp")
    (images / "07.png").unlink()
    (images / "07.png").symlink_to(images / "03.png")
    (group,) = open_items(SweepConfig(groups=(mine,), fills=("zero",)), task)
    names = sorted(item.source_id for item in group.swept)
    assert names == ["00.png", "01.png", "02.png", "03.png", "04.png", "06.png", "08.png", "09.png", "10.png", "11.png"]
    assert "mine: 3 image(s) that repeat another are left out (05.png, 06.bmp, 07.png)" in group.note.split("\n")
    with pytest.raises(ValueError, match=r"items: got 6 of each .*; images that repeat another don't count, \d were"):
        taken(task, groups=(mine,), items=6, fills=("zero",))
    # asked for, and there without them
    discover, confirm, reference, _ = taken(task, groups=(mine,), items=3, reference_items=2)
    assert (discover, confirm, reference) == (3, 3, 2)
    (group,) = open_items(SweepConfig(groups=(mine,), items=3, reference_items=2), task)
    assert len({item.pixels for item in (*group.swept, *group.reference)}) == 8


def test_an_image_that_changes_during_a_run_is_an_error(task, tmp_path, monkeypatch):
    """Where there are too many to be kept in memory."""
    monkeypatch.setattr(items, "KEPT_BYTES", 0)
    mine = folder(tmp_path / "images", 4)
    (group,) = open_items(SweepConfig(groups=(mine,), items=1, fills=("zero",)), task)
    changed, same = group.swept
    Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / changed.source_id)
    assert isinstance(changed, items.SweptItem)
    assert isinstance(same, items.SweptItem)
    assert same.image.shape == (32, 32, 3)
    for read in (changed.fetch, lambda: changed.image):
        with pytest.raises(ValueError, match=rf"image '{changed.source_id}' of 'mine' has changed since the run was"):
            read()


def test_what_lies_beside_images_is_said(task, tmp_path):
    mine = folder(tmp_path / "images", 8)
    (tmp_path / "images" / "00.txt").write_text("a caption")
    assert taken(task, groups=(mine,), items=2, fills=("zero",)) == (
        *(2, 2, 0),
        "mine: files of other endings are not read: 1 .txt",
    )


def test_prompts_are_counted_alike():
    config = SweepConfig(groups=("faces",), items=2, fills=("zero",))
    by_split = {"discover": [0, 2], "confirm": [1]}
    with pytest.raises(ValueError, match="'prompts' has 2 in discover and 1 in confirm; expected at most 1"):
        choose_items(config, "prompts", by_split, (), range(3), lambda members, count: members[:count])


def test_prompts_that_repeat_are_said(diffusion_directory, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na dog\na fox\na fox\n")
    config = SweepConfig(model=diffusion_directory, prompts=str(tmp_path / "prompts.txt"), fills=("zero",))
    (group,) = open_items(config, load_task(config))
    assert [item.caption for item in group.swept] == ["a fox", "a dog"]
    assert "prompts: 2 of 4 lines repeat an earlier one and are left out" in group.note.split("\n")


def test_it_is_said_before_work_starts(ddpm_directory, tmp_path):
    mine = folder(tmp_path / "images", 2)
    asked = {"groups": (mine,), "timesteps": (60,), "fills": ("zero",), "sites": ("mid_block.*",), "observe": False}
    text = io.StringIO()
    run = run_sweep(
        SweepConfig(model=ddpm_directory, **asked), tmp_path / "run", progress=False, console=Console(file=text)
    )
    note = "mine: 1 in discover and 1 in confirm are all that it has (by default up to 20 of each are taken)\n"
    assert text.getvalue() == note
    assert run.manifest["groups"][0]["items"] == 2
    arguments = (
        "sweep",
        "--model",
        ddpm_directory,
        "--group",
        mine,
        "--timesteps",
        "60",
        "--fill",
        "zero",
        "--dry-run",
    )
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert note in result.output


def test_asking_for_what_is_taken_anyway_is_no_other_configuration(ddpm_directory):
    asked = {"model": ddpm_directory, "groups": ("lfw",), "timesteps": (60,)}
    one, two = (
        Opened(SweepConfig(**asked, **numbers), Execution()).plan
        for numbers in ({}, {"items": 20, "reference_items": 60})
    )
    assert one == two


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"items": True}, "items: got True, expected a whole number"),
        ({"confirm_items": 2.0}, "confirm_items: got 2.0, expected a whole number"),
        ({"heads_per_group": "5"}, "heads_per_group: got '5', expected a whole number"),
        ({"groups": "lfw"}, "groups: got 'lfw', expected a list"),
        ({"dtype": None}, "dtype: got None, expected some text in quotes"),
    ],
)
def test_a_study_takes_what_is_written(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        StudyConfig(**fields)


@pytest.mark.parametrize("name", ["items", "discover_items", "confirm_items"])
def test_a_study_counts_before_its_first_stage(name):
    with pytest.raises(ValueError, match=f"{name}: got 21 of each split, expected at most the groups' 20"):
        StudyConfig(**{name: 21})
