"""The runtime of a packed Transformer LM against float modules written with torch's own."""

from __future__ import annotations

import copy
import gzip
import math
import pickle
import random

import pytest
import torch
from found import pack_lm

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.runtime.prefixes import Memory, PastToken
from espnet_mpq.runtime.transformer_lm import PackedTransformer

from packed_models import (  # isort: skip
    SPECS,
    FloatTransformer,
    mixed,
    packed_model,
    random_weights,
    tokens,
    transformer,
    uniform,
)

ARCHITECTURES = [
    transformer(),
    transformer(13, "sinusoidal", embed_unit=1, att_unit=6, head=1, unit=3, layer=1),
    transformer(37, None, embed_unit=33, att_unit=35, head=7, unit=65, layer=3),
    transformer(17, "sinusoidal", embed_unit=9, att_unit=10, head=5, unit=1, layer=2),
]


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setenv("MPQ_KERNEL", "reference")


def runtime_of(packed):
    runtime = PackedTransformer(packed.architecture, packed.plan)
    runtime.load(packed)
    return runtime


def filled(arch, plan, seed=0):
    packed = packed_model(arch, plan, seed)
    return runtime_of(packed), FloatTransformer(arch, float_state(packed))


def some_ids(arch, *shape, seed=0, first=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, arch.vocab_size, shape, generator=generator)


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
def test_equals_float_modules_with_dequantized_weights(reference, arch):
    """Every spec at least once, whole sequences and steps, batch 1 to 10."""
    for seed in range(4):
        runtime, model = filled(arch, mixed(arch, seed), seed)
        assert runtime.kernel() == "reference"
        ids = some_ids(arch, (1, 2, 3, 10)[seed], 9, seed=seed)
        with torch.no_grad():
            want = model(ids)[0]
        assert torch.allclose(runtime.logits(ids)[0], want, atol=1e-5)
        state = None
        for t in range(9):
            log_probs, state = runtime.step(ids[:, t], state)
            assert torch.allclose(log_probs, want[:, t].log_softmax(-1), atol=1e-5)
    assert runtime(ids)[1] is None and [len(prefix) for prefix in state] == [9] * 10


@pytest.mark.parametrize("spec", SPECS[::3], ids=str)
def test_every_spec(reference, spec):
    arch = transformer()
    runtime, model = filled(arch, uniform(arch, spec, "float32"))
    ids = some_ids(arch, 2, 6)
    with torch.no_grad():
        assert torch.allclose(runtime.logits(ids)[0], model(ids)[0], atol=1e-5)


def test_beam_search_with_changing_batch_and_lengths(reference):
    """Hypotheses of any age meet in a batch; every score is that of the whole prefix."""
    arch = transformer(pos_enc="sinusoidal", att_unit=6)
    runtime, model = filled(arch, uniform(arch, ClusterSpec(4)))
    rng = random.Random(0)
    seen, live = set(), [((10,), ())]
    for _ in range(14):
        state = [state for _, state in live]
        log_probs, grown = runtime.step(torch.tensor([p[-1] for p, _ in live]), state)
        for (prefix, _), scores in zip(live, log_probs):
            with torch.no_grad():
                want = model(torch.tensor([prefix]))[0][0, -1].log_softmax(-1)
            assert torch.allclose(scores, want, atol=1e-5)
            seen.add(len(prefix))
        # Some grow, some wait with the state they had before.
        new = [((*p, rng.randrange(1, 11)), s) for (p, _), s in zip(live, grown) for _ in "ab"]
        live = rng.sample(new, min(len(new), rng.choice((1, 2, 5, 9)))) + live[: rng.choice((0, 1))]
    assert len(seen) > 5


def test_prefixes_share_their_tokens(reference):
    """A beam keeps every token of its trie once, in memory and in the products."""
    arch = transformer()
    runtime, _ = filled(arch, uniform(arch, ClusterSpec(2)))
    state = None
    for _ in range(6):
        _, state = runtime.step(torch.tensor([3]), state)
    _, state = runtime.step(torch.tensor([1, 2, 3]), state * 3)
    assert len({id(token) for prefix in state for token in prefix}) == 6 + 3
    memory = Memory(state, [True] * 3, arch.layer, torch.zeros(arch.att_unit))
    assert memory.n_past == 9 and memory.keys_values.shape == (2 * arch.layer, 12, arch.att_unit)
    # A token's own memory does not keep those of its neighbours alive.
    for token in state[0]:
        assert token.keys_values.numel() == 2 * arch.layer * arch.att_unit
        assert token.keys_values.storage().nbytes() == 4 * token.keys_values.numel()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", ["reference", "scalar"])
