"""KL sensitivity against an independent computation in float64 and against hand-made cases."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from found import find_clusters, get_mats, meter_of

from espnet_mpq.errors import InputError
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.quant.distortion import relative_error
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.sensitivity.kl import KlMeter, kl

N_TOKENS = 11


class Lm(torch.nn.Module):
    """A recurrent LM with the host's parameter names and dropout that must stay off."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Embedding(N_TOKENS, 6)
        self.drop = torch.nn.Dropout(0.5)
        self.rnn = torch.nn.LSTM(6, 6, 2, batch_first=True)
        self.decoder = torch.nn.Linear(6, N_TOKENS)

    def forward(self, inputs):
        return self.decoder(self.drop(self.rnn(self.drop(self.encoder(inputs)))[0]))


@pytest.fixture
def lm():
    torch.manual_seed(0)
    lm = Lm()
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(3.0)
    return lm


def make_batches(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for group in lengths:
        shape = (len(group), max(group))
        inputs = torch.randint(1, N_TOKENS, shape, generator=generator)
        targets = torch.randint(1, N_TOKENS, shape, generator=generator)
        mask = torch.arange(shape[1])[None] < torch.tensor(group)[:, None]
        batches.append((inputs * mask, targets * mask, mask))
    return batches


BATCHES = make_batches([(5, 3, 1), (7, 2)])


def sentences_kl(lm, other, printed=False):
    """Per sentence: (sum of KL, tokens), by float64 and torch's own kl_div."""
    results = []
    lm, other = copy.deepcopy(lm).double().eval(), copy.deepcopy(other).double().eval()
    for inputs, targets, mask in BATCHES:
        for x, y, m in zip(inputs, targets, mask):
            n = int(m.sum())
            with torch.no_grad():
                p = torch.log_softmax(lm(x[None, :n])[0], -1)
                q = torch.log_softmax(other(x[None, :n])[0], -1)
            if printed:
                index = torch.arange(n)
                value = (p[index, y[:n]] - q[index, y[:n]]).sum()
            else:
                value = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
            results.append((float(value), n))
    return results


@pytest.mark.parametrize("printed", [False, True])
@pytest.mark.parametrize("cache_n_bytes", [1 << 30, 0])
@pytest.mark.parametrize("name", ["embedding", "rnn.l1.g", "output"])
def test_entry_is_the_kl_of_the_quantized_lm(lm, name, cache_n_bytes, printed):
    clusters = find_clusters(lm)
    cluster = next(c for c in clusters if c.name == name)
    meter = meter_of(
KlMeter,
        lm, lm, clusters, BATCHES, printed_form=printed, cache_n_bytes=cache_n_bytes
    )
    assert bool(meter._cache) == (cache_n_bytes > 0)
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    entry = meter.entry(name, ClusterSpec(2))
    after = lm.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert lm.training  # as it was

    other = copy.deepcopy(lm)
    values = project_cluster(get_mats(lm, cluster), ClusterSpec(2), method="mse").values
    for view, value in zip(get_mats(other, cluster), values):
        view.copy_(value)
    expected = sentences_kl(lm, other, printed)
    sums, counts = zip(*expected)
    assert entry.harm == pytest.approx(sum(sums) / 18, rel=1e-4, abs=1e-7)
    residuals = np.array(sums) - np.array(counts) * sum(sums) / 18
    stderr = math.sqrt((residuals**2).sum() * 5 / 4) / 18
    assert entry.stderr == pytest.approx(stderr, rel=1e-3)
    assert 0 < entry.relative_mse < 1


def test_joint_measure_and_fp_nll(lm):
    clusters = find_clusters(lm)
    meter = meter_of(KlMeter, lm, lm, clusters, BATCHES)
    assert meter.n_rows == 18
    lm.eval()
    with torch.no_grad():
        nll = sum(
            float(torch.nn.functional.cross_entropy(lm(x)[m], y[m], reduction="sum"))
            for x, y, m in BATCHES
        )
    assert meter.fp_nll_nats == pytest.approx(nll / 18, rel=1e-5)
    same = {c.name: get_mats(lm, c) for c in clusters}
    assert meter.measure(same) == (0.0, 0.0)
    zeros = {c.name: [torch.zeros_like(m) for m in get_mats(lm, c)] for c in clusters}
    other = copy.deepcopy(lm)
    for c in clusters:
        for view in get_mats(other, c):
            view.zero_()
    expected = sentences_kl(lm, other)
    assert meter.measure(zeros)[0] == pytest.approx(sum(s for s, _ in expected) / 18, rel=1e-4)


def test_weights_come_back_when_a_measurement_fails(lm):
    clusters = find_clusters(lm)
    calls = []

    def forward(inputs):
        calls.append(1)
        if len(calls) > len(BATCHES):
            raise KeyboardInterrupt
        return lm(inputs)

    meter = meter_of(KlMeter, forward, lm, clusters, BATCHES)
    before = lm.decoder.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        meter.measure({"output": [torch.zeros_like(before)]})
    assert torch.equal(lm.decoder.weight, before)


def test_tiny_and_huge_divergences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 2000, generator=generator).double() * 3
    moved = logits + 1e-4 * torch.randn(50, 2000, generator=generator)
    p, q = logits.log_softmax(-1), moved.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert 1e-9 < float(exact.mean()) < 1e-8
    single = kl(p.float(), q.float()).double()
    # The plain sum is off by more than its value here.
    assert torch.allclose(single, exact, rtol=0.05)
    # One token that p excludes and q is sure of, and the other way round.
    p = torch.tensor([[0.0, -200.0], [0.0, -200.0], [-200.0, 0.0]])
    q = torch.tensor([[-200.0, 0.0], [0.0, -200.0], [-0.6931472, -0.6931472]])
    assert kl(p, q).tolist() == pytest.approx([200.0, 0.0, 0.6931472], rel=1e-6)


def test_relative_error_of_zero_weights():
    assert relative_error([torch.zeros(2, 2)], [torch.zeros(2, 2)]) == 0.0
    assert relative_error([torch.tensor([[3.0, 4.0]])], [torch.tensor([[3.0, 3.0]])]) == 1 / 25


def test_refusals(lm):
    clusters = find_clusters(lm)
    with pytest.raises(InputError, match="no token"):
        meter_of(KlMeter, lm, lm, clusters, [])
    with torch.no_grad():
        lm.decoder.bias[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        meter_of(KlMeter, lm, lm, clusters, BATCHES)
