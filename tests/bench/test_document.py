"""RESULTS.md: rows of several runs stand together and none is lost."""

from __future__ import annotations

import json

import pytest
from bench import document
from bench.results import Results
from bench.timing import same_machine

SEARCH = {"layers": 2, "units": 8, "vocab": 20}
SYSTEMS = {"no LM": {"step_s": 0.07, "lm_s": 0.0, "share": 0.0}}


def row(**more) -> dict:
    return {**SEARCH, "systems": SYSTEMS, **more}


@pytest.fixture
def data(tmp_path):
    results = Results(tmp_path / "results.json")
    results.note("On a train.")
    results.put("search", "2x8", row())
    results.put("search", "4x8", row(layers=4))
    return results.data


def test_every_group_of_rows_says_when(data):
    text = document.render(data)
    assert text.count("Measured ") == 1 and "On a train." in text
    other = {**data["search"]["4x8"], "date": "2001-02-03", "revision": "abc", "notes": []}
    data["search"]["4x8"] = other
    last = document.render(data).splitlines()[-2:]
    assert last[0].startswith("Measured 20") and last[0].endswith(" (2 x 8). On a train.")
    assert last[1] == "Measured 2001-02-03, revision abc (4 x 8)."


def test_a_part_without_the_other_rows_overwrites_nothing(data, tmp_path, capsys):
    file, aside = tmp_path / "R.md", tmp_path / "new" / "R.md"
    assert document.write(data, file, aside) and not aside.exists()
    whole = file.read_text()
    part = {**data, "search": {"2x8": {**row(), "date": "2002-02-02"}}}
    assert not document.write(part, file, aside)
    assert file.read_text() == whole and "2002-02-02" in aside.read_text()
    assert "beam search | 4 x 8 | no LM: 1 of 1 rows" in capsys.readouterr().out
    assert document.write(part, file, aside, replace=True) and "4 x 8" not in file.read_text()
    # More rows, and new times of the same ones, are welcome.
    assert document.write(data, file, aside) and file.read_text() == whole


def test_rows_are_counted_where_numbers_tell_them_apart():
    table = "## A\n| LM | batch |\n| --- | ---: |\n| x | 1 |\n| x | 10 |\n"
    assert document.lost_rows(table, table.replace("| x | 10 |", "| x | 2 |")) == []
    assert document.lost_rows(table, table.replace("| x | 10 |\n", "")) == ["A | x: 1 of 2 rows"]
    assert document.lost_rows(table, table.replace("## A", "## B")) == ["A | x: 2 of 2 rows"]
    assert document.lost_rows("no table\n", "") == []


def test_json_of_another_machine_is_put_aside(data, tmp_path):
    file = tmp_path / "results.json"
    assert set(Results(file).data["search"]) == {"2x8", "4x8"}
    saved = json.loads(file.read_text())
    saved["machine"]["packages"]["onnxruntime"] = "0.1"  # not installed here, or another version
    file.write_text(json.dumps(saved))
    found = Results(file).data
    if "onnxruntime" not in data["machine"]["packages"]:
        assert found["machine"]["packages"]["onnxruntime"] == "0.1" and found["search"]
    saved["machine"]["packages"]["torch"] = "0.1"
    file.write_text(json.dumps(saved))
    assert Results(file).data["search"] == {} and (tmp_path / "results.old.json").is_file()


def test_same_machine():
    one = {"cpu": "a", "kernel": "avx2", "packages": {"torch": "1", "espnet": "2"}}
    assert same_machine(one, {**one, "packages": {"torch": "1", "onnxruntime": "3"}})
    assert not same_machine(one, {**one, "packages": {"torch": "2"}})
    assert not same_machine(one, {**one, "kernel": "scalar"})
    assert not same_machine(one, {})
