"""mpq_packed_rnn with float activations against the host's own SequentialRNNLM, same weights."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from espnet_mpq.errors import MismatchError, PlanError
from espnet_mpq.packed.dequantize import dequantize
from espnet_mpq.plan import ClusterSpec

from packed_models import architecture, mixed, packed_model, uniform  # isort: skip

V = 13
CASES = [
    (rnn_type, unit, nhid, nlayers, tied)
    for rnn_type in ("lstm", "gru", "rnn_tanh")
    for unit, nhid, nlayers, tied in [(7, 7, 1, True), (7, 9, 2, False), (5, 5, 3, True)]
]


@pytest.fixture(autouse=True)
def float_activations(monkeypatch):
    monkeypatch.setenv("MPQ_KERNEL", "reference")


def pair(host, rnn_type="lstm", unit=7, nhid=7, nlayers=2, tied=False):
    """(packed LM, the host's float LM with the same weights)."""
    from espnet2.lm.seq_rnn_lm import SequentialRNNLM

    arch = architecture(rnn_type, V, unit, nhid, nlayers, tied)
    packed = packed_model(arch, mixed(arch, nlayers))
    lm_class = host.lm_choices.get_class("mpq_packed_rnn")
    lm = lm_class(V, plan=packed.plan.to_dict(), **arch.lm_conf())
    lm.load(packed)
    conf = dict(unit=unit, nhid=nhid, nlayers=nlayers, tie_weights=tied, rnn_type=rnn_type)
    float_lm = SequentialRNNLM(V, **conf).eval()
    weights = dequantize(packed)
    if tied:
        weights["decoder.weight"] = weights["encoder.weight"]
    float_lm.load_state_dict(weights)
    return lm, float_lm


def flat(state):
    return torch.cat(list(state)) if isinstance(state, tuple) else state


def close(a, b):
    assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_score_and_batch_score_equal_the_host(host, case):
    lm, float_lm = pair(host, *case)
    for name in ("rnn_type", "nhid", "nlayers"):
        assert getattr(lm, name) == getattr(float_lm, name)
    ids = torch.randint(0, V, (4, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(lm(ids, None)[0], float_lm(ids, None)[0])
        close(flat(lm(ids, None)[1]), flat(float_lm(ids, None)[1]))
        mine = theirs = None
        for t in range(1, 7):  # score, one hypothesis
            log_probs, mine = lm.score(ids[0, :t], mine, None)
            want, theirs = float_lm.score(ids[0, :t], theirs, None)
            close(log_probs, want)
            close(flat(mine), flat(theirs))
        mine, theirs = [None] * 4, [None] * 4
        for t in range(1, 7):  # batch_score, four hypotheses
            log_probs, mine = lm.batch_score(ids[:, :t], mine, None)
            want, theirs = float_lm.batch_score(ids[:, :t], theirs, None)
            close(log_probs, want)
            assert len(mine) == 4
            for a, b in zip(mine, theirs):
                close(flat(a), flat(b))


@pytest.mark.parametrize("rnn_type", ("lstm", "gru", "rnn_tanh"))
def test_beam_search_with_changing_batch(host, rnn_type):
    """Hypotheses split, die and reorder; every score equals the host's on the whole prefix."""
    lm, float_lm = pair(host, rnn_type, 7, 9, 2)
    rng = random.Random(0)
    beam = [((V - 1,), lm.init_state(None))]
    for _ in range(12):
        ys = torch.tensor([prefix for prefix, _ in beam])
        scores, states = lm.batch_score(ys, [state for _, state in beam], None)
        with torch.no_grad():
            want = float_lm(ys, None)[0][:, -1].log_softmax(-1)
        close(scores, want)
        grown = []
        for i, (prefix, _) in enumerate(beam):
            for token in rng.sample(range(1, V), 3):
                grown.append((prefix + (token,), lm.select_state(states, i)))
        rng.shuffle(grown)
        beam = grown[: rng.choice((1, 2, 3, 5, 10))]


@pytest.mark.parametrize("rnn_type", ("lstm", "gru", "rnn_tanh"))
def test_transducer_way_of_calling(host, rnn_type):
    """zero_state, then batch_score on (B, 1) last tokens that start with blank."""
    lm, float_lm = pair(host, rnn_type, 7, 9, 2)
    close(flat(lm.zero_state()), flat(float_lm.zero_state()))
    mine, theirs = [lm.zero_state()], [float_lm.zero_state()]
    last = torch.tensor([[0]])
    for step in range(4):
        scores, mine = lm.batch_score(last, mine, None)
        with torch.no_grad():
            want, theirs = float_lm.batch_score(last, theirs, None)
        close(scores, want)
        pick = [0, 0, 0] if step == 0 else [2, 0, 1, 1][: 4 - step % 2]
        mine, theirs = [mine[i] for i in pick], [theirs[i] for i in pick]
        last = torch.tensor([[1 + (3 * step + i) % (V - 1)] for i in range(len(pick))])


def test_states_of_all_calls_mix(host):
    lm, _ = pair(host)
    ys = torch.tensor([[3, 5], [3, 5], [3, 5]])
    want, state = lm.score(torch.tensor([3]), None, None)
    want, _ = lm.score(torch.tensor([3, 5]), state, None)
    batched = lm.batch_score(ys[:, :1], [None, lm.zero_state(), None], None)[1]
    close(lm.batch_score(ys, [state, batched[1], batched[0]], None)[0], want.expand(3, -1))
    close(lm.score(ys[0], batched[2], None)[0], want)
    close(lm.score(ys[0, :1], lm.zero_state(), None)[0], lm.score(ys[0, :1], None, None)[0])


def test_casting_and_eval_mode(host):
    lm, _ = pair(host)
    codes = {n: b.clone() for n, b in lm.named_buffers() if b.dtype == torch.uint8}
    want = lm.score(torch.tensor([4]), None, None)[0]
    lm.to(device="cpu", dtype=torch.float64).train()
    assert not any(m.training for m in lm.modules())
    assert lm.zero_state()[0].dtype == torch.float64
    scores, _ = lm.batch_score(torch.tensor([[4]]), [None], None)
    assert scores.dtype == torch.float64 and torch.allclose(scores[0].float(), want, atol=1e-5)
    for name, buffer in lm.named_buffers():
        assert name not in codes or torch.equal(buffer, codes[name])
    twin = copy.deepcopy(lm)
    assert torch.equal(twin.score(torch.tensor([4]), None, None)[0], scores[0])


def test_no_state_dict_fills_it(host):
    """The host loads with strict=False and retries after a RuntimeError: neither may pass."""
    lm, float_lm = pair(host)
    model = torch.nn.Module()
    model.lm = lm
    float_state = {"lm." + k: v for k, v in float_lm.state_dict().items()}
    for state in ({}, float_state, {"x": torch.ones(1)}):
        with pytest.raises(MismatchError, match="packed.safetensors") as info:
            model.load_state_dict(state, strict=False)
        assert not isinstance(info.value, RuntimeError)


def test_wrong_plans_are_refused_when_building(host):
    lm_class = host.lm_choices.get_class("mpq_packed_rnn")
    arch = architecture(vocab_size=V)
    plan = uniform(arch, ClusterSpec(2)).to_dict()
    lm_class(V, plan=plan, **arch.lm_conf())
    for bits in (3, 0, "2"):
        bad = copy.deepcopy(plan)
        bad["clusters"]["output"]["bits"] = bits
        with pytest.raises(PlanError, match="bits"):
            lm_class(V, plan=bad, **arch.lm_conf())
    with pytest.raises(PlanError, match="rnn.l1"):
        lm_class(V, plan=plan, **{**arch.lm_conf(), "nlayers": 1})
    with pytest.raises(PlanError, match="output"):
        lm_class(V, plan=plan, **{**arch.lm_conf(), "tie_weights": True})