def test_what_is_no_number_stays_in_its_hypotheses(kernels, monkeypatch, kernel, value):
    """Keys or values of one prefix that overflowed leave the others of the batch as they are."""
    monkeypatch.setenv("MPQ_KERNEL", kernel)
    arch = transformer()
    runtime, _ = filled(arch, uniform(arch, ClusterSpec(4)))
    ids = some_ids(arch, 5, 4)
    state = None
    for t in range(3):
        _, state = runtime.step(ids[:, t], state)
    state[3] = state[3][:1]  # prefixes of different lengths
    clean, _ = runtime.step(ids[:, 3], state)
    for row in range(2 * arch.layer):  # the key or value of one layer
        last = state[1][-1].keys_values.clone()
        last[row] = value
        spoiled = PastToken(last, True)
        broken = [state[0], (*state[1][:-1], spoiled), state[2], state[3], (spoiled, *state[4])]
        log_probs, grown = runtime.step(ids[:, 3], broken)
        assert torch.isnan(log_probs[[1, 4]]).all()
        assert torch.allclose(log_probs[[0, 2, 3]], clean[[0, 2, 3]], atol=1e-6)
        assert [len(prefix) for prefix in grown] == [4, 4, 4, 2, 5]
        for k in (0, 2, 3):
            assert bool(grown[k][-1].keys_values.isfinite().all())
        # And in what comes after.
        after, _ = runtime.step(ids[:, 0], grown)
        assert torch.isnan(after).all(dim=1).tolist() == [False, True, False, False, True]


def test_token_zero_is_hidden_from_every_other(reference):
    """As padding and as the blank that starts transducer searches; see also the host's tests."""
    arch = transformer()
    runtime, model = filled(arch, uniform(arch, ClusterSpec(8)))
    ids = some_ids(arch, 2, 6)
    gaps = torch.cat([ids[:, :2], torch.zeros(2, 1, dtype=torch.int64), ids[:, 2:]], dim=1)
    with torch.no_grad():
        want = model(ids)[0]
    got, _ = runtime.logits(gaps)
    # No positions here, so the tokens around the gap score as if it were not there.
    assert torch.allclose(got[:, [0, 1, 3, 4, 5, 6]], want, atol=1e-5)
    state = None
    for t in range(7):
        log_probs, state = runtime.step(gaps[:, t], state)
        assert torch.allclose(log_probs, got[:, t].log_softmax(-1), atol=1e-5)
    first, _ = runtime.step(torch.tensor([0, 4]))
    alone, _ = runtime.logits(torch.tensor([[0], [4]]))
    assert torch.allclose(first, alone[:, 0].log_softmax(-1), atol=1e-6)
    assert bool(torch.isfinite(first).all())


def test_casting_copies_and_eval_mode(reference):
    arch = transformer(pos_enc="sinusoidal", att_unit=12)
    runtime, _ = filled(arch, uniform(arch, ClusterSpec(4)))
    ids = some_ids(arch, 3, 5)
    want = runtime.logits(ids)[0]
    for twin in (copy.deepcopy(runtime), pickle.loads(pickle.dumps(runtime))):
        assert twin._dense is None and torch.equal(twin.logits(ids)[0], want)
    state = None
    for t in range(4):
        _, state = runtime.step(ids[:, t], state)
    codes = {n: b.clone() for n, b in runtime.named_buffers() if b.dtype == torch.uint8}
    runtime.to(torch.float64).train()
    assert not runtime.training and list(runtime.parameters()) == []
    assert torch.allclose(runtime.logits(ids)[0].float(), want, atol=1e-5)
    # A state of another dtype goes on.
    log_probs, _ = runtime.step(ids[:, 4], state)
    assert log_probs.dtype == torch.float64 and not log_probs.requires_grad
    assert torch.allclose(log_probs.float(), want[:, 4].log_softmax(-1), atol=1e-5)
    runtime.to(torch.bfloat16)
    assert torch.allclose(runtime.logits(ids)[0].float(), want, atol=0.3)
    assert codes and all(torch.equal(dict(runtime.named_buffers())[n], c) for n, c in codes.items())


