"""Packed LMs on the kernels: perplexity, beam search and fallbacks against float activations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from found import pack_lm

from espnet_mpq.plan import ClusterSpec
from espnet_mpq.runtime import kernel_forms
from espnet_mpq.runtime.rnn_lm import PackedRnn

from packed_models import FloatRnn, architecture, packed_model, random_weights, tokens, uniform  # isort: skip

ARCH = architecture("lstm", 30, 24, 32, 2)


def runtime_of(arch, packed):
    runtime = PackedRnn(arch, packed.plan)
    runtime.load(packed)
    return runtime


@pytest.fixture(scope="module")
def text(tiny_text):
    """Character ids (60, T) of a small text, padded with 0, with the inputs' targets."""
    alphabet = sorted(set("".join(tiny_text)))
    rows = [torch.tensor([1 + alphabet.index(c) for c in line]) for line in tiny_text]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    start = torch.full((len(rows), 1), 29)
    return torch.cat([start, ids[:, :-1]], dim=1), ids


@pytest.fixture(scope="module")
def trained(text):
    """A float LM that has learnt the text: name -> weights."""
    arch = architecture("lstm", 30, 48, 96, 2)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    model = FloatRnn(arch, random_weights(arch))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1.0 if "encoder" in name else 0.25)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, targets = text
    for _ in range(60):
        hidden, _ = model.rnn(model.encoder(inputs))
        loss = torch.nn.functional.cross_entropy(
            model.decoder(hidden).flatten(0, 1), targets.flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.random.set_rng_state(state)
    assert float(loss.detach()) < 1.0
    return arch, {name: p.detach().clone() for name, p in model.named_parameters()}


def nll_nats(runtime, text) -> float:
    inputs, targets = text
    logits, _ = runtime.logits(inputs)
    return float(
        torch.nn.functional.cross_entropy(
            logits.double().flatten(0, 1), targets.flatten(), ignore_index=0
        )
    )


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8))
@pytest.mark.parametrize("grid", ("uniform", "paper"))
def test_perplexity_is_within_a_thousandth_of_float_activations(
    kernels, trained, text, monkeypatch, bits, grid
):
    arch, weights = trained
    packed = pack_lm(weights, arch, uniform(arch, ClusterSpec(bits, grid)), tokens(30))
    runtime = runtime_of(arch, packed)
    found = {}
    for path in (*kernels, "reference"):
        monkeypatch.setenv("MPQ_KERNEL", path)
        assert runtime.kernel() == path
        found[path] = nll_nats(runtime, text)
    assert len({found[path] for path in kernels}) == 1
    difference = math.exp(found[kernels[-1]] - found["reference"]) - 1
    assert 0 < abs(difference) < 1e-3


@pytest.mark.parametrize(
    "spec", [ClusterSpec(16), ClusterSpec(32), ClusterSpec(4, "paper", "group", 16)], ids=str
)
def test_floats_and_groups_score_as_float_activations(kernels, trained, text, monkeypatch, spec):
    """16 and 32 bits compute in float on either side; groups as any codes within a thousandth."""
    arch, weights = trained
    runtime = runtime_of(arch, pack_lm(weights, arch, uniform(arch, spec), tokens(30)))
    found = {}
    for path in (*kernels, "reference"):
        monkeypatch.setenv("MPQ_KERNEL", path)
        assert runtime.kernel() == path
        found[path] = nll_nats(runtime, text)
    assert len({found[path] for path in kernels}) == 1
    difference = abs(math.exp(found[kernels[-1]] - found["reference"]) - 1)
    assert difference < (1e-3 if spec.bits == 4 else 1e-5)


def test_logits_are_those_of_repeated_steps(kernels):
    packed = packed_model(ARCH, uniform(ARCH, ClusterSpec(2)))
    runtime = runtime_of(ARCH, packed)
    ids = torch.randint(0, 30, (4, 6), generator=torch.Generator().manual_seed(2))
    logits, want_state = runtime.logits(ids)
    state = None
    for t in range(6):
        log_probs, state = runtime.step(ids[:, t], state)
        assert torch.allclose(log_probs, logits[:, t].log_softmax(-1), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(state, want_state))
    assert not logits.requires_grad and state[0].shape == (2, 4, 32)


