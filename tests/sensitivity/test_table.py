"""Sensitivity tables: files, resuming only what was measured alike, shards and merging."""

from __future__ import annotations

import hashlib
import json
import math

import pytest

from espnet_mpq.errors import FormatError, InputError, MismatchError
from espnet_mpq.sensitivity.table import (
    IDENTITY,
    Entry,
    SensitivityTable,
    merge,
    open_table,
    select_shard,
    shard_path,
)


def record(**changes):
    values = {key: hashlib.sha256(key.encode()).hexdigest() for key in IDENTITY}
    values.update(text_format="plain", max_tokens=1000, seed=7, grid="uniform", tying="group")
    values.update(group_size=16, scale_dtype="float16", probe="gaussian", trace="average")
    values.update(max_seconds=2.5, unit="nats/token", rounding="nearest", rounding_tokens=200)
    return {**values, "clusters": ["x", "y"], "bits": [1, 2], **changes}


def test_round_trip_keeps_values_and_nan(tmp_path):
    table = SensitivityTable(record(), "kl_printed")
    table.add("y", 2, Entry(-1e-9, math.nan, 0.25))
    table.add("x", 1, Entry(0.5, 0.125, 0.0))
    table.write(tmp_path / "t.json")
    value = json.loads((tmp_path / "t.json").read_text())
    assert value["format"] == "espnet_mpq.sensitivity" and value["unit"] == "nats/token"
    assert value["entries"]["y"]["2"] == {"harm": -1e-9, "stderr": None, "relative_mse": 0.25}
    again = SensitivityTable.read(tmp_path / "t.json")
    assert again.method == "kl_printed" and again.provenance == table.provenance
    assert again.entries["x"] == {1: Entry(0.5, 0.125, 0.0)}
    assert math.isnan(again.entries["y"][2].stderr)
    assert again.harm() == {"y": {2: -1e-9}, "x": {1: 0.5}}
    assert again.missing(["x", "y"], [1, 2]) == [("x", 2), ("y", 1)]


def test_open_goes_on_with_the_same_measurement(tmp_path):
    path = tmp_path / "t.json"
    table = open_table(path, record(), "kl")
    table.add("x", 1, Entry(1.0, 0.1, 0.2))
    table.write(path)
    again = open_table(path, record(bits=[1, 2, 4], options={"ngpu": 1}), "kl")
    assert again.has("x", 1) and again.provenance["bits"] == [1, 2, 4]


OTHERS = {
    "text_format": ("kaldi", "'plain' in {}, 'kaldi' in this run"),
    "max_tokens": (50, "1000 in {}, 50 in this run"),
    "max_seconds": (1, "2.5 in {}, 1 in this run"),
    "unit": ("nats/frame", "'nats/token' in {}, 'nats/frame' in this run"),
    "seed": (8, "7 in {}, 8 in this run"),
    "grid": ("paper", "'uniform' in {}, 'paper' in this run"),
    "tying": ("row", "'group' in {}, 'row' in this run"),
    "group_size": (None, "16 in {}, none in this run"),
    "scale_dtype": ("float32", "'float16' in {}, 'float32' in this run"),
    "probe": ("rademacher", "'gaussian' in {}, 'rademacher' in this run"),
    "rounding": ("second_order", "'nearest' in {}, 'second_order' in this run"),
    "rounding_tokens": (50, "200 in {}, 50 in this run"),
    "trace": ("plain", "'average' in {}, 'plain' in this run"),
    "clusters": (["x", "z"], "['y'] in {}, ['z'] in this run"),
}


@pytest.mark.parametrize("key", IDENTITY)
def test_open_refuses_another_measurement_and_says_whose_value_is_whose(tmp_path, key):
    path = tmp_path / "t.json"
    SensitivityTable(record(), "kl").write(path)
    before = path.read_bytes()
    hashes = f"{str(record()[key])[:12]} in {{}}, ffffffffffff in this run"
    other, words = OTHERS.get(key, ("f" * 64, hashes))
    with pytest.raises(MismatchError) as error:
        open_table(path, record(**{key: other}), "kl")
    assert f"found {key} {words.format(path)}; " in str(error.value)
    if key == "checkpoint_sha256":
        assert "made from another checkpoint" in str(error.value)
    assert path.read_bytes() == before


