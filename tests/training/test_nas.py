"""The controller on a toy with a known answer: the sensitive cluster gets the bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from espnet_mpq.clusters import Cluster, ClusterWeights, Part
from espnet_mpq.errors import MismatchError
from espnet_mpq.search.candidates import Candidates
from espnet_mpq.search.nas import Mixture, Penalty
from espnet_mpq.search.nas_options import NasOptions
from espnet_mpq.training.nas import STATE_KEY, NasController

CLUSTERS = [Cluster(n, "output", (Part(f"{n}.weight", 0, 16, 32),)) for n in "abc"]
# The harm of c is all but nothing, that of a is large.
IMPORTANCE = {"a": 30.0, "b": 0.3, "c": 0.003}


class Toy(torch.nn.Module):
    """loss(x) = sum over clusters of importance * mean |f(W) x - W x|^2."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in "abc":
            self.add_module(name, torch.nn.Linear(32, 16, bias=False))
        self.requires_grad_(False)
        self.goal = {name: self.get_submodule(name).weight.clone() for name in "abc"}

    def loss(self, weights, x):
        terms = [
            IMPORTANCE[n] * ((weights[n][0] - self.goal[n]) @ x).square().mean() for n in "abc"
        ]
        return sum(terms)


def bytes_of(choice) -> int:
    return mixture(10**6).choice_n_bytes(dict(zip("abc", choice)))


def mixture(budget, **options) -> Mixture:
    return Mixture(CLUSTERS, NasOptions(budget_bytes=budget, **options), 1000, budget)


def start(budget, n_epochs, **options):
    toy, mix = Toy(), mixture(budget, **{"lr": 0.1, **options})
    candidates = Candidates(ClusterWeights(toy, CLUSTERS), mix.options)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.0)
    return toy, candidates, NasController(Penalty(mix), candidates, optimizer, n_epochs), optimizer


def train(toy, candidates, controller, optimizer, epochs):
    mix = controller.mixture
    for epoch in epochs:
        torch.manual_seed(100 + epoch)
        controller.start_epoch(controller.max_epoch - epoch + 1)
        mix.train()
        for _ in range(20):
            draw = mix.draw()
            weights = {n: candidates.mixed(n, draw[n], exact=True) for n in "abc"}
            toy.loss(weights, torch.randn(32, 8)).backward()
            optimizer.step()
        controller.end_epoch()


@pytest.mark.parametrize("relaxation", ["gumbel", "softmax"])
@pytest.mark.parametrize("budget_of", [(8, 2, 1), (4, 2, 1), (4, 1, 1), (8, 4, 2)])
def test_the_sensitive_cluster_gets_the_bits(budget_of, relaxation):
    budget = bytes_of(budget_of)
    toy, candidates, controller, optimizer = start(budget, 10, relaxation=relaxation)
    train(toy, candidates, controller, optimizer, range(1, 11))
    best = controller.mixture.one_best()
    assert best["a"] >= best["b"] >= best["c"] and best["a"] > best["c"]
    size = controller.mixture.choice_n_bytes(best)
    assert size <= budget
    # Of all plans that fit, none is clearly better: brute force.
    x = torch.randn(32, 4000, generator=torch.Generator().manual_seed(0))

    def loss(choice):
        weights = {n: candidates.single(n, b, exact=True) for n, b in zip("abc", choice)}
        return float(toy.loss(weights, x))

    fitting = [c for c in itertools.product((1, 2, 4, 8), repeat=3) if bytes_of(c) <= budget]
    uniform = max(b for b in (1, 2, 4, 8) if (b, b, b) in fitting)
    least, found = min(map(loss, fitting)), loss([best[n] for n in "abc"])
    assert found <= 1.5 * least
    assert found < 0.5 * loss((uniform,) * 3)


def test_a_resumed_run_ends_the_same():
    budget = bytes_of((4, 2, 1))
    whole = start(budget, 4)
    train(*whole, range(1, 5))
    half = start(budget, 4)
    train(*half, range(1, 3))
    resumed = start(budget, 4)
    saved = half[3].state_dict()
    assert set(saved[STATE_KEY]["options"]) == {"budget_bytes", "lr"}
    resumed[3].load_state_dict(saved)
    resumed[2].mixture.load_state_dict(half[2].mixture.state_dict())
    train(*resumed, range(3, 5))
    assert torch.equal(resumed[2].mixture.logits, whole[2].mixture.logits)
    assert resumed[2].stats(1.0) == whole[2].stats(1.0)
    other = start(budget + 1, 4)
    with pytest.raises(MismatchError, match="other options"):
        other[3].load_state_dict(saved)


def test_the_optimizer_leaves_the_logits_alone():
    """Their own Adam moves them by lr in the first update, whatever the optimizer is."""
    toy, candidates, controller, _ = start(bytes_of((4, 2, 1)), 3)
    logits = controller.mixture.logits
    optimizer = torch.optim.SGD([logits], lr=1e6)
    controller = NasController(Penalty(controller.mixture), candidates, optimizer, 3)
    controller.start_epoch(3)
    logits.sum().backward()
    optimizer.step()
    moved = logits.detach().abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.1), atol=1e-4) and logits.grad is None


def test_temperature_and_settling_over_the_epochs():
    *_, controller, _ = start(bytes_of((4, 2, 1)), 10, temperature=2.0, final_temperature=0.5)
    seen = []
    for left in range(10, 0, -1):
        controller.start_epoch(left)
        seen.append((controller.mixture.temperature, controller.settling))
    assert [t for t, _ in seen] == pytest.approx([2.0 * 0.25 ** (k / 9) for k in range(10)])
    assert [s for _, s in seen] == [False] * 7 + [True] * 3