def beam_search(runtime, n_steps=12, beam=7):
    """A beam search whose width changes at every step; returns prefixes and scores."""
    beams = [((29,), 0.0, None)]
    for t in range(n_steps):
        last = torch.tensor([prefix[-1] for prefix, _, _ in beams])
        state = None
        if beams[0][2] is not None:
            state = tuple(torch.stack([b[2][k] for b in beams], dim=1) for k in range(2))
        log_probs, state = runtime.step(last, state)
        grown = [
            ((*prefix, v), score + float(log_probs[i, v]), (state[0][:, i], state[1][:, i]))
            for i, (prefix, score, _) in enumerate(beams)
            for v in log_probs[i].topk(beam).indices.tolist()
        ]
        beams = sorted(grown, key=lambda b: -b[1])[: 1 + (3 * t) % beam]
    return [(prefix, score) for prefix, score, _ in beams]


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8))
def test_beam_search_with_changing_batch(kernels, trained, monkeypatch, bits):
    arch, weights = trained
    packed = pack_lm(weights, arch, uniform(arch, ClusterSpec(bits)), tokens(30))
    runtime = runtime_of(arch, packed)
    found = []
    for path in kernels:
        monkeypatch.setenv("MPQ_KERNEL", path)
        found.append(beam_search(runtime))
    assert all(other == found[0] for other in found)
    # A hypothesis scores the same alone as in any beam, and nearly so with float activations.
    for prefix, score in found[0]:
        ids = torch.tensor([prefix])
        alone = runtime.logits(ids[:, :-1])[0].log_softmax(-1).gather(2, ids[:, 1:, None]).sum()
        assert float(alone) == pytest.approx(score, abs=1e-4)
        monkeypatch.setenv("MPQ_KERNEL", "reference")
        logits, _ = runtime.logits(ids[:, :-1])
        exact = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).sum()
        monkeypatch.setenv("MPQ_KERNEL", kernels[-1])
        assert score == pytest.approx(float(exact), abs=0.05 * len(prefix))


@pytest.mark.parametrize("rnn_type", ("gru", "rnn_tanh"))
def test_what_has_no_kernel_runs_on_the_reference(kernels, monkeypatch, rnn_type):
    arch = architecture(rnn_type, 30, 24, 32, 2)
    runtime = runtime_of(arch, packed_model(arch, uniform(arch, ClusterSpec(2))))
    ids = torch.tensor([[1, 2, 3]])
    got, _ = runtime.logits(ids)
    assert f"no kernels for {rnn_type}" in runtime.kernel() and runtime._lstm is None
    monkeypatch.setenv("MPQ_KERNEL", "reference")
    assert torch.equal(runtime.logits(ids)[0], got)


def test_other_dtypes_run_on_the_reference(kernels):
    runtime = runtime_of(ARCH, packed_model(ARCH, uniform(ARCH, ClusterSpec(2))))
    ids = torch.tensor([[1, 2, 3]])
    want, _ = runtime.logits(ids)
    assert runtime.kernel() == kernels[-1] and runtime._lstm is not None
    got, _ = runtime.double().logits(ids)
    assert got.dtype == torch.float64 and "float64" in runtime.kernel()
    assert torch.allclose(got.float(), want, atol=0.05) and not torch.equal(got.float(), want)
    assert torch.equal(runtime.float().logits(ids)[0], want)


def test_without_library_the_reference_runs(kernels, monkeypatch, tmp_path):
    runtime = runtime_of(ARCH, packed_model(ARCH, uniform(ARCH, ClusterSpec(2))))
    ids = torch.tensor([[1, 2, 3]])
    monkeypatch.setenv("MPQ_KERNEL", "reference")
    want, _ = runtime.logits(ids)
    monkeypatch.delenv("MPQ_KERNEL")
    monkeypatch.setenv("MPQ_KERNEL_LIBRARY", str(tmp_path / "none.so"))
    assert torch.equal(runtime.logits(ids)[0], want)
    assert "no kernel library" in runtime.kernel()
    assert "no kernel library" in kernel_forms.kernel_name(ARCH)


def test_copies_and_loading_again(kernels):
    plan = uniform(ARCH, ClusterSpec(4))
    runtime = runtime_of(ARCH, packed_model(ARCH, plan))
    ids = torch.tensor([[1, 2, 3]])
    want, _ = runtime.logits(ids)
    twin = copy.deepcopy(runtime)
    assert twin._lstm is None and torch.equal(twin.logits(ids)[0], want)
    runtime.load(packed_model(ARCH, plan, seed=5))
    assert not torch.allclose(runtime.logits(ids)[0], want)
    assert torch.equal(twin.logits(ids)[0], want)
