"""Rounding of whole models: what enters every matrix, order, biases, embeddings, real LMs."""

from __future__ import annotations

import pytest
import torch
from found import find_clusters, get_mats
from rounding_models import N_TOKENS, Attention, Recurrent, judged_of, make_batches

from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.plan import ClusterSpec, Plan, uniform_plan
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.rounding.embedding import embedding_covariance
from espnet_mpq.rounding.inputs import Owners
from espnet_mpq.rounding.model import Rounder
from espnet_mpq.sensitivity.judged import Judged

BATCHES = make_batches()


def scaled(model, factor=3.0, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_().mul_(factor / p.shape[-1])
    return model


def rounder_of(model, clusters=None, batches=BATCHES):
    clusters = clusters or find_clusters(model)
    return Rounder(judged_of(model, batches), ClusterWeights(model, clusters)), clusters


def lstm_inputs(model, k, embedding=None):
    """Rows [x, h of the position before] of layer k, position by position with LSTMCell."""
    width, rows = model.rnn.hidden_size, []
    cells = []
    for layer in range(k + 1):
        cell = torch.nn.LSTMCell(width, width)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, name).data = getattr(model.rnn, f"{name}_l{layer}").data
        cells.append(cell)
    for batch in BATCHES:
        ids, mask = batch.inputs, batch.mask
        states = [(torch.zeros(len(ids), width), torch.zeros(len(ids), width)) for _ in cells]
        for t in range(ids.shape[1]):
            x = model.encoder.weight[ids[:, t]]
            for layer, cell in enumerate(cells):
                if layer == k:
                    rows.append(torch.cat([x, states[layer][0]], 1)[mask[:, t]])
                states[layer] = cell(x, states[layer])
                x = states[layer][0]
    return torch.cat(rows).double().detach()


def test_the_second_layer_is_rounded_with_what_the_rounded_first_gives_it():
    model = scaled(Recurrent())
    rounder, clusters = rounder_of(model)
    plan = uniform_plan(clusters, 1)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    rounded = rounder.round_all(plan)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    # The model as it is when the turn of layer 1 has come: all before it rounded, biases too.
    for cluster in clusters[:5]:
        ClusterWeights(model, clusters).set(cluster.name, rounded.mats[cluster.name])
    model.rnn.bias_ih_l0.data = rounded.biases["rnn.bias_ih_l0"]
    x, f = lstm_inputs(model, 1), lstm_inputs(scaled(Recurrent()), 1)
    w, q = (
        torch.cat(m, 1).double() for m in (get_mats(model, clusters[6]), rounded.mats["rnn.l1.f"])
    )
    # Weights that make of x nearly what w makes of f: a ridge regression towards w.
    xc, fc, n = x - x.mean(0), f - f.mean(0), len(x) ** 0.5
    ridge = (0.03 * xc.var(0, unbiased=False).mean()).sqrt() * torch.eye(16, dtype=torch.float64)
    goals = torch.cat([fc @ w.T / n, ridge @ w.T])
    moved = torch.linalg.lstsq(torch.cat([xc / n, ridge]), goals).solution.T
    errors = (xc @ (moved - q).T / n).square().sum()
    assert float(errors) == pytest.approx(rounded.errors["rnn.l1.f"][0], rel=1e-4)
    change = rounded.biases["rnn.bias_ih_l1"] - before["rnn.bias_ih_l1"]
    shift = w @ f.mean(0) - q @ x.mean(0)
    torch.testing.assert_close(change[8:16].double(), shift, rtol=1e-4, atol=1e-6)


def test_one_cluster_is_rounded_with_float_inputs_whatever_was_asked_before():
    model = scaled(Recurrent())
    rounder, clusters = rounder_of(model)
    spec = ClusterSpec(2)
    late = rounder.round_one("rnn.l1.o", spec)
    early = rounder.round_one("embedding", spec)
    fresh, _ = rounder_of(model)
    assert torch.equal(
        fresh.round_one("embedding", spec).mats["embedding"][0], early.mats["embedding"][0]
    )
    again = fresh.round_one("rnn.l1.o", spec)
    assert torch.equal(again.mats["rnn.l1.o"][1], late.mats["rnn.l1.o"][1])
    assert list(late.biases) == ["rnn.bias_ih_l1"]
    changed = (late.biases["rnn.bias_ih_l1"] != model.rnn.bias_ih_l1).nonzero()[:, 0]
    assert changed.tolist() == list(range(24, 32))


def test_errors_are_never_above_those_of_plain_rounding():
    for model in (
        scaled(Recurrent()),
        scaled(Recurrent(torch.nn.GRU)),
        scaled(Recurrent(tied=True)),
    ):
        rounder, clusters = rounder_of(model)
        for tying, group in (("row", None), ("group", 3), ("cluster", None), ("model", None)):
            errors = rounder.round_all(
                uniform_plan(clusters, 2, tying=tying, group_size=group)
            ).errors
            assert set(errors) == {cluster.name for cluster in clusters}
            assert all(ours <= plain * (1 + 1e-6) for ours, plain in errors.values())
            assert sum(ours for ours, _ in errors.values()) < 0.8 * sum(
                p for _, p in errors.values()
            )