def test_what_is_refused():
    arch = transformer()
    empty = PackedTransformer(arch, uniform(arch, ClusterSpec(2)))
    with pytest.raises(InputError, match="packed.safetensors"):
        empty.step(torch.tensor([1]))
    runtime, _ = filled(arch, uniform(arch, ClusterSpec(2)))
    with pytest.raises(InputError, match="from their start"):
        runtime.logits(some_ids(arch, 1, 3), [()])
    with pytest.raises(MismatchError, match="layer: found 2 in config.yaml; expected 1"):
        runtime.load(
            packed_model(transformer(layer=1), uniform(transformer(layer=1), ClusterSpec(2)))
        )
    with pytest.raises(MismatchError, match="packed.safetensors"):
        runtime.load_state_dict({}, strict=False)


# On the kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
def test_paths_agree_and_stay_near_float_activations(kernels, monkeypatch, arch):
    """Steps and whole sequences, any plan."""
    for seed in range(3):
        runtime, model = filled(arch, mixed(arch, seed), seed)
        ids = some_ids(arch, 3, 7, seed=seed, first=0)
        found = {}
        for path in kernels:
            monkeypatch.setenv("MPQ_KERNEL", path)
            assert runtime.kernel() == path
            state, steps = None, []
            for t in range(7):
                log_probs, state = runtime.step(ids[:, t], state)
                steps.append(log_probs)
            found[path] = torch.stack(
                [runtime.logits(ids)[0].log_softmax(-1), torch.stack(steps, 1)]
            )
        for path in kernels:
            assert torch.allclose(found[path], found[kernels[0]], atol=1e-5)
        monkeypatch.setenv("MPQ_KERNEL", "reference")
        want = runtime.logits(ids)[0].log_softmax(-1)
        error = (found[kernels[0]] - want).abs()
        assert 0 < float(error.max()) < 0.2 and float(error.mean()) < 0.03


@pytest.fixture(scope="module")
def text(data_root):
    """Word ids of meeting transcripts, 0-padded (n, 20): the 300 most frequent words of AMI."""
    with gzip.open(data_root / "ami_lm" / "valid.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line.split()[:19] for line in file if len(line.split()) > 4][:1200]
    counts = {}
    for word in (word for line in lines for word in line):
        counts[word] = counts.get(word, 0) + 1
    known = {w: 2 + k for k, w in enumerate(sorted(counts, key=counts.get, reverse=True)[:300])}
    rows = [torch.tensor([known.get(word, 1) for word in line] + [302]) for line in lines]
    targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    start = torch.full((len(rows), 1), 302)
    return torch.cat([start, targets[:, :-1].masked_fill(targets[:, 1:] == 0, 0)], 1), targets


@pytest.fixture(scope="module")
def trained(text):
    """A float LM that has learnt from 1,000 of the sentences: architecture and weights."""
    arch = transformer(303, "sinusoidal", embed_unit=32, att_unit=48, head=3, unit=96, layer=2)
    inputs, targets = text
    rng = torch.random.get_rng_state()
    torch.manual_seed(1)
    weights = random_weights(arch)
    for name, value in weights.items():
        if value.dim() == 1:
            value.fill_(1.0 if name.endswith(("norm1.weight", "norm2.weight")) else 0.0)
        else:
            value.mul_(2.5 * value.shape[1] ** -0.5)
    for name in ("encoder.embed.1.weight", "encoder.after_norm.weight"):
        weights[name].fill_(1.0)
    model = FloatTransformer(arch, weights).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for step in range(120):
        pick = torch.arange(50) + 50 * (step % 20)
        loss = torch.nn.functional.cross_entropy(
            model(inputs[pick])[0].flatten(0, 1), targets[pick].flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.random.set_rng_state(rng)
    return arch, model.weights()


def nll_nats(runtime, text) -> float:
    inputs, targets = text
    logits, _ = runtime.logits(inputs[1000:])
    return float(
        torch.nn.functional.cross_entropy(
            logits.double().flatten(0, 1), targets[1000:].flatten(), ignore_index=0
        )
    )


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8))
def test_perplexity_is_within_a_thousandth_of_float_activations(
    kernels, trained, text, monkeypatch, bits
):
    arch, weights = trained
    runtime = runtime_of(pack_lm(weights, arch, uniform(arch, ClusterSpec(bits)), tokens(303)))
    found = {}
    for path in (kernels[-1], "reference"):
        monkeypatch.setenv("MPQ_KERNEL", path)
        found[path] = nll_nats(runtime, text)
    if bits == 8:  # it has learnt: below the entropy of single words
        assert found["reference"] < 4.2
    difference = math.exp(found[kernels[-1]] - found["reference"]) - 1
    assert 0 < abs(difference) < 1e-3