def test_open_refuses_another_method(tmp_path):
    SensitivityTable(record(), "kl").write(tmp_path / "t.json")
    with pytest.raises(MismatchError, match="kl_printed"):
        open_table(tmp_path / "t.json", record(), "kl_printed")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "espnet_mpq.plan"},
        {"version": 2},
        {"method": "magic"},
        {"entries": {"x": {"one": {}}}},
        {"entries": {"x": {"1": {"harm": 1.0}}}},
        {"entries": {"x": {"1": {"harm": None, "stderr": 0, "relative_mse": 0}}}},
        {"entries": 3},
        {"entries": {"x": {"1": {"harm": -1e-5, "stderr": 0, "relative_mse": 0}}}},
        {"entries": {"x": {"1": {"harm": 10**290, "stderr": 0, "relative_mse": 0}}}},
        {"method": ["kl"]},
        {"provenance": "none"},
        {"provenance": ["a", "b"]},
        {"provenance": record(inputs="text.txt")},
        {"provenance": record(inputs={"text": "text.txt"})},
        {"provenance": record(inputs={"text": {"path": 3, "sha256": "0"}})},
        {"provenance": record(max_tokens="zzz")},
        {"provenance": record(max_tokens=-1)},
        {"provenance": record(seed=1.5)},
        {"provenance": record(seed=True)},
        {"provenance": record(grid=["uniform"])},
        {"provenance": record(tying="rows")},
        {"provenance": record(probe="signs")},
        {"provenance": record(trace=1)},
        {"provenance": record(scale_dtype=16)},
        {"provenance": record(group_size="x")},
        {"provenance": record(text_format=3)},
        {"provenance": record(checkpoint_sha256={})},
        {"provenance": record(clusters="xy")},
        {"provenance": record(bits=["1"])},
    ],
)
def test_malformed_files_are_refused(tmp_path, change):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**SensitivityTable(record()).to_dict(), **change}))
    with pytest.raises(FormatError, match="t.json"):
        SensitivityTable.read(path)


GOOD = {"harm": 1.0, "stderr": None, "relative_mse": 0.5}


@pytest.mark.parametrize(
    "entries, found, expected",
    [
        ([], "value of entries: found []", "cluster -> bits -> {harm, stderr, relative_mse}"),
        (None, "value of entries: found None", "an object"),
        ({"x": "1"}, "row x: found '1'", "an object: bits -> "),
        ({"x": {"one": GOOD}}, "row x: bits: found 'one'", "one of 1, 2, 3, 4, 8, 16, 32"),
        ({"x": {"5": GOOD}}, "row x: bits: found '5'", "one of 1, 2, 3, 4, 8, 16, 32"),
        ({"x": {"04": GOOD}}, "row x: bits: found '04'", "one of 1, 2, 3, 4, 8, 16, 32"),
        ({"x": {"1": [0.5]}}, "entry x at 1 bits: found [0.5]", "{harm, stderr, relative_mse}"),
        ({"x": {"1": {**GOOD, "kl": 1}}}, "entry x at 1 bits: found {'harm'", "{harm, stderr"),
        ({"x": {"1": {**GOOD, "harm": "a"}}}, "x at 1 bits: harm: found 'a'", "a number that is n"),
        ({"x": {"1": {**GOOD, "harm": True}}}, "harm: found True", "a number"),
        ({"x": {"1": {**GOOD, "harm": -0.5}}}, "harm: found -0.5", "not negative (method kl)"),
        ({"x": {"1": {**GOOD, "stderr": -1}}}, "stderr: found -1", "at least 0, or null"),
        ({"x": {"1": {**GOOD, "relative_mse": None}}}, "relative_mse: found None", "at least 0"),
    ],
)
def test_malformed_entries_are_told_in_words_of_the_file(entries, found, expected):
    value = {**SensitivityTable(record()).to_dict(), "entries": entries}
    with pytest.raises(FormatError) as error:
        SensitivityTable.from_dict(value, "t.json")
    message = str(error.value)
    assert message.startswith("t.json has a malformed ") and found in message, message
    assert expected in message.split("; expected ")[1]
    assert message.endswith("make it again with `mpq sensitivity` or `mpq nas`")
    value["entries"] = {"x": {"1": GOOD}}
    assert SensitivityTable.from_dict(value).harm() == {"x": {1: 1.0}}


