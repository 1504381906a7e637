"""mpq_packed_rnn with float activations against the host's own SequentialRNNLM, same weights."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from decoding_runs import check_changing_beam

from espnet_mpq.errors import MismatchError, PlanError
from espnet_mpq.hosts.espnet.families import conf_of
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.plan import ClusterSpec

from packed_models import architecture, mixed, packed_model, uniform  # isort: skip

V = 13
CASES = [
    (rnn_type, unit, nhid, nlayers, tied)
    for rnn_type in ("lstm", "gru", "rnn_tanh")
    for unit, nhid, nlayers, tied in [(7, 7, 1, True), (7, 9, 2, False), (5, 5, 3, True)]
]


pytestmark = pytest.mark.usefixtures("float_activations")


def pair(host, rnn_type="lstm", unit=7, nhid=7, nlayers=2, tied=False):
    """(packed LM, the host's float LM with the same weights)."""
    from espnet2.lm.seq_rnn_lm import SequentialRNNLM

    arch = architecture(rnn_type, V, unit, nhid, nlayers, tied)
    packed = packed_model(arch, mixed(arch, nlayers))
    lm_class = host.lm_choices.get_class("mpq_packed_rnn")
    lm = lm_class(V, plan=packed.plan.to_dict(), **conf_of(arch))
    lm.load(packed)
    conf = dict(unit=unit, nhid=nhid, nlayers=nlayers, tie_weights=tied, rnn_type=rnn_type)
    float_lm = SequentialRNNLM(V, **conf).eval()
    weights = float_state(packed)
    if tied:
        weights["decoder.weight"] = weights["encoder.weight"]
    float_lm.load_state_dict(weights)
    return lm, float_lm


def flat(state):
    return state if isinstance(state, torch.Tensor) else torch.cat(list(state))


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
    check_changing_beam(*pair(host, rnn_type, 7, 9, 2), V)


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


def of_the_host(state):
    """A state as the host's score takes it: (nlayers, 1, nhid)."""
    return None if state is None else tuple(x.reshape(len(x), 1, -1) for x in state)


def grown(lm, float_lm, rng):
    """(prefix, our state, the host's): of batch_score, score and zero_state, of many calls."""
    found = [((V - 1,), None, None), ((2,), lm.zero_state(), float_lm.zero_state())]
    for _ in range(6):
        chosen = rng.choices(found, k=rng.choice((1, 2, 5)))
        tokens = torch.tensor([prefix[-1:] for prefix, _, _ in chosen])
        _, ours = lm.batch_score(tokens, [state for _, state, _ in chosen], None)
        for (prefix, _, theirs), token, state in zip(chosen, tokens, ours):
            theirs = float_lm.score(token, of_the_host(theirs), None)[1]
            found.append((prefix + (rng.randrange(1, V),), state, theirs))
        prefix, state, theirs = found[-1]
        _, state = lm.score(torch.tensor(prefix), state, None)
        _, theirs = float_lm.score(torch.tensor(prefix), theirs, None)
        found.append((prefix + (3,), state, theirs))
    return found


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_hypotheses_of_different_calls_in_one_batch(host, seed):
    """As in a transducer search: any states together, repeated, in any order; then score."""
    lm, float_lm = pair(host, "lstm", 7, 9, 2)
    rng = random.Random(seed)
    found = grown(lm, float_lm, rng)
    for batch in (1, 3, len(found), 20):
        chosen = rng.choices(found, k=batch)
        tokens = torch.tensor([prefix[-1:] for prefix, _, _ in chosen])
        scores, states = lm.batch_score(tokens, [state for _, state, _ in chosen], None)
        for i, (prefix, state, theirs) in enumerate(chosen):
            want, theirs = float_lm.score(torch.tensor(prefix), of_the_host(theirs), None)
            close(scores[i], want)
            close(flat(states[i]), flat(theirs)[:, 0])
            close(lm.score(torch.tensor(prefix), state, None)[0], want)


def test_gathering_and_stacking_give_the_same_bits(host, kernels, monkeypatch):
    """A batch out of one earlier call takes a short cut; states that know no batch do not."""
    arch = architecture("lstm", V, 7, 9, 2)
    packed = packed_model(arch, uniform(arch, ClusterSpec(2)))
    lm_class = host.lm_choices.get_class("mpq_packed_rnn")
    lm = lm_class(V, plan=packed.plan.to_dict(), **conf_of(arch))
    lm.load(packed)
    for path in (*kernels, "reference"):
        monkeypatch.setenv("MPQ_KERNEL", path)
        assert lm.packed.kernel() == path
        _, states = lm.batch_score(torch.arange(5).reshape(5, 1), [None] * 5, None)
        for pick in ([0, 1, 2, 3, 4], [4, 4, 0], [2], [1, 3, 1, 0, 2, 2, 4]):
            ys = torch.arange(1, 1 + len(pick)).reshape(-1, 1)
            chosen = [lm.select_state(states, torch.tensor(i)) for i in pick]
            gathered, after = lm.batch_score(ys, chosen, None)
            stacked, want = lm.batch_score(ys, [tuple(s) for s in chosen], None)
            assert torch.equal(gathered, stacked)
            assert all(torch.equal(flat(a), flat(b)) for a, b in zip(after, want))


def test_states_are_pairs_that_copy_and_pickle_and_are_never_written_to(host):
    lm, _ = pair(host, "lstm", 7, 9, 2)
    _, states = lm.batch_score(torch.tensor([[3], [4], [5]]), [None] * 3, None)
    h, c = states[1]
    assert h.shape == c.shape == (2, 9) and len(states[1]) == 2
    assert torch.equal(states[1][-1], c) and torch.equal(states[1][:1][0], h)
    before = (h.clone(), c.clone())
    want, _ = lm.score(torch.tensor([6]), states[1], None)
    for twin in (
        copy.copy(states[1]),
        copy.deepcopy(states[1]),
        pickle.loads(pickle.dumps(states[1])),
        tuple(states[1]),
        list(states[1]),
    ):
        assert torch.equal(twin[0], h) and torch.equal(twin[1], c)
        close(lm.score(torch.tensor([6]), twin, None)[0], want)
        scores, _ = lm.batch_score(torch.tensor([[6], [6]]), [states[1], twin], None)
        close(scores, want.expand(2, -1))
    # A copy has its own column, and only that.
    assert h._is_view() and not copy.copy(states[1])[0]._is_view()
    lm.batch_score(torch.tensor([[1], [2]]), [states[2], states[1]], None)
    assert torch.equal(h, before[0]) and torch.equal(c, before[1])


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
    lm_class(V, plan=plan, **conf_of(arch))
    for bits in (5, 0, "2"):
        bad = copy.deepcopy(plan)
        bad["clusters"]["output"]["bits"] = bits
        with pytest.raises(PlanError, match="bits"):
            lm_class(V, plan=bad, **conf_of(arch))
    with pytest.raises(PlanError, match="rnn.l1"):
        lm_class(V, plan=plan, **{**conf_of(arch), "nlayers": 1})
    with pytest.raises(PlanError, match="output"):
        lm_class(V, plan=plan, **{**conf_of(arch), "tie_weights": True})
