"""The mixture: draws, exact bytes, penalties, and a budget met on a toy with a known answer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.errors import InputError
from espnet_mpq.plan import Plan, plan_size
from espnet_mpq.search.nas import Mixture, Penalty
from espnet_mpq.search.nas_options import NasOptions

SHAPES = {"a": (5, 7), "b": (40, 30), "c": (3, 1)}
CLUSTERS = [Cluster(n, "output", (Part(n, 0, *shape),)) for n, shape in SHAPES.items()]
REST = [("bias", (11,))]
FIXED = 4 * 11 + 100


def mixture(budget=10**6, **options) -> Mixture:
    return Mixture(CLUSTERS, NasOptions(budget_bytes=budget, **options), FIXED, budget)


def set_rows(m: Mixture, rows) -> None:
    with torch.no_grad():
        m.logits.copy_(torch.tensor(rows).flatten())


@pytest.mark.parametrize("spec", [{}, dict(grid="paper", tying="group", group_size=4)])
def test_expected_bytes_of_a_one_hot_are_the_size_of_its_plan(spec):
    m = mixture(bits=(1, 2, 8, 16), **spec)
    for choice in itertools.product(range(4), repeat=3):
        one_hot = torch.nn.functional.one_hot(torch.tensor(choice), 4)
        bits = {name: m.options.bits[k] for name, k in zip(m.names, choice)}
        plan = Plan({name: m.options.specs()[b] for name, b in bits.items()})
        size = plan_size(plan, CLUSTERS, REST, header_n_bytes=100).n_bytes
        assert float(m.expected_n_bytes(one_hot)) == size == m.choice_n_bytes(bits)


def test_expected_bytes_of_a_mixture_are_the_mean_over_all_plans():
    m = mixture()
    set_rows(m, [[0.3, -1.0, 2.0, 0.1], [1.0, 0.0, -2.0, 0.5], [0.0, 0.7, 0.2, -0.4]])
    p = m.probabilities().double()
    mean = 0.0
    for choice in itertools.product(range(4), repeat=3):
        bits = {name: m.options.bits[k] for name, k in zip(m.names, choice)}
        mean += math.prod(float(p[i, k]) for i, k in enumerate(choice)) * m.choice_n_bytes(bits)
    assert float(m.expected_n_bytes(p)) == pytest.approx(mean, rel=1e-6)


def test_bytes_stay_exact_when_the_lm_becomes_half_precision():
    m = mixture()
    before = m.n_bytes.clone()
    assert m.half().n_bytes.dtype == torch.float64 and torch.equal(m.n_bytes, before)
    assert "n_bytes" not in m.state_dict()


def test_draws_of_the_three_kinds():
    torch.manual_seed(0)
    weights = mixture(phase="weights").train()
    counts = {b: 0 for b in weights.options.bits}
    for _ in range(400):
        for bits in weights.draw().values():
            counts[bits] += 1
    assert all(abs(n - 300) < 60 for n in counts.values())  # 1200 draws, sd 15

    gumbel = mixture(temperature=0.05, final_temperature=0.05).train()
    rows = [[0.0, 1.0, 0.0, -1.0]] * 3
    set_rows(gumbel, rows)
    draws = torch.stack([torch.stack(list(gumbel.draw().values())) for _ in range(600)])
    assert torch.allclose(draws.sum(-1), torch.ones(600, 3), atol=1e-5)
    # Near one-hot, and each candidate as often as softmax(a) says.
    frequency = torch.zeros(4).index_add_(0, draws.argmax(-1).flatten(), torch.ones(1800)) / 1800
    assert torch.allclose(frequency, torch.tensor(rows[0]).softmax(0), atol=0.05)
    assert float(draws.max(-1)[0].mean().detach()) > 0.95

    soft = mixture(relaxation="softmax").train()
    set_rows(soft, rows)
    soft.temperature = 0.5
    expected = (torch.tensor(rows[0]) / 0.5).softmax(0)
    assert torch.allclose(soft.draw()["b"], expected)


def test_one_best_and_its_ties():
    fits_4_bits = mixture().choice_n_bytes(dict.fromkeys("abc", 4))
    m = mixture(budget=fits_4_bits).eval()
    assert m.draw() == {"a": 4, "b": 4, "c": 4}
    free = Mixture(CLUSTERS, NasOptions(phase="weights"), FIXED, None)
    assert free.one_best() == {"a": 2, "b": 2, "c": 2}
    assert mixture(budget=fits_4_bits - 1).one_best() == {"a": 2, "b": 2, "c": 2}
    set_rows(m, [[0.0, 1.0, 0.5, 0.9], [3.0, 1.0, 0.5, 0.9], [0.0, 1.0, 0.5, 7.0]])
    assert m.draw() == {"a": 2, "b": 1, "c": 8}


def test_the_printed_penalty_with_probabilities():
    m = mixture(penalty="paper", beta=0.25)
    set_rows(m, [[math.log(1.0), math.log(2.0), math.log(3.0), math.log(4.0)]] * 3)
    roots = [1.0, math.sqrt(2.0), 2.0, math.sqrt(8.0)]
    value = 0.25 * 3 * sum(r * (k + 1) / 10 for k, r in enumerate(roots))
    assert float(Penalty(m)().detach()) == pytest.approx(value, rel=1e-6)


def test_the_multiplier_follows_the_overshoot():
    m = mixture(budget=600, rho=2.0, multiplier_rate=0.5, temperature=0.5)
    penalty = Penalty(m)
    least = m.choice_n_bytes(dict.fromkeys("abc", 1))
    g = (float(m.expected_n_bytes(m.probabilities())) - 600) / (600 - least)
    assert g > 0 and float(m.overshoot(600)) == 0.0
    penalty.update()
    assert penalty.multiplier == pytest.approx(0.5 * 2.0 * g)
    value = (penalty.multiplier + 2.0 * g) ** 2 / 4.0
    assert float(penalty().detach()) == pytest.approx(value, rel=1e-6)
    set_rows(m, [[9.0, 0.0, 0.0, 0.0]] * 3)  # far below the budget
    before = penalty.multiplier
    penalty.update()
    assert penalty.multiplier < before


def test_settling_boosts_until_the_one_best_plan_fits():
    m = mixture(budget=600)
    penalty = Penalty(m)
    set_rows(m, [[0.0, 0.0, 0.0, 1.0]] * 3)
    penalty.update()
    assert penalty.boost == 0.0
    boosts = []
    for _ in range(3):
        penalty.update(settling=True)
        boosts.append(penalty.boost)
    assert 0.0 < boosts[0] < boosts[1] - boosts[0] < boosts[2] - boosts[1]
    set_rows(m, [[1.0, 0.0, 0.0, 0.0]] * 3)
    penalty.update(settling=True)
    assert penalty.boost == 0.0


def test_hold_takes_back_only_what_grew_beyond_the_budget():
    low, high = [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]
    m = mixture()
    m.budget_n_bytes = m.choice_n_bytes({"a": 8, "b": 1, "c": 8})
    set_rows(m, [high, low, low])
    before = m.logits.detach().clone()
    set_rows(m, [low, high, low])  # a shrank, b grew too much
    m.hold(before)
    assert m.one_best() == {"a": 1, "b": 1, "c": 1}
    set_rows(m, [high, low, high])  # fits
    m.hold(before)
    assert m.one_best() == {"a": 8, "b": 1, "c": 8}
    set_rows(m, [high, high, high])
    above = m.logits.detach().clone()
    set_rows(m, [high, high, low])
    m.hold(above)  # it did not fit before: nothing is taken back
    assert m.one_best() == {"a": 8, "b": 8, "c": 1}


def test_a_budget_below_the_smallest_plan_is_refused():
    least = mixture().choice_n_bytes(dict.fromkeys("abc", 1))
    assert mixture(budget=least).one_best() == dict.fromkeys("abc", 1)
    with pytest.raises(InputError, match=f"at least {least} bytes"):
        mixture(budget=least - 1)
