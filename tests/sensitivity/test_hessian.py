"""Traces against exact Hessians and Gauss-Newton matrices of tiny LMs of the host, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from found import find_clusters, meter_of

from espnet_mpq.errors import InputError
from espnet_mpq.sensitivity.hessian import (
    FisherMeter,
    HessianMeter,
    differentiable,
    hessian_product,
)

N_TOKENS = 7
SENTENCES = ([3, 1, 5], [2, 2], [6, 4, 1, 3], [5])
LMS = {
    "lstm": ("seq_rnn", dict(unit=3, nhid=2, nlayers=2, dropout_rate=0.5)),
    "tied": ("seq_rnn", dict(unit=3, nlayers=1, rnn_type="gru", tie_weights=True)),
    "transformer": (
        "transformer",
        dict(pos_enc="sinusoidal", embed_unit=3, att_unit=4, head=2, unit=4, layer=1),
    ),
}


def make_batches(sentences=SENTENCES, batch_size=3):
    batches = []
    for first in range(0, len(sentences), batch_size):
        group = sentences[first : first + batch_size]
        inputs = torch.zeros(len(group), max(map(len, group)) + 1, dtype=torch.long)
        targets = torch.zeros_like(inputs)
        for row, ids in enumerate(group):
            inputs[row, : len(ids) + 1] = torch.tensor([N_TOKENS - 1, *ids])
            targets[row, : len(ids) + 1] = torch.tensor([*ids, N_TOKENS - 1])
        batches.append((inputs, targets, targets != 0))
    return batches


N_PREDICTED = sum(len(ids) + 1 for ids in SENTENCES)


@pytest.fixture(scope="module", params=LMS)
def lm(request, host):
    name, conf = LMS[request.param]
    torch.manual_seed(3)
    lm = host.lm_choices.get_class(name)(N_TOKENS, **conf).double()
    with torch.no_grad():
        for p in lm.parameters():
            p.copy_(torch.randn_like(p))
    return lm.eval()


def forward(lm):
    return lambda inputs: lm(inputs, None)[0]


def sentence_logits(lm):
    """One sentence at a time, nothing padded: (logits (T, V), targets (T,))."""
    for ids in SENTENCES:
        logits = lm(torch.tensor([[N_TOKENS - 1, *ids]]), None)[0][0]
        yield logits, torch.tensor([*ids, N_TOKENS - 1])


def mean_nll(lm):
    nll = [torch.nn.functional.cross_entropy(x, y, reduction="sum") for x, y in sentence_logits(lm)]
    return sum(nll) / N_PREDICTED


@torch.no_grad()
def trace_by_differences(lm, part, step=1e-4):
    """Sum of the second differences of the loss over the weights of one part: no autograd."""
    weight = dict(lm.named_parameters())[part.parameter]
    middle, total = float(mean_nll(lm)), 0.0
    for index in itertools.product(range(part.start, part.stop), range(part.cols)):
        value = float(weight[index])
        for moved in (value + step, value - step):
            weight[index] = moved
            total += (float(mean_nll(lm)) - middle) / step**2
        weight[index] = value
    return total


def exact_hessian_traces(lm, meter):
    """Cluster -> trace, from one product with every unit vector."""
    traces = dict.fromkeys((c.name for c in find_clusters(lm)), 0.0)
    for k, p in enumerate(meter.parameters):
        for index in itertools.product(*map(range, p.shape)):
            vectors = [torch.zeros_like(q) for q in meter.parameters]
            vectors[k][index] = 1.0
            forms = meter.forms(vectors)
            assert sum(value != 0 for value in forms.values()) <= 1
            for name, value in forms.items():
                traces[name] += value
    return traces


def check_samples(samples, exact):
    """The mean of the samples is the exact value within four standard errors."""
    for name, expected in exact.items():
        values = torch.tensor([s[name] for s in samples], dtype=torch.float64)
        stderr = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - expected) < 4 * stderr + 1e-12, name


def test_unit_vectors_give_the_exact_trace_and_signs_its_mean(lm):
    clusters = find_clusters(lm)
    meter = meter_of(HessianMeter, forward(lm), lm, clusters, make_batches())
    exact = exact_hessian_traces(lm, meter)
    for cluster in clusters:
        expected = sum(trace_by_differences(lm, part) for part in cluster.parts)
        assert exact[cluster.name] == pytest.approx(expected, rel=1e-4, abs=1e-5), cluster.name
    check_samples([meter.sample(k) for k in range(40)], exact)
    gaussian = meter_of(HessianMeter, forward(lm), lm, clusters, make_batches(), probe="gaussian")
    check_samples([gaussian.sample(k) for k in range(40)], exact)


def exact_gauss_newton(lm):
    """(cluster -> trace of J^T S J, the same as the mean square over labels drawn from the LM)."""
    clusters = find_clusters(lm)
    names = sorted({part.parameter for c in clusters for part in c.parts})
    parameters = [dict(lm.named_parameters())[name] for name in names]
    products = {c.name: 0.0 for c in clusters}
    drawn = dict(products)
    for logits, _ in sentence_logits(lm):
        for row in logits:
            p = torch.softmax(row, -1).detach()
            s = torch.diag(p) - torch.outer(p, p)
            by_word = [torch.autograd.grad(z, parameters, retain_graph=True) for z in row]
            for cluster in clusters:
                j = torch.stack(
                    [
                        torch.cat(
                            [
                                g[names.index(part.parameter)][part.start : part.stop].flatten()
                                for part in cluster.parts
                            ]
                        )
                        for g in by_word
                    ]
                )  # (V, weights)
                products[cluster.name] += float(torch.trace(j.T @ s @ j)) / N_PREDICTED
                labels = torch.eye(N_TOKENS, dtype=p.dtype) - p
                squares = (labels @ j).square().sum(1)
                drawn[cluster.name] += float((p * squares).sum()) / N_PREDICTED
    return products, drawn


def test_fisher_is_the_exact_gauss_newton_trace(lm):
    clusters = find_clusters(lm)
    meter = meter_of(FisherMeter, forward(lm), lm, clusters, make_batches())
    exact, drawn = exact_gauss_newton(lm)
    assert drawn == pytest.approx(exact, rel=1e-9)
    # Every word of every token once: the sum over an orthonormal basis is the trace.
    n_rows = [int(mask.sum()) for _, _, mask in make_batches()]
    total = dict.fromkeys(exact, 0.0)
    for batch, n in enumerate(n_rows):
        for token, word in itertools.product(range(n), range(N_TOKENS)):
            r = [torch.zeros(rows, N_TOKENS, dtype=torch.float64) for rows in n_rows]
            r[batch][token, word] = 1.0
            for name, value in meter.squares(r).items():
                total[name] += value
    assert total == pytest.approx(exact, rel=1e-9)
    samples = [meter.sample(k) for k in range(60)]
    assert all(value >= 0 for s in samples for value in s.values())
    check_samples(samples, exact)


def test_a_sample_depends_on_seed_and_number_only(lm):
    clusters = find_clusters(lm)
    for kind in (HessianMeter, FisherMeter):
        one = meter_of(kind, forward(lm), lm, clusters, make_batches(), seed=5)
        first = [one.sample(k) for k in range(3)]
        again = meter_of(kind, forward(lm), lm, clusters, make_batches(), seed=5)
        assert again.sample(2) == first[2]
        other = meter_of(kind, forward(lm), lm, clusters, make_batches(), seed=6).sample(2)
        assert len({s["output" if "output" in s else "embedding"] for s in (*first, other)}) == 4


def test_mode_and_gradient_flags_come_back_and_dropout_is_off(lm):
    clusters = find_clusters(lm)
    expected = meter_of(HessianMeter, forward(lm), lm, clusters, make_batches()).sample(0)
    lm.train()
    weight = next(lm.parameters())
    weight.requires_grad_(False)
    with torch.no_grad():
        found = meter_of(HessianMeter, forward(lm), lm, clusters, make_batches()).sample(0)
    assert found == expected
    assert lm.training and not weight.requires_grad and weight.grad is None
    weight.requires_grad_(True)
    lm.eval()


def test_all_signs_of_a_quadratic_give_its_trace_and_the_known_variance():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a = a + a.T
    w = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    values = []
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        z = torch.tensor(signs, dtype=torch.float64)
        (hz,) = hessian_product(0.5 * w @ a @ w + w.sum(), [w], [z])
        torch.testing.assert_close(hz, a @ z)
        values.append(float(z @ hz))
    values = torch.tensor(values, dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(float(torch.trace(a)))
    off_diagonal = a - torch.diag(torch.diag(a))
    assert float(values.var(unbiased=False)) == pytest.approx(
        2 * float(off_diagonal.square().sum())
    )
    assert hessian_product(w.sum(), [w], [z])[0].tolist() == [0.0] * 6


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "scaled_dot_product_attention"), reason="no fused attention"
)
def test_fused_attention_can_be_differentiated_twice_inside():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    module = torch.nn.Module()
    module.weight = weight
    x = torch.randn(1, 2, 16, 8)

    def product():
        q = x @ weight
        y = torch.nn.functional.scaled_dot_product_attention(q, x, x)
        return hessian_product(y.square().sum(), [weight], [torch.ones_like(weight)])[0]

    with differentiable(module, [weight]):
        assert not torch.backends.cudnn.enabled
        inside = product()
    step, moved = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step)
        q = x @ weight
        p = torch.softmax(q @ x.transpose(-1, -2) / math.sqrt(8), -1) @ x
        moved.append(torch.autograd.grad(p.square().sum(), weight)[0])
        with torch.no_grad():
            weight.sub_(sign * step)
    torch.testing.assert_close(inside, (moved[0] - moved[1]) / (2 * step), rtol=2e-2, atol=2e-2)


def test_refusals(lm):
    with pytest.raises(InputError, match="rademacher or gaussian"):
        meter_of(HessianMeter, forward(lm), lm, find_clusters(lm), make_batches(), probe="uniform")
    with pytest.raises(InputError, match="no token"):
        meter_of(FisherMeter, forward(lm), lm, find_clusters(lm), [])
