"""Weights at candidate bit-widths: values, gradients, and nothing stale."""

from __future__ import annotations

import pytest
import torch

from espnet_mpq.clusters import Cluster, ClusterWeights, Part
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.search.candidates import Candidates
from espnet_mpq.search.nas_options import NasOptions

CLUSTER = Cluster("x", "gate", (Part("a.weight", 2, 6, 9), Part("b.weight", 0, 3, 5)))
SPECS = [{}, dict(grid="paper", tying="group", group_size=4), dict(tying="cluster")]


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {"a": torch.nn.Linear(9, 8, bias=False), "b": torch.nn.Linear(5, 3, bias=False)}
    )


def mats_of(lm):
    return [lm["a"].weight[2:6], lm["b"].weight]


def make(lm, **spec):
    options = NasOptions(budget=9.0, bits=(1, 2, 4, 8, 16), **spec)
    return Candidates(ClusterWeights(lm, [CLUSTER]), options)


@pytest.mark.parametrize("spec", SPECS)
def test_single_values_are_projections_and_gradients_the_identity(lm, spec):
    candidates = make(lm, **spec)
    for bits in candidates.bits:
        got = candidates.single("x", bits, exact=True)
        want = project_cluster([m.detach() for m in mats_of(lm)], candidates.specs[bits]).values
        assert all(torch.equal(g, w) for g, w in zip(got, want))
        sum((g * g.detach().cos()).sum() for g in got).backward()
        assert torch.equal(lm["a"].weight.grad[2:6], want[0].cos())
        assert not lm["a"].weight.grad[:2].any()
        lm.zero_grad(set_to_none=True)


@pytest.mark.parametrize("exact", [True, False])
def test_mixed_values_and_both_gradients(lm, exact):
    candidates = make(lm)
    p = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], requires_grad=True)
    got = candidates.mixed("x", p, exact)
    single = [candidates.single("x", bits, exact) for bits in candidates.bits]
    for k in range(2):
        want = sum(float(q) * s[k].detach() for q, s in zip(p, single))
        torch.testing.assert_close(got[k].detach(), want)
    upstream = [torch.randn_like(g) for g in got]
    torch.autograd.backward(got, upstream)
    inner = [sum(float((u * m).sum()) for u, m in zip(upstream, s)) for s in single]
    torch.testing.assert_close(p.grad, torch.tensor(inner))
    torch.testing.assert_close(lm["b"].weight.grad, upstream[1])


def test_scales_are_kept_while_the_weights_move_and_renewed_on_request(lm):
    candidates = make(lm)
    candidates.refresh()
    before = candidates.single("x", 4, exact=False)[1].detach()
    levels = before.unique().numel()
    with torch.no_grad():
        lm["b"].weight.mul_(64.0)  # a power of two: float16 scales follow exactly
    clipped = candidates.single("x", 4, exact=False)[1].detach()
    # The largest levels at the old scales, far from the weights.
    assert float(clipped.abs().max()) < 3 * float(before.abs().max()) and levels > 4
    candidates.refresh()
    torch.testing.assert_close(candidates.single("x", 4, exact=False)[1], 64.0 * before)


def test_exact_values_follow_every_change(lm):
    candidates = make(lm)
    p = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    for change in (lambda w: w.neg_(), lambda w: w.copy_(torch.randn_like(w))):
        with torch.no_grad():
            old = candidates.single("x", 2, exact=True)
            candidates.mixed("x", p, exact=True)
            change(lm["a"].weight)
            want = project_cluster(mats_of(lm), candidates.specs[2]).values
            for got in (candidates.single("x", 2, True), candidates.mixed("x", p, True)):
                assert torch.equal(got[0], want[0]) and not torch.equal(got[0], old[0])
    kept = candidates.single("x", 2, exact=True)
    lm.double()
    assert candidates.single("x", 2, exact=True)[0].dtype == torch.float64 != kept[0].dtype


def test_zero_rows_stay_zero(lm):
    with torch.no_grad():
        lm["b"].weight[1] = 0.0
    for exact in (True, False):
        assert not make(lm).single("x", 2, exact)[1][1].any()
