"""The stages of the host's LMs are its forward pass, and KL over them is KL over the whole LM."""

from __future__ import annotations

import pytest
import torch
from found import find_clusters, get_mats, meter_of

from espnet_mpq.plan import ClusterSpec
from espnet_mpq.sensitivity.kl import KlMeter

N_TOKENS = 13
LMS = {
    "lstm": ("seq_rnn", dict(unit=6, nhid=5, nlayers=3, dropout_rate=0.5)),
    "gru": ("seq_rnn", dict(unit=6, nlayers=2, rnn_type="gru")),
    "rnn": ("seq_rnn", dict(unit=6, nlayers=1, rnn_type="rnn_tanh")),
    "relu": ("mpq_seq_rnn", dict(unit=6, nlayers=2, rnn_type="rnn_relu")),
    "tied": ("seq_rnn", dict(unit=6, nlayers=2, tie_weights=True)),
    "sinusoidal": (
        "transformer",
        dict(pos_enc="sinusoidal", embed_unit=6, att_unit=8, head=2, unit=10, layer=3),
    ),
    "no_pos_enc": ("transformer", dict(embed_unit=4, att_unit=6, head=3, unit=7, layer=2)),
}


def make_batches():
    generator = torch.Generator().manual_seed(1)
    batches = []
    for lengths in ([9, 4, 1], [6, 6], [2]):
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        ids = torch.randint(1, N_TOKENS, (2, *mask.shape), generator=generator) * mask
        batches.append((ids[0], ids[1], mask))
    return batches


@pytest.fixture(params=LMS)
def lm(request, host):
    name, conf = LMS[request.param]
    torch.manual_seed(2)
    lm = host.lm_choices.get_class(name)(N_TOKENS, **conf)
    with torch.no_grad():
        for p in lm.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return lm.eval()


def test_stages_are_the_forward_pass(lm):
    from espnet_mpq.hosts.espnet.lm.judged import find_stages

    clusters = find_clusters(lm)
    stages = find_stages(lm, clusters)
    assert len(stages.layers) > 1 and set(stages.first) >= {c.name for c in clusters}
    for inputs, _, mask in make_batches():
        with torch.no_grad():
            expected = lm(inputs, None)[0][mask]
            logits = stages.output(stages.run(inputs, inputs)[mask])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_cluster_moves_nothing_before_its_stage(lm):
    from espnet_mpq.hosts.espnet.lm.judged import find_stages

    clusters = find_clusters(lm)
    stages = find_stages(lm, clusters)
    inputs = make_batches()[0][0]

    def activations():
        xs = [inputs]
        for layer in stages.layers:
            xs.append(layer(xs[-1], inputs))
        return [*xs, stages.output(xs[-1])]

    before = activations()
    for cluster in clusters:
        mats = get_mats(lm, cluster)
        kept = [m.clone() for m in mats]
        for m in mats:
            m.mul_(1.5)
        first = stages.first[cluster.name]
        same = [torch.equal(a, b) for a, b in zip(before, activations())]
        assert all(same[: first + 1]) and not any(same[first + 1 :]), (cluster.name, same)
        for m, value in zip(mats, kept):
            m.copy_(value)


@pytest.mark.parametrize("printed,cache_n_bytes", [(False, 1 << 30), (True, 0)])
def test_kl_is_that_of_the_whole_lm(lm, printed, cache_n_bytes):
    from espnet_mpq.hosts.espnet.lm.judged import find_stages

    clusters = find_clusters(lm)  # at least 3
    options = dict(printed_form=printed, cache_n_bytes=cache_n_bytes)
    fast = meter_of(KlMeter, find_stages(lm, clusters), lm, clusters, make_batches(), **options)
    slow = meter_of(KlMeter, lambda x: lm(x, None)[0], lm, clusters, make_batches(), **options)
    assert fast.fp_nll_nats == pytest.approx(slow.fp_nll_nats, abs=1e-6)
    # Not in order either: what is kept must be that of the stage asked for.
    for k in (0, 1, -2, -1, 2, 0):
        a, b = (meter.entry(clusters[k].name, ClusterSpec(2)) for meter in (fast, slow))
        assert a.harm == pytest.approx(b.harm, rel=1e-4, abs=1e-6)
        assert a.stderr == pytest.approx(b.stderr, rel=1e-3, abs=1e-6)
    zeros = {c.name: [torch.zeros_like(m) for m in get_mats(lm, c)] for c in clusters[1:]}
    assert fast.measure(zeros)[0] == pytest.approx(slow.measure(zeros)[0], rel=1e-5)


def test_layers_below_a_cluster_run_once(host):
    from espnet_mpq.hosts.espnet.lm.judged import find_stages
    from espnet_mpq.sensitivity.judged import Stages

    lm = host.lm_choices.get_class("seq_rnn")(N_TOKENS, unit=6, nlayers=2).eval()
    clusters = find_clusters(lm)
    stages = find_stages(lm, clusters)
    calls = []

    def counted(k):
        return lambda x, inputs: calls.append(k) or stages.layers[k](x, inputs)

    meter = meter_of(
KlMeter,
        Stages([counted(k) for k in range(3)], stages.output, stages.first),
        *(lm, clusters, make_batches()),
    )
    calls.clear()
    for cluster in clusters:
        meter.entry(cluster.name, ClusterSpec(2))
    # 3 batches; embedding 1 + 1, gates 4 of layer 0, 4 of layer 1, and one pass to keep.
    assert [calls.count(k) for k in range(3)] == [3 * 2, 3 * (1 + 4 + 1), 3 * (1 + 4 + 4 + 1)]


def test_another_forward_method_is_one_stage(host):
    from espnet_mpq.hosts.espnet.lm.judged import find_stages

    class Doubled(host.lm_choices.get_class("seq_rnn")):
        def forward(self, input, hidden):
            logits, hidden = super().forward(input, hidden)
            return 2 * logits, hidden

    lm = Doubled(N_TOKENS, unit=6, nlayers=2).eval()
    stages = find_stages(lm, find_clusters(lm))
    inputs = make_batches()[0][0]
    assert len(stages.layers) == 1
    assert torch.equal(stages.output(stages.run(inputs, inputs)), lm(inputs, None)[0])
