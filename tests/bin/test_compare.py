"""mpq compare: numbers in print and JSON, refusals."""

import argparse
import json
import logging

import pytest

from espnet_mpq.bin import compare
from espnet_mpq.errors import InputError


@pytest.fixture
def files(tmp_path):
    """Six utterances of three words; A is wrong in five of them, B in the other one."""
    for name, wrong in (("ref", []), ("a", [0, 1, 2, 4, 5]), ("b", [3])):
        lines = [f"u{i} {'x' if i in wrong else 'one'} two three" for i in range(6)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def run(*options):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    compare.main(parser.parse_args([str(o) for o in options]))


def test_table_and_json(files, capsys):
    out = files / "deep" / "out.json"
    options = ["--ref", files / "ref", "--hyp_a", files / "a", "--hyp_b", files / "b"]
    run(*options, "--names", "fp", "mixed", "--json", out)
    printed = capsys.readouterr().out
    assert "p = 0.046 (two-sided), significant at 0.05 (6 segments, Z = 2.000)" in printed
    assert "few segments" in printed
    assert "WER mixed - fp: -22.22" in printed
    bootstrap = json.loads(out.read_text())["bootstrap"]
    shares = [bootstrap[f"probability_{k}"] for k in ("b_better", "equal", "b_worse")]
    assert sum(shares) == pytest.approx(1) and all(shares)
    words = "mixed better in {:.1f}%, equal in {:.1f}%, worse in {:.1f}% of draws"
    assert words.format(*(100 * share for share in shares)) in printed
    assert "6 utterances, 18 reference words" in printed
    result = json.loads(out.read_text())
    assert result["systems"]["fp"] == {
        "n_ref": 18,
        "n_sub": 5,
        "n_del": 0,
        "n_ins": 0,
        "n_errors": 5,
        "wer_percent": pytest.approx(500 / 18),
    }
    assert result["mapsswe"]["p_value"] == pytest.approx(0.0455003, abs=1e-6)
    assert result["significant"] is True
    assert len(result["provenance"]["inputs"]["hyp_b"]["sha256"]) == 64


def test_characters(files, capsys):
    options = ["--ref", files / "ref", "--hyp_a", files / "a", "--hyp_b", files / "b"]
    run(*options, "--unit", "char")
    printed = capsys.readouterr().out
    assert "CER %" in printed and "78 reference characters" in printed  # 6 * (11 + 2)


def test_a_system_against_itself_is_not_significant(files):
    result = compare.compare(files / "ref", files / "a", files / "a", names=("fp", "packed"))
    assert result["mapsswe"]["p_value"] == 1.0 and result["significant"] is False
    assert result["bootstrap"]["difference_percent"] == 0.0


def test_equal_hypotheses_are_said(files, capsys):
    run("--ref", files / "ref", "--hyp_a", files / "a", "--hyp_b", files / "a")
    printed = capsys.readouterr().out
    assert printed.endswith("the hypotheses are equal\n")
    assert "MAPSSWE" not in printed and "draws" not in printed
    result = compare.compare(files / "ref", files / "a", files / "b")
    assert result["equal_hypotheses"] is False


def test_one_of_a_kind(tmp_path, capsys):
    for name, text in (("ref", "u1 one"), ("a", "u1 two"), ("b", "u1 one")):
        (tmp_path / name).write_text(text)
    options = ["--ref", tmp_path / "ref", "--hyp_a", tmp_path / "a", "--hyp_b", tmp_path / "b"]
    run(*options, "--n_replications", 1)
    printed = capsys.readouterr().out
    assert "1 utterance, 1 reference word\n" in printed
    assert "(1 segment, " in printed and "1 draw)" in printed


def write_set(folder, ref, a, b):
    for name, text in (("ref", ref), ("a", a), ("b", b)):
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in ("ref", "a", "b")]


def rates(*args, **options):
    return [s["wer_percent"] for s in compare.compare(*args, **options)["systems"].values()]


