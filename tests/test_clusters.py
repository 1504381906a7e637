"""Clusters: names, gate order, slices that really move the network."""

import pytest
import torch
from found import architecture_of, find_clusters, get_mats, set_mats, weights_of
from test_plan import RnnLm

from espnet_mpq.clusters import Cluster, ClusterWeights, Part, as_matrix
from espnet_mpq.errors import InputError


def test_gate_slices_follow_pytorch_order():
    """Saturating one gate's bias-free input changes the LSTM as that gate should."""
    torch.manual_seed(0)
    lm = RnnLm(nlayers=1)
    by_name = {c.name: c for c in find_clusters(lm)}
    x = torch.randn(2, 7, 6)
    with torch.no_grad():
        for p in lm.rnn.parameters():
            p.zero_()
    # g gate alone: c = i*g = 0.5*tanh(W x), h = 0.5*tanh(c)
    g = torch.randn(5, 6)
    set_mats(lm, by_name["rnn.l0.g"], [g, torch.zeros(5, 5)])
    out, _ = lm.rnn(x[:, :1])
    expected = 0.5 * torch.tanh(0.5 * torch.tanh(x[:, 0] @ g.T))
    assert torch.allclose(out[:, 0], expected, atol=1e-6)
    # then the output gate: h = sigmoid(W x) * tanh(c)
    o = torch.randn(5, 6)
    set_mats(lm, by_name["rnn.l0.o"], [o, torch.zeros(5, 5)])
    out, _ = lm.rnn(x[:, :1])
    expected = torch.sigmoid(x[:, 0] @ o.T) * torch.tanh(0.5 * torch.tanh(x[:, 0] @ g.T))
    assert torch.allclose(out[:, 0], expected, atol=1e-6)


def test_gru_and_rnn_gate_names():
    names = [c.name for c in find_clusters(RnnLm(nlayers=1, rnn=torch.nn.GRU))]
    assert names == ["embedding", "rnn.l0.r", "rnn.l0.z", "rnn.l0.n", "output"]
    names = [c.name for c in find_clusters(RnnLm(nlayers=1, rnn=torch.nn.RNN))]
    assert names == ["embedding", "rnn.l0.h", "output"]


def test_tied_output_is_one_cluster():
    lm = RnnLm(unit=5, tie=True)
    clusters = find_clusters(lm)
    assert [c.name for c in clusters if c.kind in ("embedding", "output")] == ["embedding"]
    assert "decoder.bias" in dict(architecture_of(lm).rest())
    set_mats(lm, clusters[0], [torch.ones(11, 5)])
    assert torch.equal(lm.decoder.weight.detach(), torch.ones(11, 5))


def test_get_mats_are_views_with_the_rows_of_the_gate():
    lm = RnnLm()
    forget = {c.name: c for c in find_clusters(lm)}["rnn.l1.f"]
    mats = get_mats(lm, forget)
    assert torch.equal(mats[0], lm.rnn.weight_ih_l1[5:10])
    assert torch.equal(mats[1], lm.rnn.weight_hh_l1[5:10])


def test_a_cluster_needs_weights():
    for parts in ((), (Part("a", 3, 3, 4),), (Part("a", 0, 3, 4), Part("b", 0, 1, 0))):
        with pytest.raises(InputError, match="cluster x has no weights"):
            Cluster("x", "gate", parts)


def test_weights_follow_a_module_that_moves_and_loads():
    lm = RnnLm()
    weights = weights_of(lm)
    first = weights.mats("rnn.l0.i")
    assert weights.mats("rnn.l0.i") is first  # looked up once
    lm.load_state_dict({k: torch.ones_like(v) for k, v in lm.state_dict().items()})
    assert bool((weights.mats("rnn.l0.i")[0] == 1).all())
    lm.double()
    assert weights.mats("rnn.l0.i")[0].dtype == torch.float64
    weights.set("rnn.l0.i", [torch.full((5, 6), 2.0), torch.full((5, 5), 3.0)])
    assert bool((lm.rnn.weight_ih_l0[:5] == 2).all()) and bool((lm.rnn.weight_ih_l0[5:] == 1).all())
    lm.float()
    assert weights.mats("rnn.l0.i")[1].tolist() == [[3.0] * 5] * 5


def test_gradients_are_views_and_absent_where_a_part_has_none():
    lm = RnnLm()
    weights = weights_of(lm)
    assert weights.grads("output") is None
    lm.rnn.weight_ih_l0.grad = torch.zeros(20, 6)
    assert weights.grads("rnn.l0.f") is None  # the recurrent part has none
    lm.rnn.weight_hh_l0.grad = torch.zeros(20, 5)
    weights.grads("rnn.l0.f")[0].add_(1)
    assert float(lm.rnn.weight_ih_l0.grad.sum()) == 5 * 6


def test_a_kernel_of_a_convolution_is_a_matrix():
    conv = torch.nn.Conv2d(3, 4, (2, 5))
    cluster = Cluster("conv", "convolution", (Part.whole("weight", conv.weight.shape),))
    weights = ClusterWeights(conv, [cluster])
    assert [m.shape for m in weights.mats("conv")] == [(4, 30)]
    weights.set("conv", [torch.arange(120.0).view(4, 30)])
    assert float(conv.weight[1, 0, 0, 0].detach()) == 30
    conv.to(memory_format=torch.channels_last)
    with pytest.raises(InputError, match="not laid out row by row"):
        as_matrix(conv.weight)


def test_clusters_of_another_module_are_refused():
    clusters = find_clusters(RnnLm())
    for lm, found in ((RnnLm(nhid=9), "cluster rnn.l0.i"), (torch.nn.Linear(2, 2), "embedding")):
        with pytest.raises(InputError, match=f"{found} does not fit|cluster {found}"):
            ClusterWeights(lm, clusters)


def test_transformer_clusters_of_the_host(host):
    from espnet2.lm.transformer_lm import TransformerLM

    lm = TransformerLM(vocab_size=9, embed_unit=4, att_unit=8, head=2, unit=16, layer=2)
    clusters = find_clusters(lm)
    assert [c.name for c in clusters] == [
        "embedding",
        "blocks.0.attention",
        "blocks.0.feed_forward",
        "blocks.1.attention",
        "blocks.1.feed_forward",
        "output",
    ]
    sizes = {c.name: c.n_weights for c in clusters}
    assert sizes["blocks.0.attention"] == 4 * 8 * 8
    assert sizes["blocks.1.feed_forward"] == 2 * 8 * 16
    rest = architecture_of(lm).rest()
    total = sum(p.numel() for p in lm.parameters())
    assert sum(sizes.values()) + sum(torch.Size(s).numel() for _, s in rest) == total