def test_rounded_weights_are_packed_as_they_are():
    model = scaled(Attention())
    rounder, clusters = rounder_of(model, model.clusters())
    specs = [("row", None), ("group", 4), ("cluster", None), ("model", None)]
    for bits in (1, 2, 4):
        for tying, group in specs:
            plan = uniform_plan(clusters, bits, tying=tying, group_size=group)
            rounded = rounder.round_all(plan)
            mats = [mat for c in clusters for mat in rounded.mats[c.name]]
            groups = [mats] if tying == "model" else [rounded.mats[c.name] for c in clusters]
            for parts in groups:
                for value, packed in zip(
                    parts, project_cluster(parts, plan.clusters["output"]).values
                ):
                    assert torch.equal(value, packed)


def test_inputs_of_a_sublayer_in_the_order_of_use():
    model = scaled(Attention())
    rounder, _ = rounder_of(model, model.clusters())
    xs = [batch.inputs for batch in BATCHES]
    found = rounder.inputs(0, xs)
    assert [(i.kind, i.uses) for i in found] == [
        ("embedding", (("embed.weight",),)),
        ("linear", (("front.weight",),)),
    ]
    xs = [model.front(model.embed(x)) for x in xs]
    found = rounder.inputs(1, xs)
    assert [i.uses for i in found] == [
        (("q.weight",), ("k.weight",), ("v.weight",)),
        (("out.weight",),),
    ]
    moments = rounder.measure(1, found[0], xs)
    assert moments.correction(centred=True) is None
    rows = torch.cat([batch.rows(x) for x, batch in zip(xs, BATCHES)]).double()
    assert moments.n == len(rows) == rounder.judged.n_rows
    torch.testing.assert_close(
        moments.covariance(centred=True), rows.T.cov(correction=0), rtol=1e-4, atol=1e-6
    )


def test_16_and_32_bits_stay_float():
    model = scaled(Attention())
    rounder, clusters = rounder_of(model, model.clusters())
    plan = Plan(
        {"embedding": ClusterSpec(32), "attention": ClusterSpec(16), "output": ClusterSpec(2)}
    )
    rounded = rounder.round_all(plan)
    assert torch.equal(rounded.mats["embedding"][0], model.embed.weight)
    assert torch.equal(rounded.mats["attention"][3], model.out.weight.half().float())
    assert rounded.errors["output"][0] < rounded.errors["output"][1]


def test_embeddings_are_weighed_by_the_curvature_of_the_loss():
    """For logits W e the mean curvature is known: W' (diag p - p p') W, over the tokens read."""

    class Direct(Attention):
        def stages(self):
            stages = super().stages()
            stages.layers[:] = [lambda x, ids: self.embed(x)]
            return stages

    model = scaled(Direct(width=6))
    batches = make_batches(n_batches=40, n_sentences=60)
    found = embedding_covariance(judged_of(model, batches), Owners(model), "embed.weight")
    w, expected, n = model.decoder.weight.double(), 0.0, 0
    for batch in batches:
        p = batch.rows(model.decoder(model.embed(batch.inputs))).double().softmax(-1)
        expected = expected + w.T @ (torch.diag(p.sum(0)) - p.T @ p) @ w
        n += len(p)
    expected = (expected / n).detach()
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_a_tied_matrix_is_rounded_once_for_both_its_uses():
    model = scaled(Recurrent(tied=True))
    rounder, clusters = rounder_of(model)
    assert [c.name for c in clusters][-1] != "output"
    rounded = rounder.round_one("embedding", ClusterSpec(1))
    assert list(rounded.biases) == ["decoder.bias"]
    hidden = []
    with torch.no_grad():
        ClusterWeights(model, clusters).set("embedding", rounded.mats["embedding"])
        for batch in BATCHES:
            hidden.append(batch.rows(model.rnn(model.encoder(batch.inputs))[0]))
    fp = scaled(Recurrent(tied=True))
    shift = (fp.encoder.weight - rounded.mats["embedding"][0]) @ torch.cat(hidden).mean(0)
    torch.testing.assert_close(
        rounded.biases["decoder.bias"], fp.decoder.bias + shift, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["lstm", "tied", "gru", "transformer"])
def test_lms_of_the_host_are_taken_as_stages(host, kind):
    from espnet_mpq.hosts.espnet.lm.judged import find_stages

    torch.manual_seed(0)
    if kind == "transformer":
        lm = host.lm_choices.get_class("transformer")(
            N_TOKENS, embed_unit=8, att_unit=16, head=2, unit=24, layer=2
        )
    else:
        conf = {"tie_weights": kind == "tied", "rnn_type": "gru" if kind == "gru" else "lstm"}
        lm = host.lm_choices.get_class("seq_rnn")(
            N_TOKENS, unit=16, nlayers=2, dropout_rate=0.5, **conf
        )
    clusters = find_clusters(lm)
    judged = Judged.of(lm, find_stages(lm, clusters), BATCHES)
    rounder = Rounder(judged, ClusterWeights(lm, clusters))
    first = rounder.round_all(uniform_plan(clusters, 2))
    second = rounder.round_all(uniform_plan(clusters, 2))
    assert set(first.errors) == {cluster.name for cluster in clusters}
    for cluster in clusters:
        ours, plain = first.errors[cluster.name]
        assert ours < plain
        for a, b in zip(first.mats[cluster.name], second.mats[cluster.name]):
            assert torch.equal(a, b)
