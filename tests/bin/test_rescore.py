"""`mpq tune` and `mpq rescore`: one after the other, killed and resumed, with wrong inputs."""

from __future__ import annotations

import json
import random

import pytest

from espnet_mpq.bin import compare
from espnet_mpq.bin.mpq import main
from espnet_mpq.decode.nbest import read_nbest
from espnet_mpq.io import read_json

ARPA = """\\data\\
ngram 1=5
ngram 2=1

\\1-grams:
-2.0\t<unk>
-99\t<s>\t-0.5
-1.0\t</s>
-1.1\tthe\t-0.3
-1.2\tcat

\\2-grams:
-0.1\tthe cat

\\end\\
"""


def make_nbest(path, sentences, prefix, seed=0):
    """Four hypotheses a sentence: the first pass is sure of a wrong one half the time."""
    rng = random.Random(seed)
    rows = []
    for i, ref in enumerate(sentences):
        words = ref.split()
        hyps = [ref]
        for _ in range(3):
            at = rng.randrange(len(words))
            hyps.append(" ".join([*words[:at], words[at][::-1], *words[at + 1 :]]))
        rng.shuffle(hyps)
        scores = sorted((-3 * rng.random() for _ in hyps), reverse=True)
        rows.append(
            {
                "id": f"{prefix}{i:02d}",
                "ref": ref,
                "hyps": [
                    {"text": t, "score": s, "token": " ".join(t.replace(" ", "_"))}
                    for t, s in zip(hyps, scores)
                ],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ref = "".join(f"{row['id']} {row['ref']}\n" for row in rows)
    path.with_suffix(".ref").write_text(ref, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dev(tiny_text, tmp_path_factory):
    return make_nbest(tmp_path_factory.mktemp("nbest") / "dev.jsonl", tiny_text[:30], "dev")


@pytest.fixture(scope="module")
def test(tiny_text, tmp_path_factory):
    return make_nbest(tmp_path_factory.mktemp("nbest") / "test.jsonl", tiny_text[30:], "test", 1)


def run(*words):
    return main([str(w) for w in words])


@pytest.fixture
def fails(capsys):
    """fails(words, *parts): one line on stderr, exit status 1."""

    def check(words, *parts):
        capsys.readouterr()
        assert run(*words) == 1
        err = capsys.readouterr().err
        (line,) = [line for line in err.splitlines() if ": error: " in line]
        assert "Traceback" not in err
        for part in parts:
            assert part in line, line

    return check


def wer(ref, hyp):
    result = compare.compare(ref, hyp, hyp, names=("a", "b"), n_replications=1)
    return result["systems"]["a"]["wer_percent"]


@pytest.fixture(scope="module")
def tuned(fp_exp, dev, test, tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned") / "weights.json"
    words = ["tune", "--nbest", dev, "--lm_exp", f"lm={fp_exp.path}", "--test", test]
    assert run(*words, "--output", path, "--decode_config", path.with_name("decode.yaml")) == 0
    return path


def test_tune_then_rescore(fp_exp, tuned, dev, test, tmp_path, capsys):
    weights = read_json(tuned)
    result = weights["tuned"]
    assert result["wer_percent"] < 0.5 * result["first_pass_wer_percent"]
    assert result["n_utterances"] == 30 and weights["weights"]["score"] == 1.0
    config = tuned.with_name("decode.yaml").read_text()
    assert f"lm_weight: {weights['weights']['lm']:.6g}\n" in config and "\npenalty: " in config
    for nbest, name in ((dev, "dev"), (test, "test")):
        out = tmp_path / name
        words = ["rescore", "--nbest", nbest, "--lm_exp", f"lm={fp_exp.path}"]
        assert run(*words, "--weights", tuned, "--wer", "--output_dir", out) == 0
        rates = read_json(out / "rescore.json")["wer_percent"]
        assert (
            rates["oracle"] == 0 and f"rescored {rates['rescored']:.2f}" in capsys.readouterr().out
        )
        found = wer(nbest.with_suffix(".ref"), out / "1best_recog/text")
        assert found == pytest.approx(rates["rescored"])
        if name == "dev":  # what was tuned is what comes out
            assert found == pytest.approx(result["wer_percent"])
            assert read_json(out / "rescore.json")["n_tuned_on"] == 30
        else:
            assert found < 0.5 * result["first_pass_wer_percent"]
            assert read_json(out / "rescore.json")["n_tuned_on"] == 0
    again = read_nbest(tmp_path / "test/nbest.jsonl")  # readable as an n-best list
    assert [len(one) for one in again] == [4] * 30 and again[0].tokens is not None


def test_results_and_totals(fp_exp, test, tmp_path):
    words = ["rescore", "--nbest", test, "--lm_exp", f"lm={fp_exp.path}"]
    assert run(*words, "--weight", "lm=0.5", "length=0.1", "--output_dir", tmp_path) == 0
    nbest = {one.utt: one for one in read_nbest(test)}
    rows = [json.loads(line) for line in (tmp_path / "nbest.jsonl").read_text().splitlines()]
    texts = dict(
        line.split(maxsplit=1) for line in (tmp_path / "1best_recog/text").read_text().splitlines()
    )
    tokens = (tmp_path / "1best_recog/token").read_text().splitlines()
    scores = (tmp_path / "1best_recog/score").read_text().splitlines()
    for row, token, score in zip(rows, tokens, scores):
        first = nbest[row["id"]]
        totals = [hyp["score"] for hyp in row["hyps"]]
        assert totals == sorted(totals, reverse=True)
        for hyp in row["hyps"]:
            parts, rank = hyp["parts"], hyp["first_pass_rank"] - 1
            assert hyp["text"] == first.texts[rank]
            assert parts["score"] == first.scores["score"][rank]
            assert parts["length"] == len(hyp["token"].split())
            total = parts["score"] + 0.5 * parts["lm"] + 0.1 * parts["length"]
            assert hyp["score"] == pytest.approx(total)
        best = row["hyps"][0]
        assert texts[row["id"]] == best["text"]
        assert token == f"{row['id']} {best['token']}"
        assert score == f"{row['id']} tensor({best['score']:.4f})"


def test_a_killed_run_goes_on(packed_exp, test, tmp_path, monkeypatch):
    from espnet_mpq.decode import part_scores

    monkeypatch.setattr(part_scores.groups_of, "__defaults__", (20,))
    words = ["rescore", "--nbest", test, "--lm_exp", f"lm={packed_exp.path}", "--weight", "lm=1"]
    assert run(*words, "--output_dir", tmp_path / "whole") == 0
    score = part_scores.TokenScorer.score
    calls = []

    def dies(self, hyps):
        calls.append(len(hyps))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, hyps)

    monkeypatch.setattr(part_scores.TokenScorer, "score", dies)
    assert run(*words, "--output_dir", tmp_path / "killed") == 130
    assert not (tmp_path / "killed/nbest.jsonl").exists()
    journal = tmp_path / "killed/parts/lm.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    assert run(*words, "--output_dir", tmp_path / "killed") == 0
    assert calls == [20, 20, 20, 20, 20, 20, 20, 20]  # 3, the kill, then 4 of 6 and no more
    for name in ("nbest.jsonl", "1best_recog/text", "parts/lm.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_density_ratio_backward_and_ngram(fp_exp, packed_exp, test, tmp_path):
    arpa = tmp_path / "two.arpa"
    arpa.write_text(ARPA)
    words = ["rescore", "--nbest", test, "--lm_exp", f"ext={packed_exp.path}", "--ngram", arpa]
    words += ["--source_lm_exp", f"src={fp_exp.path}", "--backward_lm_exp", f"back={fp_exp.path}"]
    weights = ["ext=0.7", "src=-0.5", "back=0.1", "two=0.2", "length=0.2"]
    assert run(*words, "--weight", *weights, "--output_dir", tmp_path / "out") == 0
    row = json.loads((tmp_path / "out/nbest.jsonl").read_text().splitlines()[0])
    parts = row["hyps"][0]["parts"]
    assert list(parts) == ["score", "length", "ext", "back", "src", "two"]
    total = sum(float(w.split("=")[1]) * parts[w.split("=")[0]] for w in weights)
    assert row["hyps"][0]["score"] == pytest.approx(parts["score"] + total)
    assert len({round(parts[name], 3) for name in ("ext", "back", "src")}) == 3


def test_interpolation_word_by_word(fp_exp, dev, test, tmp_path):
    arpa = tmp_path / "two.arpa"
    arpa.write_text(ARPA)
    lms = ["--lm_exp", f"lm={fp_exp.path}", "--ngram", arpa]
    out = tmp_path / "weights.json"
    assert run("tune", "--nbest", dev, *lms, "--shares", 0.3, 0.9, "--output", out) == 0
    weights = read_json(out)
    assert weights["share"] in (0.3, 0.9) and "lm+two" in weights["weights"]
    assert set(weights["tuned"]["errors_by_share"]) == {"0.3", "0.9"}
    words = ["rescore", "--nbest", test, *lms, "--weights", out, "--output_dir", tmp_path / "out"]
    assert run(*words) == 0
    assert run(*words, "--interpolate", 0.5) == 1  # not what was tuned
    row = json.loads((tmp_path / "out/nbest.jsonl").read_text().splitlines()[0])
    assert "lm+two" in row["hyps"][0]["parts"] and "lm" not in row["hyps"][0]["parts"]


def test_empty_lists_and_hypotheses(fp_exp, tmp_path):
    rows = [
        {"id": "none", "ref": "a b", "hyps": []},
        {"id": "empty", "ref": "", "hyps": [{"text": "", "score": -1}, {"text": "a", "score": -9}]},
        {"id": "long", "ref": "a", "hyps": [{"text": "a " * 400, "score": 0}]},
        {"id": "one", "ref": "it", "hyps": [{"text": "it", "score": 0}]},
    ]
    nbest = tmp_path / "n.jsonl"
    nbest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm = ["--nbest", nbest, "--lm_exp", f"lm={fp_exp.path}"]
    assert run("rescore", *lm, "--weight", "lm=0.1", "--output_dir", tmp_path / "out") == 0
    lines = (tmp_path / "out/1best_recog/text").read_text().splitlines()
    assert lines[:2] == ["none", "empty"] and lines[2].split() == ["long"] + 400 * ["a"]
    assert read_json(tmp_path / "out/rescore.json")["n_without_hypothesis"] == 1
    assert run("tune", *lm, "--output", tmp_path / "w.json") == 0
    tuned = read_json(tmp_path / "w.json")["tuned"]
    assert (tuned["n_words"], tuned["n_errors"]) == (4, 2 + 0 + 399)


def test_a_dev_set_that_shares_utterances_with_the_test_set_is_refused(fails, dev, test, tmp_path):
    both = tmp_path / "both.jsonl"
    both.write_text(test.read_text().splitlines()[3] + "\n")
    words = ["tune", "--nbest", dev, "--lm_exp", "no", "--output", tmp_path / "w", "--test"]
    fails(
        [*words, test, dev], "shares utterances with the test set", "30: dev00", "development set"
    )
    fails([*words, dev.with_suffix(".ref")], "30: dev00")  # texts too
    words[2] = both
    fails([*words, test], "1: test03")


def test_references(fails, fp_exp, dev, test, tmp_path):
    words = ["tune", "--lm_exp", f"lm={fp_exp.path}", "--output", tmp_path / "w", "--nbest", dev]
    fails([*words, "--ref", test.with_suffix(".ref")], "30 of 30 n-best lists have no reference")
    trn = tmp_path / "ref.trn"
    lines = dev.with_suffix(".ref").read_text().splitlines()
    trn.write_text("".join(f"{x.split(maxsplit=1)[1].upper()} ({x.split()[0]})\n" for x in lines))
    assert run(*words, "--ref", trn) == 0  # the case of letters does not count
    assert read_json(tmp_path / "w")["tuned"]["wer_percent"] < 20
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"id": "a", "hyps": [{"text": "x", "score": 1}]}\n')
    fails([*words[:-1], bare], "1 of 1 n-best lists", "--ref")


def test_weights_that_do_not_fit(fails, fp_exp, tuned, test, tmp_path):
    def words(*more, lm="lm"):
        base = ["rescore", "--nbest", test, "--lm_exp", f"{lm}={fp_exp.path}"]
        return [*base, "--output_dir", tmp_path / "out", *more]

    fails(words(), "no weights", "mpq tune")
    fails(words("--weight", "lm"), "found lm", "PART=NUMBER")
    fails(words("--weight", "lmm=1"), "weight for 'lmm'", "did you mean 'lm'")
    fails(words("--weights", tuned, lm="other"), "weight for 'lm'", "NAME=EXP")
    fails(words("--weight", "score=1"), "lm has no weight")
    fails(words("--weight", "lm=nan"), "weight of lm: found nan")
    fails(words("--weights", tuned, "--score", "rank"), "--score differs", "found rank")
    fails(words("--weights", tmp_path / "none.json"), "cannot read")
    bad = tmp_path / "bad.json"
    bad.write_text('{"weights": {"lm": 1}, "scor": "sum"}')
    fails(words("--weights", bad), "unknown key 'scor'", "did you mean 'score'")
    source = ["--source_lm_exp", f"src={fp_exp.path}", "--weight", "lm=1", "src=0.5"]
    fails(words(*source), "source LM src", "below 0")


def test_language_models_that_do_not_fit(fails, fp_exp, packed_exp, test, tmp_path):
    base = ["rescore", "--nbest", test, "--output_dir", tmp_path / "out", "--weight", "lm=1"]
    fails(base, "no language model")
    fails(
        [*base, "--lm_exp", f"lm={fp_exp.path}", f"lm={packed_exp.path}"], "one name", "a=exp/lm_1"
    )
    fails([*base, "--lm_exp", f"score={fp_exp.path}"], "are both called 'score'")
    fails([*base, "--lm_exp", f"lm={fp_exp.path}", "--interpolate", 0.5], "0 of --ngram")
    fails(
        [*base, "--lm_exp", f"lm={fp_exp.path}", "--tokens", "nbest"], "not in the token list", "_"
    )
    greek = tmp_path / "greek.jsonl"
    greek.write_text('{"id": "a", "hyps": [{"text": "ΑΒΓ", "score": 1}]}\n')
    base[2] = greek
    fails([*base, "--lm_exp", f"lm={fp_exp.path}"], "knows no token", "letter case")
    base[2] = test
    assert run(*base, "--lm_exp", f"lm={fp_exp.path}") == 0
    other = [*base, "--lm_exp", f"lm={packed_exp.path}"]
    fails(other, "scores of another LM", "checkpoint_sha256", "choose another folder")


def test_nan_in_an_lm(fails, make_lm_exp, test, tmp_path):
    import torch

    exp = make_lm_exp(tmp_path / "lm", n_steps=0)
    state = torch.load(exp.checkpoint)
    state["lm.decoder.bias"][:] = float("nan")
    torch.save(state, exp.checkpoint)
    words = ["rescore", "--nbest", test, "--output_dir", tmp_path / "out", "--weight", "lm=1"]
    fails([*words, "--lm_exp", f"lm={exp.path}"], "no finite number", "test00, hypothesis 1")
