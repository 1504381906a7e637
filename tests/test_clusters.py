"""Clusters: names, gate order, slices that really move the network."""

import pytest
import torch
from test_plan import RnnLm

from espnet_mpq.clusters import find_clusters, get_mats, rest_parameters, set_mats
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
    assert "decoder.bias" in dict(rest_parameters(lm, clusters))
    set_mats(lm, clusters[0], [torch.ones(11, 5)])
    assert torch.equal(lm.decoder.weight.detach(), torch.ones(11, 5))


def test_get_mats_are_views_with_the_rows_of_the_gate():
    lm = RnnLm()
    forget = {c.name: c for c in find_clusters(lm)}["rnn.l1.f"]
    mats = get_mats(lm, forget)
    assert torch.equal(mats[0], lm.rnn.weight_ih_l1[5:10])
    assert torch.equal(mats[1], lm.rnn.weight_hh_l1[5:10])


def test_unknown_layout_is_refused():
    with pytest.raises(InputError, match="no known language model layout"):
        find_clusters(torch.nn.Linear(2, 3))
    lm = RnnLm()
    lm.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"extra\.weight"):
        find_clusters(lm)


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
    rest = rest_parameters(lm, clusters)
    total = sum(p.numel() for p in lm.parameters())
    assert sum(sizes.values()) + sum(torch.Size(s).numel() for _, s in rest) == total
