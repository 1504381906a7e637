"""The three ADMM steps against closed forms and autograd; the swap of weights."""

import pytest
import torch
from admm_runs import all_mats, assert_on_grid, start, zero_gradients
from found import find_clusters

from espnet_mpq.plan import ClusterSpec, Plan, uniform_plan
from espnet_mpq.quant.fake_quant import project_cluster


@pytest.mark.parametrize("tying", ["row", "cluster", "model", "group"])
def test_step_1_adds_the_gradient_of_the_augmented_lagrangian(small_rnn, cross_entropy, tying):
    lm = small_rnn()
    group = 3 if tying == "group" else None
    plan = uniform_plan(find_clusters(lm), 2, tying=tying, group_size=group)
    controller, optimizer = start(lm, plan, gamma=0.3)
    for name in controller.coded:
        for dual in controller.dual[name]:
            dual.normal_(std=0.1)
    controller._set_goal({n: controller.table.values(n) for n in controller.coded})
    before = {n: p.detach().clone() for n, p in lm.named_parameters()}

    parameters = dict(lm.named_parameters())
    penalty = sum(
        (parameters[p.parameter][p.start : p.stop] - q + u).square().sum()
        for name, cluster in controller.weights.clusters.items()
        for p, q, u in zip(cluster.parts, controller.table.values(name), controller.dual[name])
    )
    lagrangian = cross_entropy(lm) + 0.3 / 2 * penalty
    expected = dict(zip(parameters, torch.autograd.grad(lagrangian, list(parameters.values()))))

    cross_entropy(lm).backward()
    optimizer.step()
    for name, p in lm.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * expected[name])


@pytest.mark.parametrize("method", ["mse", "als"])
def test_steps_2_and_3_project_weights_plus_dual_then_add_the_difference(small_rnn, method):
    lm = small_rnn()
    controller, optimizer = start(lm, dual_period=2, projection=method, als_rounds=7)
    spec = ClusterSpec(2)
    first = {n: project_cluster(m, spec) for n, m in all_mats(controller).items()}
    for name, found in first.items():
        for mine, value in zip(controller.table.values(name), found.values):
            assert torch.equal(mine, value)

    def update(table, dual):
        """By hand: two penalty-only SGD steps, then projection and dual."""
        weights = all_mats(controller)
        for _ in range(2):
            zero_gradients(lm)
            optimizer.step()
            for n in weights:
                weights[n] = [
                    w - 0.1 * 1e-3 * (w - q + u)
                    for w, q, u in zip(weights[n], table[n].values, dual[n])
                ]
        for n, mats in weights.items():
            together = [w + u for w, u in zip(mats, dual[n])]
            table[n] = project_cluster(
                together, spec, method=method, init=table[n].scales, rounds=7
            )
            dual[n] = [u + w - q for w, q, u in zip(mats, table[n].values, dual[n])]
        return table, dual

    table, dual = (
        dict(first),
        {n: [torch.zeros_like(w) for w in m] for n, m in all_mats(controller).items()},
    )
    for _ in range(2):
        table, dual = update(table, dual)
    assert controller.n_updates == 4
    for name in controller.coded:
        for mine, right in zip(controller.table.values(name), table[name].values):
            torch.testing.assert_close(mine, right, rtol=2e-3, atol=1e-6)
        for mine, right in zip(controller.dual[name], dual[name]):
            torch.testing.assert_close(mine, right, rtol=2e-3, atol=1e-5)


def test_dual_update_once_per_epoch_with_period_0(small_rnn):
    lm = small_rnn()
    controller, optimizer = start(lm)
    for _ in range(3):
        zero_gradients(lm)
        optimizer.step()
    assert all(float(u.abs().max()) == 0 for us in controller.dual.values() for u in us)
    weights = controller._coded_weights()
    values = {n: controller.table.values(n) for n in controller.coded}
    kept = {n: [w.clone() for w in m] for n, m in weights.items()}
    controller.end_epoch()
    for name in controller.coded:  # the first dual is the quantization error itself
        for dual, w, q in zip(controller.dual[name], kept[name], controller.table.values(name)):
            torch.testing.assert_close(dual, w - q)
    numerator = sum(
        (w - q).square().sum() for n in values for w, q in zip(kept[n], controller.table.values(n))
    )
    denominator = sum(w.square().sum() for n in values for w in kept[n])
    assert controller.residuals["primal"] == pytest.approx(float((numerator / denominator) ** 0.5))
    assert 0.2 < controller.residuals["primal"] < 0.5  # 2 bits: about sqrt(0.12)


def test_extragradient_is_taken_at_the_probe_and_applied_at_the_origin(small_rnn):
    lm = small_rnn()
    lr, gamma, eta1 = 0.5, 0.2, 0.3
    optimizer = torch.optim.SGD(lm.parameters(), lr=lr)
    controller, _ = start(lm, optimizer=optimizer, extragradient=True, eta1=eta1, gamma=gamma)
    goals = {n: torch.randn_like(p) for n, p in lm.named_parameters()}

    def gradient():  # F = 1/2 sum of c ||p - goal||^2 with c = 2
        for n, p in lm.named_parameters():
            add = 2 * (p.detach() - goals[n])
            p.grad = add if p.grad is None else p.grad + add

    controller.gradient_at = gradient
    before = {n: p.detach().clone() for n, p in lm.named_parameters()}
    table = {}
    for name, cluster in controller.weights.clusters.items():
        for part, q in zip(cluster.parts, controller.table.values(name)):
            table.setdefault(part.parameter, torch.zeros_like(before[part.parameter]))
            table[part.parameter][part.start : part.stop] = q
    gradient()
    optimizer.step()
    for name, p in lm.named_parameters():

        def slope(w, name=name):
            pull = gamma * (w - table[name]) if name in table else 0.0
            return 2 * (w - goals[name]) + pull

        w = before[name]
        torch.testing.assert_close(p.detach(), w - lr * slope(w - eta1 * slope(w)))


