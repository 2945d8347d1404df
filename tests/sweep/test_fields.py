"""What a configuration may be given, from Python and from TOML: nothing becomes what was not written."""

import math
import re

import numpy as np
import polars as pl
import pytest

from headscope.sweep import HeadSet, SweepConfig

WHOLE = ("items", "bands", "reference_items", "generate_steps", "cotangents", "seed")
FLAGS = ("observe", "attribute", "channels_last", "compile", "graphs")
TEXTS = ("model", "prompts", "device", "dtype", "autocast")
LISTS = (
    *("groups", "splits", "timesteps", "fills", "scores", "heads", "sites", "sets", "image_scores", "kinds"),
    "features",
)


def refused(message: str, **fields) -> None:
    """By both ways in."""
    fields = {"groups": ("faces",), **fields}
    for make in (SweepConfig.from_dict, lambda values: SweepConfig(**values)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
            make(fields)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["True", "False", "2.0", "'2'", "math.nan", "math.inf", "[1]", "{}", "np.True_"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name, value):
    given = eval(value)
    shown = given.item() if isinstance(given, np.generic) else given
    refused(f"{name}: got {shown!r}, expected a whole number", **{name: given})


@pytest.mark.parametrize("value", [1, 0, 1.0, "true", "yes", "", [], [True]])
@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, value):
    refused(f"{name}: got {value!r}, expected true or false", **{name: value})


@pytest.mark.parametrize("value", [True, 1, 1.0, [], ["cpu"], {}, b"cpu"])
@pytest.mark.parametrize("name", TEXTS)
def test_texts(name, value):
    refused(f"{name}: got {value!r}, expected some text in quotes", **{name: value})


@pytest.mark.parametrize("value", [True, 3, 1.5, "loss", b"loss", {"loss": 1}, {"loss"}, frozenset({"loss"})])
@pytest.mark.parametrize("name", LISTS)
def test_lists(name, value):
    """A set has no order, and a text's characters aren't its parts."""
    refused(f"{name}: got {value!r}, expected a list", **{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": ["faces", 3]}, "groups.1: got 3, expected some text in quotes"),
        ({"timesteps": [1, True]}, "timesteps.1: got True, expected a whole number"),
        ({"timesteps": [[1]]}, "timesteps.0: got [1], expected a whole number"),
        ({"heads": [["mid", True]]}, "heads.0.1: got True, expected a whole number"),
        ({"heads": [["mid", 0.0]]}, "heads.0.1: got 0.0, expected a whole number"),
        ({"heads": [[0, "mid"]]}, "heads.0.0: got 0, expected some text in quotes"),
        ({"heads": [["mid", 0, 1]]}, "heads.0: got ['mid', 0, 1], expected a list of 2"),
        ({"heads": ["mid", 0]}, "heads.0: got 'mid', expected a list"),
        ({"generate_window": [1]}, "generate_window: got [1], expected a list of 2"),
        ({"sets": ["middle"]}, "sets.0: got 'middle', expected a table"),
        ({"sets": [{"sites": ["*"]}]}, "sets.0.name: got none, expected some text in quotes"),
        ({"sets": [{"name": 1, "sites": ["*"]}]}, "sets.0.name: got 1, expected some text in quotes"),
        ({"sets": [{"name": "a", "sites": "*"}]}, "sets.0.sites: got '*', expected a list"),
        ({"sets": [{"name": "a", "sites": ["*"], "keep": True}]}, "sets.0.keep: got True, expected a number"),
        ({"sets": [{"name": "a", "sites": ["*"], "keep": "0.5"}]}, "sets.0.keep: got '0.5', expected a number"),
        ({"sets": [{"name": "a", "sites": ["*"], "key_bias": [[1]]}]}, "sets.0.key_bias.0: got [1], expected a number"),
        ({"sets": [{"name": "a", "sites": ["*"], "temperature": 10**400}]}, "sets.0.temperature: got 1000"),
        ({"device": "c\0u"}, "device: got 'c\\x00u', which holds a zero byte"),
        ({"device": "c\udcfeu"}, "device: got b'c\\xfeu', whose name isn't UTF-8"),
        ({"groups": ["m=a\0b"]}, "groups.0: got 'm=a\\x00b', which holds a zero byte"),
    ],
)
def test_parts_are_named(fields, message):
    refused(message, **fields)


@pytest.mark.parametrize("values", [[], "faces", 3, None, [["groups", ["faces"]]]])
def test_what_is_no_table(values):
    with pytest.raises(ValueError, match=r"plan: got .*, expected a table"):
        SweepConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("items = true", "items: got True, expected a whole number"),
        ("items = 2.0", r"items: got 2\.0, expected a whole number"),
        ("items = nan", "items: got nan, expected a whole number"),
        ("observe = 1", "observe: got 1, expected true or false"),
        ("seed = '3'", "seed: got '3', expected a whole number"),
        ("timesteps = 2026-11-29", r"timesteps: got datetime\.date\(.*\), expected a list"),
        ("heads = [{site = 'mid', head = 0}]", r"heads\.0: got \{.*\}, expected a list"),
        ("[sets]\nname = 'a'\nsites = ['*']", r"sets: got \{.*\}, expected a list"),
        ("[items]\nfaces = 3", r"items: got \{'faces': 3\}, expected a whole number"),
    ],
)
def test_a_file_says_what_is_meant(text, message, tmp_path):
    (tmp_path / "plan.toml").write_text(f"groups = ['faces']\n{text}")
    with pytest.raises(ValueError, match=rf"plan\.toml: {message}"):
        SweepConfig.from_toml(tmp_path / "plan.toml")


def test_a_plan_is_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.toml"):
        with pytest.raises(ValueError, match=r"plan: got .*, expected a TOML file"):
            SweepConfig.from_toml(path)


def test_numbers_of_other_libraries_are_numbers():
    """Without becoming others: what is whole stays whole."""
    heads = pl.DataFrame({"site": ["mid"], "head": np.array([3], np.int16)})
    config = SweepConfig.from_dict(
        {
            "groups": np.array(["faces"]),
            "items": np.int64(3),
            "timesteps": np.array([60, 500]),
            "heads": heads.rows(),
            "observe": np.False_,
            "sets": [{"name": "a", "heads": [("mid", np.int8(1))], "keep": 1, "key_bias": np.float32([-np.inf, 0.5])}],
        }
    )
    assert config == SweepConfig(
        groups=("faces",),
        items=3,
        timesteps=(60, 500),
        heads=(("mid", 3),),
        observe=False,
        sets=(HeadSet("a", heads=(("mid", 1),), keep=1.0, key_bias=(-math.inf, 0.5)),),
    )
    assert type(config.items) is int
    assert type(config.sets[0].keep) is float


def test_a_manifest_of_other_fields_is_refused():
    whole = SweepConfig(groups=("faces",)).as_dict()
    assert SweepConfig.from_json(whole) == SweepConfig(groups=("faces",))
    for values in ([], None, {**whole, "itemz": 3}, {name: whole[name] for name in whole if name != "fills"}):
        with pytest.raises(ValueError, match=r"^run: its manifest holds no configuration .*(list|None|itemz|fills)"):
            SweepConfig.from_json(values)


def test_a_path_is_a_text(tmp_path):
    path = tmp_path / "prompts.txt"
    for make in (SweepConfig.from_dict, lambda values: SweepConfig(**values)):
        assert make({"prompts": path, "fills": (), "scores": ()}).prompts == str(path)
