"""mpq sensitivity on a tiny experiment: resuming, shards, refusals; weights of the LM untouched."""

from __future__ import annotations

import json
import shutil

import pytest

from espnet_mpq.bin.mpq import main
from espnet_mpq.sensitivity.kl import KlMeter

CLUSTERS = ["embedding", *(f"rnn.l{k}.{g}" for k in (0, 1) for g in "ifgo"), "output"]


def options(exp, text, output, *more):
    words = ["sensitivity", "--lm_exp", exp.path, "--text", text, "--output", output]
    return [str(w) for w in words + ["--max_tokens", 400, *more]]


@pytest.fixture(scope="module")
def whole(fp_exp, text_file, tmp_path_factory):
    """A complete table; (path, its content)."""
    path = tmp_path_factory.mktemp("sens") / "s.json"
    assert main(options(fp_exp, text_file, path)) == 0
    return path, json.loads(path.read_text())


def test_table_is_complete_and_describes_itself(whole, fp_exp):
    _, value = whole
    assert list(value["entries"]) == CLUSTERS
    for row in value["entries"].values():
        assert list(row) == ["1", "2", "4", "8"]
        harms = [row[b]["harm"] for b in row]
        assert harms[0] > harms[2] > harms[3] > 0
        assert all(e["stderr"] > 0 and 0 < e["relative_mse"] < 1 for e in row.values())
    record = value["provenance"]
    assert record["clusters"] == CLUSTERS and record["bits"] == [1, 2, 4, 8]
    assert 300 < record["n_tokens"] <= 400 and record["seed"] == 0
    assert record["command_line"].startswith("mpq sensitivity --lm_exp")
    assert record["options"]["max_tokens"] == 400


def test_interrupted_run_goes_on_and_ends_the_same(whole, fp_exp, text_file, tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    measure = KlMeter.entry
    done = []

    def entry(self, name, spec, *rest):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(name)
        return measure(self, name, spec, *rest)

    monkeypatch.setattr(KlMeter, "entry", entry)
    assert main(options(fp_exp, text_file, path)) == 130
    partial = json.loads(path.read_text())
    assert sum(map(len, partial["entries"].values())) == 7
    done.clear()
    monkeypatch.setattr(
        KlMeter, "entry", lambda *a: done.append(a[1]) or measure(*a)
    )
    assert main(options(fp_exp, text_file, path)) == 0
    assert len(done) == 33
    assert json.loads(path.read_text())["entries"] == whole[1]["entries"]


def test_shards_merge_to_the_same_table(whole, fp_exp, text_file, tmp_path, capsys):
    path = tmp_path / "s.json"
    for job in (1, 2, 3):
        assert main(options(fp_exp, text_file, path, "--job", job, "--n_jobs", 3)) == 0
    assert not path.exists()
    assert main(["sensitivity", "--output", str(path), "--merge", "3"]) == 0
    assert json.loads(path.read_text())["entries"] == whole[1]["entries"]
    assert "40 entries" in capsys.readouterr().out


def test_another_measurement_is_refused(whole, fp_exp, text_file, tmp_path, capsys):
    path = tmp_path / "s.json"
    shutil.copy(whole[0], path)
    before = path.read_bytes()
    for change, names in (
        (["--seed", 1], ["seed 0 in ", ", 1 in this run"]),
        (["--grid", "paper"], ["'uniform' in ", ", 'paper' in this run"]),
        (["--tying", "cluster"], ["'row' in ", ", 'cluster' in this run"]),
        (["--max_tokens", 500], ["max_tokens 400 in ", ", 500 in this run"]),
        (["--printed_form"], ["'kl' in ", ", 'kl_printed' in this run"]),
    ):
        assert main(options(fp_exp, text_file, path, *change)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("mpq sensitivity: error:")
        assert all(name in error for name in names), error
    assert path.read_bytes() == before


def test_config_file_and_printed_form(fp_exp, text_file, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"lm_exp: {fp_exp.path}\ntext: {text_file}\nbits: [1]\nprinted_form: true\n")
    path = tmp_path / "s.json"
    words = ["sensitivity", "--config", str(config), "--output", str(path), "--bits", "8"]
    assert main(words) == 0
    value = json.loads(path.read_text())
    assert value["method"] == "kl_printed"
    assert [list(row) for row in value["entries"].values()] == [["8"]] * 10