def test_extragradient_falls_back_when_the_probe_is_not_finite(small_rnn):
    lm = small_rnn()
    controller, optimizer = start(lm, extragradient=True)
    before = {n: p.detach().clone() for n, p in lm.named_parameters()}

    def broken():
        for p in lm.parameters():
            p.grad.fill_(float("nan"))

    controller.gradient_at = broken
    for p in lm.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(lm.decoder.bias.detach(), before["decoder.bias"] - 0.1)
    assert all(bool(torch.isfinite(p).all()) for p in lm.parameters())


def test_growing_gamma_keeps_the_true_multiplier(small_rnn):
    lm = small_rnn()
    controller, optimizer = start(
        lm, gamma=0.01, gamma_schedule="growing", gamma_growth=4.0, gamma_max=0.1
    )
    gammas, multipliers = [controller.gamma], []
    for _ in range(3):
        controller.start_epoch(9)
        zero_gradients(lm)
        optimizer.step()
        controller._update_table_and_dual()
        multiplier = controller.gamma * controller.dual["output"][0]
        controller._grow_gamma()
        torch.testing.assert_close(controller.gamma * controller.dual["output"][0], multiplier)
        goal = controller.table.values("output")[0] - controller.dual["output"][0]
        torch.testing.assert_close(controller.goal["output"][0], goal)
        gammas.append(controller.gamma)
        multipliers.append(multiplier)
    assert gammas == pytest.approx([0.01, 0.04, 0.1, 0.1])
    assert float(multipliers[-1].abs().max()) > 0


@pytest.mark.parametrize("tie_weights", [False, True])
def test_epoch_end_shows_the_projected_model_and_start_brings_theta_back(small_rnn, tie_weights):
    lm = small_rnn(tie_weights)
    plan = uniform_plan(find_clusters(lm), 2)
    controller, optimizer = start(lm, plan)
    zero_gradients(lm)
    optimizer.step()
    theta = {n: p.detach().clone() for n, p in lm.named_parameters()}
    controller.end_epoch()
    assert_on_grid(lm, plan)
    projected = {n: p.detach().clone() for n, p in lm.named_parameters()}
    assert not torch.equal(
        projected["decoder.weight" if not tie_weights else "encoder.weight"],
        theta["decoder.weight" if not tie_weights else "encoder.weight"],
    )
    for cluster in find_clusters(lm):
        part = cluster.parts[0]
        nearest = project_cluster([theta[part.parameter][part.start : part.stop]], ClusterSpec(2))
        got = projected[part.parameter][part.start : part.stop]
        assert torch.equal(got, nearest.values[0])
    controller.project_weights()  # twice is once
    controller.start_epoch(9)
    for n, p in lm.named_parameters():
        assert torch.equal(p.detach(), theta[n])


@pytest.mark.parametrize(
    "saved, primal, is_table",
    [("table", 0.3, True), ("weights", 0.1, False), ("auto", 0.3, False), ("auto", 0.1, True)],
)
def test_what_is_saved(small_rnn, saved, primal, is_table):
    lm = small_rnn()
    controller, _ = start(lm, saved=saved)
    controller.dual["output"][0].add_(0.3)  # so that the table is not the nearest grid point
    controller._update_table_and_dual()
    table = {n: controller.table.values(n) for n in controller.coded}
    nearest = {
        n: project_cluster(m, ClusterSpec(2)).values for n, m in all_mats(controller).items()
    }
    assert not torch.equal(table["output"][0], nearest["output"][0])
    controller.residuals["primal"] = primal
    controller.project_weights()
    right = table if is_table else nearest
    for name, mats in all_mats(controller).items():
        assert all(torch.equal(mat, value) for mat, value in zip(mats, right[name]))


def test_float_clusters_train_freely_and_16_bits_round_only_when_stored(small_rnn):
    lm = small_rnn()
    clusters = {c.name: ClusterSpec(2) for c in find_clusters(lm)}
    clusters["rnn.l0.f"], clusters["output"] = ClusterSpec(32), ClusterSpec(16)
    controller, optimizer = start(lm, Plan(clusters), gamma=0.9)
    before = {n: p.detach().clone() for n, p in lm.named_parameters()}
    zero_gradients(lm)
    optimizer.step()
    assert torch.equal(lm.decoder.weight, before["decoder.weight"])
    assert torch.equal(lm.rnn.weight_hh_l0[8:16], before["rnn.weight_hh_l0"][8:16])
    assert not torch.equal(lm.rnn.weight_hh_l0[:8], before["rnn.weight_hh_l0"][:8])
    controller.end_epoch()
    assert torch.equal(lm.decoder.weight, before["decoder.weight"].half().float())
    assert torch.equal(lm.rnn.weight_hh_l0[8:16], before["rnn.weight_hh_l0"][8:16])
    controller.start_epoch(9)
    assert torch.equal(lm.decoder.weight, before["decoder.weight"])


def test_frozen_parameters_stay(small_rnn, cross_entropy):
    lm = small_rnn()
    lm.encoder.weight.requires_grad_(False)
    before = lm.encoder.weight.detach().clone()
    controller, optimizer = start(lm, finish_epochs=1)
    for left in (2, 1):
        controller.start_epoch(left)
        optimizer.zero_grad()
        cross_entropy(lm).backward()
        optimizer.step()
        if left == 2:
            assert torch.equal(lm.encoder.weight, before)
        controller.end_epoch()
    assert_on_grid(lm, controller.plan)
