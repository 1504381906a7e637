"""Finishing phase: codes frozen, gradient of the scales, the rest goes on."""

import copy

import pytest
import torch
from found import find_clusters, get_mats, weights_of

from espnet_mpq.plan import ClusterSpec, Plan, uniform_plan
from espnet_mpq.training.admm import AdmmController
from espnet_mpq.training.finishing import Finishing
from espnet_mpq.training.on_grid import project
from espnet_mpq.training.options import AdmmOptions


def table_of(lm, **spec):
    clusters = find_clusters(lm)
    plan = uniform_plan(clusters, 2, **spec)
    return project({c.name: get_mats(lm, c) for c in clusters}, plan)


@pytest.mark.parametrize("tying", ["row", "group", "cluster", "model"])
def test_first_adam_step_moves_every_scale_against_its_gradient(small_rnn, tying):
    table = table_of(small_rnn(), tying=tying, group_size=3 if tying == "group" else None)
    finishing = Finishing(table, lr=0.1)
    generator = torch.Generator().manual_seed(5)
    gradients = {
        n: [torch.randn(c.shape, generator=generator) for c in codes]
        for n, codes in table.codes.items()
    }
    # dF/d log α = sum of dF/dW * W over the weights that share α; Adam's first step is its sign.
    downhill = {n: [-(g * w) for g, w in zip(gradients[n], table.values(n))] for n in gradients}
    finishing.step(gradients)
    moved = finishing.current()
    for name in gradients:
        for part, scale in enumerate(table.scales[name]):
            slope = downhill[name][part]
            if tying == "row":
                sign = slope.sum(1, keepdim=True).sign()
            elif tying == "group":
                sign = torch.stack([s.sum(1) for s in slope.split(3, dim=1)], 1).sign()
            elif tying == "cluster":
                sign = sum(s.sum() for s in downhill[name]).sign()
            else:
                sign = sum(s.sum() for parts in downhill.values() for s in parts).sign()
            expected = scale * torch.exp(0.1 * sign)
            torch.testing.assert_close(moved.scales[name][part], expected, rtol=1e-3, atol=1e-7)
            assert torch.equal(moved.codes[name][part], table.codes[name][part])
            rounded = moved.scales[name][part].half().float()
            assert torch.equal(moved.scales[name][part], rounded)


def test_a_plan_without_codes_trains_as_the_optimizer_alone(small_rnn, cross_entropy):
    """16 or 32 bits for all: no scales; 32 bits: the same weights as without ADMM."""
    lm, plain = small_rnn(), small_rnn()
    plan = uniform_plan(find_clusters(lm), 32)
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    controller = AdmmController(weights_of(lm), plan, optimizer, AdmmOptions(finish_epochs=1))
    alone = torch.optim.SGD(plain.parameters(), lr=0.1)
    for n_epochs_left in (2, 1):
        controller.start_epoch(n_epochs_left)
        for model, optim in ((lm, optimizer), (plain, alone)):
            for _ in range(3):
                optim.zero_grad()
                cross_entropy(model).backward()
                optim.step()
        controller.end_epoch()
    for (name, ours), theirs in zip(lm.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_zero_scale_stays_zero(small_rnn):
    lm = small_rnn()
    with torch.no_grad():
        lm.decoder.weight[3] = 0.0
    table = table_of(lm)
    assert float(table.scales["output"][0][3]) == 0.0
    finishing = Finishing(table, lr=0.1)
    for _ in range(3):
        finishing.step({n: [torch.randn(c.shape) for c in cs] for n, cs in table.codes.items()})
    values = finishing.current().values("output")[0]
    assert float(values[3].abs().max()) == 0.0 and bool(torch.isfinite(values).all())


def test_finishing_in_a_run_tunes_scales_and_rest_and_freezes_codes(small_rnn, cross_entropy):
    lm = small_rnn()
    specs = {c.name: ClusterSpec(2) for c in find_clusters(lm)}
    specs["rnn.l0.g"] = ClusterSpec(32)
    optimizer = torch.optim.Adam(lm.parameters(), lr=0.01)
    options = AdmmOptions(finish_epochs=1, finish_lr=0.01)
    controller = AdmmController(weights_of(lm), Plan(specs), optimizer, options)
    controller.start_epoch(1)
    codes = {n: [c.clone() for c in cs] for n, cs in controller.finishing.table.codes.items()}
    start = {n: p.detach().clone() for n, p in lm.named_parameters()}
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = cross_entropy(lm)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        table = controller.finishing.current()
        for name in controller.coded:
            mats = get_mats(lm, controller.weights.clusters[name])
            for mat, value in zip(mats, table.values(name)):
                assert torch.equal(mat, value)
    controller.end_epoch()
    assert losses[-1] < losses[0] - 0.05
    for name in controller.coded:
        assert all(
            torch.equal(a, b) for a, b in zip(controller.finishing.table.codes[name], codes[name])
        )
    assert not torch.equal(lm.decoder.bias, start["decoder.bias"])
    # A float gate in a stacked matrix goes on training beside its frozen neighbours.
    assert not torch.equal(lm.rnn.weight_hh_l0[16:24], start["rnn.weight_hh_l0"][16:24])
    ratio = lm.rnn.weight_hh_l0[:8].detach() / start["rnn.weight_hh_l0"][:8]
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5, atol=0)
    assert controller.residuals == {"primal": 0.0, "dual": 0.0}


def test_a_prolonged_run_trains_the_codes_again(small_rnn, cross_entropy, caplog):
    """As if --max_epoch was raised after the last epoch: through a checkpoint, back to ADMM."""

    def make():
        lm = small_rnn()
        specs = {c.name: ClusterSpec(2) for c in find_clusters(lm)}
        optimizer = torch.optim.SGD(lm.parameters(), lr=0.5)
        options = AdmmOptions(gamma=0.01, dual_period=2, finish_epochs=1)
        controller = AdmmController(weights_of(lm), Plan(specs), optimizer, options)
        controller.gamma = 0.8  # as after some epochs
        return lm, optimizer, controller

    def epoch(lm, optimizer, controller, n_epochs_left, n_updates=20):
        controller.start_epoch(n_epochs_left)
        for _ in range(n_updates):
            optimizer.zero_grad()
            cross_entropy(lm).backward()
            optimizer.step()
        controller.end_epoch()

    lm, optimizer, controller = make()
    epoch(lm, optimizer, controller, 1)
    finished = controller.finishing.current()
    weights, state = copy.deepcopy(lm.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert not caplog.records

    lm, optimizer, controller = make()
    lm.load_state_dict(weights)
    optimizer.load_state_dict(state)
    controller.start_epoch(3)
    assert controller.finishing is None and "trained again" in caplog.text
    assert controller.gamma == pytest.approx(0.8 / 4**2)  # two epochs of ADMM, and it is back
    for name in controller.coded:
        for part, value in enumerate(finished.values(name)):
            assert torch.equal(controller.table.values(name)[part], value)
            assert torch.equal(controller.goal[name][part], value)
            assert float(controller.dual[name][part].abs().max()) == 0.0
    epoch(lm, optimizer, controller, 3)
    epoch(lm, optimizer, controller, 2)
    assert controller.residuals["primal"] > 0.0
    changed = [
        not torch.equal(new, old)
        for name in controller.coded
        for new, old in zip(controller.table.codes[name], finished.codes[name])
    ]
    assert any(changed)
    epoch(lm, optimizer, controller, 1)  # and it finishes once more
    assert controller.finishing is not None and len(caplog.records) == 1