def test_entries_of_a_cluster_that_the_table_does_not_name_are_refused():
    value = SensitivityTable(record(clusters=["rnn.l0.i", "output"])).to_dict()
    value["entries"] = {"rnn.l0.i": {"1": GOOD}, "outptu": {"1": GOOD}}
    with pytest.raises(FormatError, match="t.json: unknown cluster: found 'outptu'; did you mean"):
        SensitivityTable.from_dict(value, "t.json")
    for clusters in ([], None):  # not recorded
        value["provenance"]["clusters"] = clusters
        assert len(SensitivityTable.from_dict(value).entries) == 2


def test_rounding_below_zero_and_the_printed_form_are_fine(tmp_path):
    for method, harm in (("kl", -1e-7), ("kl_printed", -0.5)):
        table = SensitivityTable(record(), method)
        table.add("x", 1, Entry(harm, 0.0, 0.0))
        assert SensitivityTable.from_dict(table.to_dict()).harm() == {"x": {1: harm}}
    assert SensitivityTable.from_dict(SensitivityTable({}).to_dict()).provenance == {}


def test_shards_cover_everything_once():
    pairs = [(c, b) for c in "abcde" for b in (1, 2, 4)]
    shards = [select_shard(pairs, job, 4) for job in (1, 2, 3, 4)]
    assert sorted(sum(shards, [])) == sorted(pairs)
    assert select_shard(pairs, None, None) == pairs
    for job, n_jobs in ((0, 4), (5, 4), (1, None), (None, 3)):
        with pytest.raises(InputError, match="n_jobs"):
            select_shard(pairs, job, n_jobs)


def test_merge_gathers_shards_and_names_what_is_missing(tmp_path):
    path = tmp_path / "sens.v1.json"
    assert shard_path(path, 2).name == "sens.v1.2.json"
    pairs = [("x", 1), ("x", 2), ("y", 1), ("y", 2)]
    for job in (1, 2):
        table = SensitivityTable(record())
        for name, bits in select_shard(pairs, job, 2):
            table.add(name, bits, Entry(bits + (name == "y") / 2, 0.0, 0.0))
        table.write(shard_path(path, job))
    merged = merge(path, 2)
    assert merged.harm() == {"x": {1: 1.0, 2: 2.0}, "y": {1: 1.5, 2: 2.5}}
    with pytest.raises(InputError, match="sens.v1.3.json"):
        merge(path, 3)
    with pytest.raises(InputError, match="x at 2 bits"):
        merge(path, 1)
    SensitivityTable(record(seed=9)).write(shard_path(path, 2))
    with pytest.raises(MismatchError, match="seed"):
        merge(path, 2)


def test_units_are_those_of_the_record(tmp_path):
    """A table of a recogniser is in nats/frame, and no other unit can be written into it."""
    table = SensitivityTable(record(unit="nats/frame"), "kl")
    table.write(tmp_path / "t.json")
    assert SensitivityTable.read(tmp_path / "t.json").unit == "nats/frame"
    value = json.loads((tmp_path / "t.json").read_text())
    with pytest.raises(FormatError, match="malformed unit: found 'nats/token'"):
        SensitivityTable.from_dict({**value, "unit": "nats/token"}, "t.json")
    with pytest.raises(FormatError, match="malformed unit: found 'bits'"):
        SensitivityTable.from_dict({**value, "provenance": record(unit="bits")}, "t.json")
