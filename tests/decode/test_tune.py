"""Line search against brute force, bounds, ties, restarts."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_mpq.decode.parts import LM, SOURCE, Scored
from espnet_mpq.decode.tune import (
    Direction,
    ErrorSurface,
    search_line,
    tune,
    tune_parts,
    within,
    word_errors,
)
from espnet_mpq.errors import InputError

INF = math.inf


def naive_errors(features, errors, weights):
    """The first best hypothesis of every list, in exact arithmetic."""
    total = 0
    weights = [Fraction(w) for w in weights]
    for x, e in zip(features, errors):
        sums = [sum(w * Fraction(v) for w, v in zip(weights, row)) for row in x.tolist()]
        total += int(e[sums.index(max(sums))])
    return total


def corpus(seed, n_lists=6, most=5, n_parts=3, whole=True):
    """Lists of small whole numbers (many exact ties) or of real ones."""
    rng = numpy.random.default_rng(seed)
    features, errors = [], []
    for _ in range(n_lists):
        n = int(rng.integers(1, most + 1))
        x = (
            rng.integers(-3, 4, (n, n_parts)).astype(float)
            if whole
            else rng.normal(size=(n, n_parts))
        )
        features.append(x)
        errors.append(rng.integers(0, 5, n))
    return features, errors


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([(-INF, INF), (0, INF), (-1.5, 2.0)]))
def test_errors_along_a_line_are_those_of_brute_force(seed, whole, bounds):
    features, errors = corpus(seed, whole=whole)
    surface = ErrorSurface(features, errors, n_fixed=7)
    start, direction = numpy.array([1.0, 0.5, -0.25]), numpy.array([0.0, 1.0, -0.5])
    edges, counts = surface.along(Direction(start, direction, *bounds))
    assert len(edges) == len(counts) + 1 and (numpy.diff(edges) >= 0).all()
    assert (edges[0], edges[-1]) == bounds
    inner = edges.clip(-50, 50)
    for low, high, count in zip(inner, inner[1:], counts):
        if high - low > 1e-6:  # in the middle of a stretch no totals are equal by chance
            step = Fraction((low + high) / 2)
            weights = [Fraction(a) + step * Fraction(b) for a, b in zip(start, direction)]
            assert count == 7 + naive_errors(features, errors, weights)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_the_step_found_has_the_fewest_errors_of_the_line(seed):
    features, errors = corpus(seed, whole=False)
    surface = ErrorSurface(features, errors)
    line = Direction(numpy.array([1.0, 0.0, 0.0]), numpy.array([0.0, 1.0, 0.5]), -4.0, 4.0)
    step, count = search_line(surface, line)
    assert line.low <= step <= line.high
    assert surface.n_errors(line.start + step * line.direction) == count
    grid = numpy.linspace(-4, 4, 100)
    assert count <= min(surface.n_errors(line.start + s * line.direction) for s in grid)


def test_a_corpus_by_hand():
    """Totals 0 + 1w, 1 + 0w and 4 - 2w: best are the third, from 1.5 the second? No: from 4/3."""
    features = [numpy.array([[0.0, 1.0], [1.0, 0.0], [4.0, -2.0]])]
    surface = ErrorSurface(features, [numpy.array([0, 9, 4])])
    line = Direction(numpy.array([1.0, 0.0]), numpy.array([0.0, 1.0]), -INF, INF)
    edges, counts = surface.along(line)
    assert edges.tolist() == pytest.approx([-INF, 4 / 3, INF]) and counts.tolist() == [4, 0]
    assert search_line(surface, line) == (pytest.approx(7 / 3), 0)


def test_equal_hypotheses_choose_the_first():
    x = numpy.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    surface = ErrorSurface([x], [numpy.array([3, 0, 5])])
    assert surface.n_errors(numpy.array([1.0, 1.0])) == 3
    line = Direction(numpy.array([1.0, 0.0]), numpy.array([0.0, 1.0]), -INF, INF)
    assert surface.along(line)[1].tolist() == [5, 3]


def test_within_bounds():
    line = within(
        numpy.array([1.0, 0.5]), numpy.array([1.0, -2.0]), numpy.array([0.0, 0.0]),
        numpy.array([INF, 1.0]),
    )  # fmt: skip
    assert (line.low, line.high) == (-0.25, 0.25)


def test_tuning_finds_what_a_grid_finds():
    for seed in range(3):
        features, errors = corpus(seed, n_lists=30, most=6, whole=False)
        surface = ErrorSurface(features, errors)
        lows, highs = [1.0, 0.0, -2.0], [1.0, 3.0, 2.0]
        tuned = tune(surface, [1.0, 0.1, 0.0], lows, highs, n_restarts=10)
        assert surface.n_errors(tuned.weights) == tuned.n_errors == min(tuned.starts)
        assert (tuned.weights >= lows).all() and (tuned.weights <= highs).all()
        grid = [
            surface.n_errors(numpy.array([1.0, b, c]))
            for b in numpy.linspace(0, 3, 16)
            for c in numpy.linspace(-2, 2, 21)
        ]
        assert tuned.n_errors <= min(grid)
        again = tune(surface, [1.0, 0.1, 0.0], lows, highs, n_restarts=10)
        assert again.weights.tolist() == tuned.weights.tolist()


def test_never_worse_than_the_start():
    features, errors = corpus(3, n_lists=50, whole=False)
    surface = ErrorSurface(features, errors)
    start = numpy.array([1.0, 0.3, 0.2])
    assert tune(surface, start, [1, 0, -9], [1, 9, 9], n_restarts=1).n_errors <= surface.n_errors(
        start
    )
    for lows, highs in (([1, 1, 1], [1, 1, 1]), ([1, 1, -9], [1, 9, 9])):
        with pytest.raises(InputError, match="weights to begin with"):
            tune(surface, start, lows, highs)


def test_tuning_parts_keeps_signs():
    """A part that is best subtracted: as an LM it gets 0, as a source LM a weight below 0."""
    errors = [numpy.array([1, 0])] * 5 + [numpy.zeros(0, dtype=int)]
    for kind in (LM, SOURCE):
        scored = Scored({}, {})
        scored.add("score", [numpy.array([0.0, -1.0])] * 5 + [numpy.zeros(0)], "first pass", {})
        scored.add("lm", [numpy.array([0.0, -3.0])] * 5 + [numpy.zeros(0)], kind, {})
        scored.add("length", [numpy.array([1.0, 1.0])] * 5 + [numpy.zeros(0)], "length", {})
        weights, tuned = tune_parts(scored, errors, n_fixed=2)
        assert weights["score"] == 1.0 and tuned.n_errors == (7 if kind == LM else 2)
        assert (weights["lm"] >= 0) if kind == LM else (weights["lm"] < -1 / 3)
        assert "length" not in tune_parts(scored, errors, use_length=False)[0]


def test_word_errors():
    def tokens(words):
        return [word for word in words if word != "@"]

    def align(ref, hyp):
        return "C" * min(len(ref), len(hyp)) + "D" * (len(ref) - len(hyp))

    found = word_errors(["a b", "a", "a @ b", ""], ["a", "b"], tokens, align)
    assert found.tolist() == [0, 1, 0, 2]
