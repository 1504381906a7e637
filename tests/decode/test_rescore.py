"""Parts, their combination, interpolation word by word, the order of hypotheses."""

from __future__ import annotations

import math

import numpy
import pytest

from espnet_mpq.decode.nbest import NbestList
from espnet_mpq.decode.part_scores import HypothesisScore
from espnet_mpq.decode.parts import LM, Scored, first_pass_parts, interpolate
from espnet_mpq.decode.rescore import combine, order_of, rescore
from espnet_mpq.errors import InputError

LISTS = [
    NbestList("a", ["x y", "x", ""], {"score": numpy.array([-1.0, -2.0, -2.5])}),
    NbestList("b", [], {}),
    NbestList("c", ["z"], {"score": numpy.array([0.5])}, ["z ."]),
]


def as_lists(values):
    return [x.tolist() for x in values]


def test_first_pass_parts():
    scored = first_pass_parts(LISTS)
    assert as_lists(scored.parts["score"]) == [[-1.0, -2.0, -2.5], [], [0.5]]
    assert as_lists(scored.parts["length"]) == [[2, 1, 0], [], [2]]
    mean = first_pass_parts(LISTS, "mean").parts["score"]
    assert as_lists(mean) == [[-2.0, -2.0, 0.0], [], [1.0]]
    rank = first_pass_parts(LISTS, "rank").parts
    assert list(rank) == ["rank", "length"] and rank["rank"][0].tolist() == [0, -1, -2]
    bare = [NbestList("a", ["x"], {})]
    with pytest.raises(InputError, match="no scores.*--score rank"):
        first_pass_parts(bare)
    with pytest.raises(InputError, match="'length', which is ours"):
        first_pass_parts([NbestList("a", ["x"], {"length": numpy.ones(1)})])


def test_totals_and_order():
    scored = first_pass_parts(LISTS)
    scored.add("lm", [numpy.array([-9.0, -4.0, -3.0]), numpy.zeros(0), numpy.array([-1.0])], LM, {})
    weights = {"score": 1.0, "lm": 0.5, "length": 2.0}
    totals = combine(scored.parts, weights)
    assert as_lists(totals) == [[-1.5, -2.0, -4.0], [], [4.0]]
    results = rescore(LISTS, scored.parts, {"score": 1.0, "lm": 0.5})
    assert [r.best_text for r in results] == ["x", "", "z"]  # -5.5, -4.0, -4.0: the first of equals
    assert results[0].order.tolist() == [1, 2, 0]
    value = results[0].to_dict()
    assert value["hyps"][0] == {
        "text": "x",
        "score": -4.0,
        "first_pass_rank": 2,
        "parts": {"score": -2.0, "length": 1.0, "lm": -4.0},
    }
    assert results[2].to_dict()["hyps"][0]["token"] == "z ."
    with pytest.raises(InputError, match="a weight for 'lmm'.*did you mean 'lm'"):
        combine(scored.parts, {"lmm": 1.0})
    with pytest.raises(InputError, match="weight of lm: found nan"):
        combine(scored.parts, {"lm": math.nan})


def test_equal_totals_keep_their_order():
    assert order_of(numpy.array([1.0, 3.0, 3.0, 1.0, 3.0])).tolist() == [1, 2, 4, 0, 3]


def test_interpolation_word_by_word():
    one = [HypothesisScore(0.0, [math.log(0.2), math.log(0.5)])]
    other = [HypothesisScore(0.0, [math.log(0.6), math.log(0.1)])]
    assert interpolate(one, other, 0.5)[0] == pytest.approx(math.log(0.4 * 0.3))
    assert interpolate(one, other, 0.25)[0] == pytest.approx(math.log(0.5 * 0.2))
    assert interpolate(one, other, 1.0)[0] == pytest.approx(math.log(0.2 * 0.5))
    assert interpolate(one, other, 0.0)[0] == pytest.approx(math.log(0.6 * 0.1))


def test_a_mixed_part_stands_for_both():
    values = [HypothesisScore(-1.0, [-0.5, -0.5])]
    scored = Scored({"length": [numpy.ones(1)]}, {})
    for name in ("lm", "3gram"):
        scored.add(name, [numpy.array([-1.0])], LM, {"sha": name})
        scored.keep_words(name, [values])
    scored.mixed = ("lm", "3gram")
    mixed = scored.with_share(0.3)
    assert list(mixed.parts) == ["length", "lm+3gram"]
    assert mixed.parts["lm+3gram"][0].tolist() == pytest.approx([-1.0])
    assert mixed.kinds["lm+3gram"].identity == {"lm": {"sha": "lm"}, "ngram": {"sha": "3gram"}}
    assert scored.with_share(None) is scored
