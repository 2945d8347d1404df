"""The table of measured configurations: how it is made and read, and which calls follow it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope_kernels.attention import choices
from headscope_kernels.attention.choices import Choice, packaged, read, triton_version, write
from headscope_kernels.attention.configuration import ForwardConfiguration
from headscope_kernels.attention.forward.candidates import candidates
from headscope_kernels.attention.forward.configs import forward_configuration
from headscope_kernels.attention.hopper.schedules import HOPPER, LIGHT, unserved

HALF = torch.float16
SMALL = ForwardConfiguration(128, 64, num_warps=4, descriptors=True)
SPECIALISED = ForwardConfiguration(128, 128, num_warps=4, descriptors=True, schedule="specialised")


def choice(configuration: ForwardConfiguration = SMALL, **changes: Any) -> Choice:
    """One for 64 channels and 4096 tokens."""
    values = {
        "target": HOPPER,
        "triton": triton_version(),
        "dtype": "float16",
        "dim": 64,
        "queries": 4096,
        "keys": 4096,
        "name": "128x64, 4 warps",
        "milliseconds": 0.5,
        "default_milliseconds": 0.6,
    }
    return Choice(configuration=configuration, **{**values, **changes})


def row(configuration: ForwardConfiguration = SMALL, sound: bool = True, **changes: Any) -> dict[str, Any]:
    """As a benchmark writes it: what came out of JSON."""
    return {**json.loads(json.dumps(dataclasses.asdict(choice(configuration, **changes)))), "sound": sound}


def chosen(*table: Choice, dtype=HALF, dim=64, dim_v=64, queries=4096, keys=4096, target=HOPPER, **options: Any):
    options = {"features": frozenset({"entropy", "gate"}), **options}
    return forward_configuration(dtype, dim, dim_v, queries, keys, target, choices=table, **options)


RULE = chosen()


def test_an_entry_decides():
    assert chosen(choice()) == SMALL
    assert chosen(choice(SPECIALISED)) == SPECIALISED
    assert RULE not in (SMALL, SPECIALISED)
    # both types of 16 bits are alike
    assert chosen(choice(), dtype=torch.bfloat16) == SMALL


@pytest.mark.parametrize(
    "call",
    [
        {"dtype": torch.float32},
        {"dim": 80, "dim_v": 80},
        {"dim_v": 32},
        {"target": ("cuda", 100)},
        {"target": ("hip", 942)},
        {"target": None},
        {"keys": 2047},
        {"keys": 8193},
        {"queries": 2047},
        {"queries": 8193},
        {"masked": True},
        {"accumulated": 16},
        {"features": frozenset({"is_causal"})},
        {"features": frozenset({"entropy", "another statistic"})},
        {"features": frozenset({"unaligned key"})},
        {"features": None},
    ],
)
def test_other_calls_follow_the_rule(call: dict[str, Any]):
    assert chosen(choice(), **call) == chosen(**call) != SMALL


def test_another_version_of_triton_is_ignored():
    major, minor = triton_version().split(".")
    assert chosen(choice(triton=f"{major}.{int(minor) + 1}")) == RULE
    assert chosen(choice(triton=f"{major}.{minor}1")) == RULE


def test_the_nearest_lengths_decide():
    large = dataclasses.replace(SMALL, num_stages=3)
    table = (choice(large, keys=8192, queries=8192), choice())
    assert chosen(*table, queries=5000, keys=5000) == SMALL
    assert chosen(*table, queries=6000, keys=6000) == large
    # its own type, rather than its like
    own = dataclasses.replace(SMALL, num_stages=1)
    assert chosen(*table, choice(own, dtype="bfloat16")) == SMALL
    assert chosen(*table, choice(own, dtype="bfloat16"), dtype=torch.bfloat16) == own


def test_what_an_entry_cant_serve_goes_to_the_next_one():
    """5000 is no multiple of 128: the specialised schedule has no code for the rest."""
    assert chosen(choice(SPECIALISED), keys=5000) == RULE
    assert chosen(choice(SPECIALISED), choice(milliseconds=0.55), keys=5000) == SMALL


def test_no_tile_is_larger_than_the_call():
    assert chosen(choice(queries=64, keys=64), queries=40, keys=40).block_queries == 64


def test_a_table_round_trip(tmp_path: Path):
    path = tmp_path / "choices.json"
    split = ForwardConfiguration(128, 64, 4, 2, (32, 16), (32, 16), descriptors=True)
    entries = write(path, [row(), row(split, dim=40)])
    assert read(path) == entries == (choice(), choice(split, dim=40))
    assert os.listdir(tmp_path) == ["choices.json"]


def test_what_becomes_an_entry(tmp_path: Path):
    """Of each problem the fastest sound row, if it beats the rule's choice by more than 2 %."""
    path = tmp_path / "choices.json"
    rows = [
        row(milliseconds=0.55),
        row(SPECIALISED, milliseconds=0.5),
        row(milliseconds=0.1, sound=False),
        # what couldn't run has no times
        {**row(sound=False), "milliseconds": None, "default_milliseconds": None},
        row(dim=80, milliseconds=0.59, default_milliseconds=0.6),
        row(dim=128, milliseconds=0.7, default_milliseconds=0.6),
    ]
    assert [entry.configuration for entry in write(path, rows)] == [SPECIALISED]
    assert write(path, []) == read(path) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sound": None}, "row 0: sound is None, expected true or false"),
        ({"milliseconds": None}, "row 0: milliseconds is None, expected a positive number"),
        ({"dtype": "float32"}, "row 0: dtype is 'float32', expected one of"),
        ({"more": 1}, "row 0: expected the fields"),
    ],
)
def test_malformed_rows(tmp_path: Path, change: dict[str, Any], message: str):
    path = tmp_path / "choices.json"
    write(path, [row()])
    with pytest.raises(ValueError, match=message):
        write(path, [{**row(), **change}])
    # what was there before still is
    assert read(path) == (choice(),)


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    path = tmp_path / "choices.json"
    write(path, [row()])

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write(path, [])
    assert read(path) == (choice(),)
    assert os.listdir(tmp_path) == ["choices.json"]


