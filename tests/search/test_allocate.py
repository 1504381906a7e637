"""Best choices and Pareto front against brute force and against an integer program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_mpq.errors import InputError
from espnet_mpq.search.allocate import by_harm, pareto_front, repair

BITS = (1, 2, 4, 8)


@st.composite
def tables(draw, harms=None):
    """Up to 6 clusters, up to 4 bit-widths each; few distinct values, so that ties are common."""
    harms = harms or st.one_of(
        st.integers(-3, 6).map(float), st.floats(-1.0, 1.0, allow_nan=False, width=32)
    )
    harm, n_bytes = {}, {}
    for k in range(draw(st.integers(1, 6))):
        bits = draw(st.lists(st.sampled_from(BITS), min_size=1, max_size=4, unique=True))
        harm[f"c{k}"] = {b: draw(harms) for b in bits}
        n_bytes[f"c{k}"] = {b: draw(st.integers(0, 12)) for b in bits}
    return harm, n_bytes


def enumerate_all(harm, n_bytes, fixed):
    """Every choice as (bytes, harm), harms added in the order of the clusters."""
    names = list(harm)
    for bits in itertools.product(*(sorted(harm[n]) for n in names)):
        total = 0.0
        for name, b in zip(names, bits):
            total += harm[name][b]
        yield fixed + sum(n_bytes[n][b] for n, b in zip(names, bits)), total


@settings(max_examples=300, deadline=None)
@given(tables(), st.integers(0, 5), st.integers(0, 80))
def test_budgeted_front_ends_at_the_brute_force_optimum(table, fixed, budget):
    harm, n_bytes = table
    fitting = [(h, s) for s, h in enumerate_all(harm, n_bytes, fixed) if s <= budget]
    front = pareto_front(harm, n_bytes, fixed, budget)
    if not fitting:
        assert front == []
        return
    # Equal, not near: the least harm, and the least bytes among those.
    assert (front[-1].harm, front[-1].n_bytes) == min(fitting)


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(0, 5), st.integers(0, 80))
def test_by_harm_lists_all_that_fit_best_first(table, fixed, budget):
    harm, n_bytes = table
    # Bytes less some base may be negative.
    n_bytes = {n: {b: size - 5 for b, size in row.items()} for n, row in n_bytes.items()}
    fixed += 5 * len(n_bytes)
    fitting = sorted((h, s) for s, h in enumerate_all(harm, n_bytes, fixed) if s <= budget)
    points = list(by_harm(harm, n_bytes, fixed, budget))  # the first is what `mpq plan` wants
    assert sorted((p.harm, p.n_bytes) for p in points) == fitting
    assert len({tuple(p.choice.items()) for p in points}) == len(points)
    for a, b in zip(points, points[1:]):
        assert a.harm <= b.harm + 1e-12
    for p in points:
        assert p.harm == sum(harm[n][p.choice[n]] for n in harm)


@settings(max_examples=300, deadline=None)
@given(tables(), st.integers(0, 5))
def test_front_is_every_undominated_point(table, fixed):
    harm, n_bytes = table
    points = set(enumerate_all(harm, n_bytes, fixed))
    undominated = {
        (s, h)
        for s, h in points
        if not any((s2 <= s and h2 <= h and (s2, h2) != (s, h)) for s2, h2 in points)
    }
    front = pareto_front(harm, n_bytes, fixed)
    assert [(p.n_bytes, p.harm) for p in front] == sorted(undominated)
    for p in front:
        assert p.n_bytes == fixed + sum(n_bytes[n][b] for n, b in p.choice.items())
        assert p.harm == sum(harm[n][p.choice[n]] for n in harm)


@pytest.mark.parametrize("seed", range(5))
def test_large_table_agrees_with_an_integer_program(seed):
    from scipy.optimize import Bounds, LinearConstraint, milp

    rng = np.random.default_rng(seed)
    names = [f"c{k}" for k in range(26)]
    n_weights = dict(zip(names, rng.integers(99, 9999, 26)))
    n_bytes = {n: {b: int(n_weights[n]) * b // 8 for b in BITS} for n in names}
    harm = {n: {b: float(rng.exponential() * 4.0**-b) for b in BITS} for n in names}
    budget = sum(row[2] for row in n_bytes.values())
    best = next(by_harm(harm, n_bytes, 0, budget))
    pick_one = np.kron(np.eye(26), np.ones(4))
    sizes = np.array([[n_bytes[n][b] for n in names for b in BITS]])
    found = milp(
        c=np.array([harm[n][b] for n in names for b in BITS]) * 1e6,
        integrality=np.ones(104),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(pick_one, 1, 1), LinearConstraint(sizes, 0, budget)],
        options={"mip_rel_gap": 0},
    )
    assert found.success
    assert best.n_bytes <= budget
    assert best.harm == pytest.approx(found.fun / 1e6, rel=1e-9)


def test_known_answer():
    # 3 bytes to give: "b" gains 5 for 2 bytes, "a" 4 for 1 byte; both do not fit.
    harm = {"a": {1: 9.0, 2: 5.0}, "b": {1: 10.0, 2: 5.0}}
    n_bytes = {"a": {1: 1, 2: 2}, "b": {1: 1, 2: 3}}
    assert next(by_harm(harm, n_bytes, 10, 14)).choice == {"a": 1, "b": 2}
    assert next(by_harm(harm, n_bytes, 10, 13)).choice == {"a": 2, "b": 1}
    assert next(by_harm(harm, n_bytes, 10, 99)).choice == {"a": 2, "b": 2}
    assert list(by_harm(harm, n_bytes, 10, 11)) == []


def test_malformed_tables_are_refused():
    with pytest.raises(InputError, match="same clusters"):
        pareto_front({"a": {1: 0.0}}, {"b": {1: 1}})
    with pytest.raises(InputError, match="same clusters"):
        pareto_front({}, {})
    with pytest.raises(InputError, match="cluster a"):
        pareto_front({"a": {1: 0.0}}, {"a": {2: 1}})
    with pytest.raises(InputError, match="not finite"):
        pareto_front({"a": {1: float("nan")}}, {"a": {1: 1}})


def test_repair_finds_a_better_swap_when_harms_do_not_add_up():
    bits = (1, 2)
    harm = {n: {1: 1.0 + k, 2: 0.0} for k, n in enumerate("abc")}
    n_bytes = {n: {b: b for b in bits} for n in "abc"}
    start = next(by_harm(harm, n_bytes, 0, 4)).choice
    assert start == {"a": 1, "b": 1, "c": 2}
    calls = []

    def joint(choice):
        calls.append(dict(choice))
        return 10.0 if choice["a"] == choice["b"] == 1 else 2.0 + (choice["c"] == 1)

    best, value = repair(start, joint(start), harm, n_bytes, 4, joint, n_measurements=6)
    assert (best, value) == ({"a": 1, "b": 2, "c": 1}, 3.0)
    assert len(calls) <= 7
    assert all(sum(n_bytes[n][b] for n, b in c.items()) <= 4 for c in calls)
    assert repair(start, 1.0, harm, n_bytes, 4, joint, 3) == (start, 1.0)
