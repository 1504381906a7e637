"""The journal of part scores: killed runs go on to the same result; others' are refused."""

from __future__ import annotations

import json

import numpy
import pytest

from espnet_mpq.decode import part_scores
from espnet_mpq.decode.nbest import NbestList
from espnet_mpq.decode.part_scores import (
    HypothesisScore,
    NgramScorer,
    TokenScorer,
    groups_of,
    score_lists,
)
from espnet_mpq.errors import InputError, MismatchError


class Letters:
    """Scores a hypothesis by its length; counts the calls; dies at a given call."""

    name = "letters"

    def __init__(self, options=None, dies_at=None, value=None):
        self.options, self.dies_at, self.value, self.n_calls = options, dies_at, value, 0

    def identity(self):
        return {"options": self.options}

    def score(self, hyps):
        self.n_calls += 1
        if self.n_calls == self.dies_at:
            raise KeyboardInterrupt
        return [HypothesisScore(self.value or -len(text) / 3, [1 / 3]) for text, _ in hyps]


def make_lists(sizes):
    return [
        NbestList(f"u{i}", [f"word {'x' * n}" for n in range(size)], {})
        for i, size in enumerate(sizes)
    ]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(part_scores, "GROUP", 4)
    monkeypatch.setattr(part_scores.groups_of, "__defaults__", (4,))


def run(scorer, lists, path):
    return [values for *_, values in score_lists(scorer, lists, path)]


def test_groups():
    assert groups_of(make_lists([2, 2, 1, 9, 0, 1])) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert groups_of([]) == []


def test_a_killed_run_goes_on_to_the_same_result(tmp_path):
    lists = make_lists([2, 2, 3, 0, 4, 1])
    whole, journal = tmp_path / "whole.jsonl", tmp_path / "deep/killed.jsonl"
    expected = run(Letters(), lists, whole)
    with pytest.raises(KeyboardInterrupt):
        run(Letters(dies_at=3), lists, journal)
    data = journal.read_bytes()
    journal.write_bytes(data[:-5])  # killed within a line
    scorer = Letters()
    assert run(scorer, lists, journal) == expected and scorer.n_calls == 3
    assert journal.read_bytes() == whole.read_bytes()
    again = Letters()
    assert run(again, lists, journal) == expected and again.n_calls == 0
    assert journal.read_bytes() == whole.read_bytes()


def test_changed_lists_are_scored_anew(tmp_path):
    lists = make_lists([4, 4])
    run(Letters(), lists, tmp_path / "j")
    changed = [lists[0], NbestList("u1", ["other"], {})]
    scorer = Letters()
    assert run(scorer, changed, tmp_path / "j")[1][0][0].total == -5 / 3 and scorer.n_calls == 1


def test_journals_of_others_are_refused(tmp_path):
    lists, path = make_lists([1]), tmp_path / "j"
    run(Letters("a"), lists, path)
    with pytest.raises(MismatchError, match="found options a; expected options b; .*remove"):
        run(Letters("b"), lists, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", ""]))
    with pytest.raises(InputError, match="is damaged.*remove"):
        run(Letters("a"), lists, path)
    head = dict(json.loads(lines[0]), version=2)
    path.write_text(json.dumps(head) + "\n")
    with pytest.raises(MismatchError, match="found 2; expected 1"):
        run(Letters("a"), lists, path)


def test_scores_that_are_no_numbers(tmp_path):
    with pytest.raises(InputError, match="letters gives.*found nan for u0, hypothesis 1: word"):
        run(Letters(value=float("nan")), make_lists([2]), tmp_path / "j")


class Tokens:
    """Two tokens a word, the second with a bar; the LM gives every token its number."""

    sos = 9

    def encode(self, text, tokens=None):
        words = text.split()
        ids = [i for word in words for i in (len(word), 0)]
        return [*ids, 9], [n for n in range(len(words)) for _ in range(2)] + [len(words)]


class Numbers:
    def step(self, tokens, state):
        import torch

        scores = -torch.arange(10, dtype=torch.float64).expand(len(tokens), 10)
        return scores, torch.zeros(1, len(tokens), 1)


def test_scores_of_words_and_backward_lms():
    scorer = TokenScorer("lm", Numbers(), Tokens(), {}, per_word=True)
    found = scorer.score([("a bbb cc", None), ("", None), ("a bbb cc", None)])
    assert found[0] == HypothesisScore(-15.0, [-1.0, -3.0, -2.0, -9.0]) == found[2]
    assert found[1] == HypothesisScore(-9.0, [-9.0])
    backward = TokenScorer("lm", Numbers(), Tokens(), {}, backward=True, per_word=True)
    assert backward.score([("a bbb cc", None)])[0].words == [-2.0, -3.0, -1.0, -9.0]
    assert backward.identity() == {"backward": True}


def test_tokens_that_do_not_spell_words():
    class Others(Tokens):
        def encode(self, text, tokens=None):
            ids, words = super().encode(text)
            return ids, None if text == "a" else [0] * len(words)

    scorer = TokenScorer("lm", Numbers(), Others(), {}, per_word=True)
    for text in ("a", "a b"):
        with pytest.raises(InputError, match="do not tell the words of a hypothesis apart"):
            scorer.score([(text, None)])


def test_ngram_scorer():
    class Ngram:
        def word_log_probs(self, words):
            return [-float(len(word)) for word in words] + [-0.5]

    found = NgramScorer("3gram", Ngram(), per_word=True).score([("a bb", None), ("", None)])
    assert found == [HypothesisScore(-3.5, [-1.0, -2.0, -0.5]), HypothesisScore(-0.5, [-0.5])]
    assert numpy.isclose(NgramScorer("n", Ngram()).score([("a", None)])[0].total, -1.5)