def entry(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in row(**changes).items() if name != "sound"}


def configured(**changes: Any) -> dict[str, Any]:
    own = entry()
    return {**own, "configuration": {**own["configuration"], **changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON, got"),
        ([], r"expected the fields \['entries', 'format'\], got list"),
        ({"format": 2, "entries": []}, "format is 2, expected 1"),
        ({"format": True, "entries": []}, "format is True, expected 1"),
        ({"format": 1, "entries": {}}, "entries is {}, expected a list"),
        ([entry(), 3], r"entry 1: expected the fields \[.*\], got int"),
        ([{"dim": 64}], r"entry 0: expected the fields \[.*\], got \['dim'\]"),
        ([{**entry(), "code": "x"}], r"entry 0: expected the fields .*, got \['code', "),
        ([{**entry(), "target": ["cuda", "90"]}], r"entry 0: target is \['cuda', '90'\], expected a backend and"),
        ([{**entry(), "triton": 3.6}], "entry 0: triton is 3.6, expected a version such as '3.6'"),
        ([{**entry(), "triton": "3.6.0"}], "entry 0: triton is '3.6.0', expected a version such as '3.6'"),
        ([{**entry(), "dtype": "float32"}], "entry 0: dtype is 'float32', expected one of"),
        ([{**entry(), "dim": 0}], "entry 0: dim is 0, expected an integer from 1 to 512"),
        ([{**entry(), "keys": 4096.0}], "entry 0: keys is 4096.0, expected an integer from 1"),
        ([{**entry(), "queries": True}], "entry 0: queries is True, expected an integer from 1"),
        ([{**entry(), "name": ""}], "entry 0: name is '', expected a candidate's name"),
        ([{**entry(), "milliseconds": -1}], "entry 0: milliseconds is -1, expected a positive number"),
        ([{**entry(), "milliseconds": float("nan")}], "entry 0: milliseconds is nan, expected a positive number"),
        ([{**entry(), "milliseconds": 0.6}], "entry 0: milliseconds is 0.6, expected less than default_milliseconds"),
        ([{**entry(), "configuration": "SMALL"}], "entry 0: configuration is 'SMALL', expected a ForwardConfig"),
        ([configured(extra=1)], "entry 0: configuration: expected the fields"),
        ([configured(block_queries=100)], "configuration: block_queries is 100, expected a multiple of 16"),
        ([configured(block_queries=192)], "configuration: block_queries is 192, expected a power of two"),
        ([configured(block_keys=96)], "configuration: block_keys is 96, expected a power of two from 16 to 256"),
        ([configured(num_warps=3)], "configuration: num_warps is 3, expected a power of two from 1 to 16"),
        ([configured(num_stages=0)], "configuration: num_stages is 0, expected an integer from 1 to 8"),
        ([configured(dim_widths=[48])], r"configuration: dim_widths is \[48\], expected null or a list of powers"),
        ([configured(value_widths=[32])], r"configuration: value_widths is \[32\], expected to hold 64 channels"),
        ([configured(descriptors=1)], "configuration: descriptors is 1, expected true or false"),
        ([configured(schedule="eval")], "configuration: schedule is 'eval', expected one of"),
        ([entry(), entry()], "entry 1: expected another problem than entry 0's"),
    ],
)
def test_malformed_tables(tmp_path: Path, content: Any, message: str):
    path = tmp_path / "table.json"
    if isinstance(content, list) and content:
        content = {"format": 1, "entries": content}
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"table\.json: .*{message}"):
        read(path)


@pytest.fixture
def in_the_package(tmp_path: Path, monkeypatch):
    """The package's table is another file, which isn't there yet."""
    path = tmp_path / "choices.json"
    monkeypatch.setattr(choices, "PATH", path)

    def forget() -> None:
        packaged.cache_clear()
        forward_configuration.cache_clear()

    forget()
    yield path
    monkeypatch.undo()
    forget()