def test_letter_case_as_the_hosts_scoring(tmp_path, capsys):
    files = write_set(tmp_path, "u1 Hello World \u00c4\n", "u1 hello world \u00c4\n", "u1 HELLO\n")
    assert rates(*files) == pytest.approx([0, 200 / 3])
    assert rates(*files, case_sensitive=True) == pytest.approx([200 / 3, 100])
    assert rates(*files, unit="char")[0] == 0.0
    words = ["--ref", files[0], "--hyp_a", files[1], "--hyp_b", files[2]]
    run(*words)
    assert "case of ASCII letters is ignored, as by sclite" in capsys.readouterr().out
    run(*words, "--case_sensitive", "--json", tmp_path / "c.json")
    assert "letter case counts, as for sclite -s" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["scoring"]["case_sensitive"] is True


def test_symbols_are_left_out_when_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("espnet_mpq"), "propagate", True)
    files = write_set(tmp_path, "u1 a <noise> b\n", "u1 a b\n", "u1 a [x] { b\n")
    assert rates(*files) == pytest.approx([100 / 3, 200 / 3])
    assert "<noise> [x]: scored as words" in caplog.text
    assert "alternatives" in caplog.text and "({)" in caplog.text
    (tmp_path / "nlsyms").write_text("<noise>\n[x]\n{\n")
    caplog.clear()
    assert rates(*files, non_linguistic_symbols=tmp_path / "nlsyms") == [0, 0]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_cleaner_of_the_host(host, tmp_path):
    files = write_set(tmp_path, "u1 it's dr. No\n", "u1 IT'S DOCTOR NO\n", "u1 its dr. no\n")
    assert rates(*files)[0] == pytest.approx(100 / 3)
    assert rates(*files, cleaner="tacotron") == pytest.approx([0, 100 / 3])


def test_formats_are_said(tmp_path, capsys):
    files = write_set(tmp_path, "u1 a\nu2 b\n", "a (u1)\n (u2)\n", "u1 a (x)\nu2 b (y)\n")
    run("--ref", files[0], "--hyp_a", files[1], "--hyp_b", files[2], "--json", tmp_path / "c.json")
    assert "files read as ref kaldi, hyp_a trn, hyp_b kaldi" in capsys.readouterr().out
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["text_formats"] == {"ref": "kaldi", "hyp_a": "trn", "hyp_b": "kaldi"}
    assert [s["n_errors"] for s in result["systems"].values()] == [1, 2]
    files = write_set(tmp_path, "a b\nc\n", "a b\n\n", "b a\nc\n")
    words = ["--ref", files[0], "--hyp_a", files[1], "--hyp_b", files[2]]
    run(*words, "--text_format", "plain")
    assert "files read as plain lines" in capsys.readouterr().out
    assert rates(*files, text_format="plain") == pytest.approx([100 / 3, 200 / 3])
    with pytest.raises(InputError, match="not of the same utterances.*--text_format plain"):
        run(*words)


def test_equivalence(files, capsys):
    out = files / "out.json"
    options = ["--ref", files / "ref", "--hyp_a", files / "a", "--hyp_b", files / "b"]
    run(*options, "--margin", 60, "--json", out)
    assert "equivalent within 60 absolute: p < 0.001; b is not" in capsys.readouterr().out
    found = json.loads(out.read_text())["equivalence"]
    assert found["difference_percent"] == pytest.approx(-22.2222, abs=1e-4) and found["equivalent"]
    run(*options, "--margin", 10)
    assert "not shown to be equivalent within 10 absolute: p = 0.8" in capsys.readouterr().out


def test_p_of_three_decimals():
    assert compare.format_p(0.0009) == "< 0.001" and compare.format_p(0.046) == "= 0.046"


def test_refusals(files):
    short = files / "short"
    short.write_text("u0 one two three\n")
    with pytest.raises(InputError, match="hypotheses of mixed .*missing: u1, u2"):
        compare.compare(files / "ref", files / "a", short, names=("fp", "mixed"))
    with pytest.raises(InputError, match="one name"):
        compare.compare(files / "ref", files / "a", files / "b", names=("fp", "fp"))
    with pytest.raises(InputError, match="seed -1"):
        compare.compare(files / "ref", files / "a", files / "b", seed=-1)