def test_the_packages_table(in_the_package: Path):
    call = (HALF, 64, 64, 4096, 4096, HOPPER)
    assert packaged() == ()
    assert forward_configuration(*call, features=frozenset()) == RULE
    write(in_the_package, [row()])
    # it is read once
    assert packaged() == ()
    packaged.cache_clear()
    forward_configuration.cache_clear()
    assert forward_configuration(*call, features=frozenset()) == SMALL
    assert forward_configuration(*call, features=frozenset(), choices=()) == RULE


def test_a_malformed_packages_table_is_an_error(in_the_package: Path):
    in_the_package.write_text('{"format": 1}')
    with pytest.raises(
        ValueError, match=r"choices.json: expected the fields \['entries', 'format'\], got \['format'\]"
    ):
        forward_configuration(HALF, 64, 64, 4096, 4096, HOPPER, features=frozenset())


def test_the_table_that_is_packaged_is_sound():
    assert all(choice.default_milliseconds > choice.milliseconds for choice in packaged())


def test_the_rules_know_every_field():
    assert set(choices._ENTRY) == {field.name for field in dataclasses.fields(Choice)}
    assert set(choices._CONFIGURATION) == {field.name for field in dataclasses.fields(ForwardConfiguration)}


FEATURES = [
    *sorted(LIGHT),
    "mask",
    "is_causal",
    "key_bias",
    "key_scale",
    "scale <= 0",
    "another statistic",
    "no output",
]
FEATURES += [f"unaligned {name}" for name in ("query", "key", "value")]
# few, so that tables have entries for the call
DIMS = st.sampled_from([64, 160])
LENGTHS = st.sampled_from([100, 128])
DTYPES = st.sampled_from([HALF, torch.bfloat16, torch.float32])
TARGETS = st.sampled_from([HOPPER, HOPPER, ("cuda", 80), None])
CONFIGURATIONS = st.builds(
    ForwardConfiguration,
    block_queries=st.sampled_from([128, 64]),
    block_keys=st.sampled_from([128, 64]),
    num_warps=st.sampled_from([4, 8]),
    dim_widths=st.sampled_from([None, (32, 16, 16)]),
    descriptors=st.sampled_from([True, False]),
    schedule=st.sampled_from(["specialised", "overlapped", "pingpong", "plain"]),
)
TABLES = st.lists(
    st.builds(choice, CONFIGURATIONS, target=TARGETS.filter(bool), dim=DIMS, queries=LENGTHS, keys=LENGTHS),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300)
@given(TABLES, DTYPES, DIMS, DIMS, LENGTHS, LENGTHS, TARGETS, st.sets(st.sampled_from(FEATURES), max_size=2))
def test_no_table_gives_a_call_what_cant_serve_it(table, dtype, dim, dim_v, queries, keys, target, asked):
    """Whatever the table says: a schedule serves the call, and what the table wasn't measured for follows the rule."""
    features = frozenset(asked)
    call = (dtype, dim, dim_v, queries, keys, target)
    masked = "mask" in features
    result = forward_configuration(*call, masked=masked, features=features, choices=tuple(table))
    rule = forward_configuration(*call, masked=masked, features=features, choices=())
    assert unserved(result, dtype, dim, dim_v, keys, target, features) is None
    if not features <= LIGHT or dtype == torch.float32 or dim != dim_v:
        assert result == rule
    if result != rule:
        entries = [entry for entry in table if (entry.dim, entry.target) == (dim, target)]
        assert any(max(entry.keys, keys) <= 2 * min(entry.keys, keys) for entry in entries)


PLAIN = ["descriptors", "128x64, 4 warps"]


@pytest.mark.parametrize(
    ("dim", "keys", "expected"),
    [
        (
            40,
            4096,
            [
                *PLAIN,
                "specialised",
                "overlapped",
                "overlapped, deep",
                "overlapped, padded",
                "ping-pong",
                "ping-pong, three",
            ],
        ),
        (64, 4096, [*PLAIN, "specialised", "overlapped", "overlapped, deep", "ping-pong", "ping-pong, three"]),
        # the rule's own has descriptors from 65 channels on
        (80, 1024, [PLAIN[1], "specialised", "overlapped", "overlapped, deep", "overlapped, padded", "ping-pong"]),
        (128, 4608, ["specialised", "overlapped", "overlapped, deep", "ping-pong"]),
        (64, 1000, [*PLAIN, "overlapped", "overlapped, deep", "ping-pong", "ping-pong, three"]),
        (64, 77, [*PLAIN, "overlapped", "overlapped, deep", "ping-pong", "ping-pong, three"]),
        (160, 256, ["overlapped", "ping-pong"]),
        (256, 256, []),
    ],
)
def test_candidates(dim: int, keys: int, expected: list[str]):
    found = candidates(HALF, dim, dim, 4096, keys, HOPPER)
    assert list(found) == expected
    assert all(unserved(configuration, HALF, dim, dim, keys, HOPPER) is None for configuration in found.values())


@pytest.mark.parametrize(
    ("dtype", "target"), [(torch.float32, HOPPER), (HALF, ("cuda", 100)), (HALF, ("cuda", 80)), (HALF, None)]
)
def test_no_candidates_elsewhere(dtype: torch.dtype, target: tuple[str, int] | None):
    assert candidates(dtype, 64, 64, 4096, 4096, target) == {}
