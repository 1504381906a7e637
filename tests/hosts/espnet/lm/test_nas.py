"""The super-networks: one path is the quantized LM, a mixture the sum over its paths."""

from __future__ import annotations

import copy

import pytest
import torch
from found import find_clusters, get_mats, set_mats

from espnet_mpq.errors import InputError
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.quant.fake_quant import project_cluster

N_TOKENS = 19
KINDS = {
    "lstm": ("seq_rnn", dict(unit=10, nlayers=2, rnn_type="lstm")),
    "tied": ("seq_rnn", dict(unit=10, nlayers=1, tie_weights=True)),
    "gru": ("seq_rnn", dict(unit=6, nhid=9, nlayers=2, rnn_type="gru")),
    "rnn": ("seq_rnn", dict(unit=9, nlayers=2, rnn_type="rnn_tanh")),
    "transformer": (
        "transformer",
        dict(embed_unit=6, att_unit=8, head=2, unit=12, layer=2, pos_enc="sinusoidal"),
    ),
}
TOKENS = torch.randint(1, N_TOKENS, (3, 7), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def pair(host):
    """pair(kind, **nas) -> (the host's LM, the super-network with its weights)."""

    def make(kind, **nas):
        lm, conf = KINDS[kind]
        torch.manual_seed(5)
        stock = host.lm_choices.get_class(lm)(vocab_size=N_TOKENS, **conf)
        options = {"budget": 150.0, **nas}
        ours = host.lm_choices.get_class(f"mpq_nas_{lm}")(vocab_size=N_TOKENS, nas=options, **conf)
        ours.load_state_dict({**ours.state_dict(), **stock.state_dict()})
        return stock.eval(), ours

    return make


def quantized(stock, choice, **spec):
    # Frozen: torch runs a GRU by other kernels when its weights are not, even under no_grad.
    lm = copy.deepcopy(stock).requires_grad_(False)
    for cluster in find_clusters(stock):
        mats = get_mats(stock, cluster)
        spec_of = ClusterSpec(choice[cluster.name], **spec)
        set_mats(lm, cluster, project_cluster(mats, spec_of).values)
    return lm


def set_one_best(ours, choice):
    rows = torch.full_like(ours.nas.rows(), -1.0)
    for k, name in enumerate(ours.nas.names):
        rows[k, ours.nas.options.bits.index(choice[name])] = 2.0
    with torch.no_grad():
        ours.nas.logits.copy_(rows.flatten())


def a_choice(ours):
    bits = ours.nas.options.bits
    return {name: bits[(3 * k + 1) % len(bits)] for k, name in enumerate(ours.nas.names)}


@pytest.mark.parametrize("spec", [{}, dict(grid="paper", tying="group", group_size=4)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_one_best_path_is_the_quantized_lm_bit_for_bit(pair, kind, spec):
    stock, ours = pair(kind, bits=[1, 2, 4, 8, 16], **spec)
    choice = a_choice(ours)
    assert len(set(choice.values())) > 2
    set_one_best(ours, choice)
    ours.eval()
    right = quantized(stock, choice, **spec)
    assert torch.equal(ours(TOKENS, None)[0], right(TOKENS, None)[0])
    # Changed weights are seen: nothing stale is kept.
    for lm in (stock, ours):
        for p in lm.parameters():
            if p.dim() == 2:
                p.mul_(1.5)
    assert torch.equal(ours(TOKENS, None)[0], quantized(stock, choice, **spec)(TOKENS, None)[0])


@pytest.mark.parametrize("kind", ["lstm", "gru", "transformer"])
def test_scores_are_those_of_the_quantized_lm(pair, kind):
    stock, ours = pair(kind)
    choice = a_choice(ours)
    set_one_best(ours, choice)
    right = quantized(stock, choice)
    ours.eval()
    states = rights = [None] * len(TOKENS)
    for length in range(1, 4):
        got, states = ours.batch_score(TOKENS[:, :length], states, None)
        want, rights = right.batch_score(TOKENS[:, :length], rights, None)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    one, _ = ours.score(TOKENS[0, :1], None, None)
    torch.testing.assert_close(one, right.score(TOKENS[0, :1], None, None)[0])


def no_dropout(lm):
    lm.train()
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if hasattr(lm, "rnn"):
        lm.rnn.dropout = 0.0


def test_a_mixture_of_gates_sums_pre_activations(pair):
    """One LSTM step by hand: the gates' outputs for all candidates, summed with weights p."""
    stock, ours = pair("lstm", relaxation="softmax", bits=[1, 4, 8])
    with torch.no_grad():
        ours.nas.logits.normal_()
    no_dropout(ours)
    p = ours.nas.probabilities().detach()
    values = {
        (c.name, b): project_cluster(get_mats(stock, c), ClusterSpec(b)).values
        for c in find_clusters(stock)
        for b in (1, 4, 8)
    }

    def sum_of(name, function, *inputs):
        k = ours.nas.names.index(name)
        return sum(p[k, n] * function(*values[name, b], *inputs) for n, b in enumerate((1, 4, 8)))

    def product(w, u, x, h):
        return x @ w.T + h @ u.T

    x = sum_of("embedding", lambda w: w[TOKENS])
    rnn = stock.rnn
    for layer in range(2):
        h = c = torch.zeros(3, 10)
        bias = getattr(rnn, f"bias_ih_l{layer}") + getattr(rnn, f"bias_hh_l{layer}")
        bias = bias.detach().view(4, 10)
        steps = []
        for t in range(TOKENS.shape[1]):
            i, f, g, o = (
                sum_of(f"rnn.l{layer}.{gate}", product, x[:, t], h) + bias[k]
                for k, gate in enumerate("ifgo")
            )
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        x = torch.stack(steps, dim=1)
    want = sum_of("output", lambda w, x: x @ w.T, x) + stock.decoder.bias
    torch.testing.assert_close(ours(TOKENS, None)[0], want, rtol=1e-4, atol=1e-5)


def test_a_mixture_of_sublayers_sums_their_outputs(pair):
    """Every sublayer by whole quantized copies of the host's own modules."""
    stock, ours = pair("transformer", relaxation="softmax", bits=[1, 2, 8])
    with torch.no_grad():
        ours.nas.logits.normal_()
    no_dropout(ours)
    p = ours.nas.probabilities().detach()
    copies = [quantized(stock, dict.fromkeys(ours.nas.names, b)) for b in (1, 2, 8)]

    mask = stock._target_mask(TOKENS)

    def sum_of(name, function, *inputs):
        k = ours.nas.names.index(name)
        return sum(p[k, n] * function(lm, *inputs) for n, lm in enumerate(copies))

    def attention(lm, k, h):
        return lm.encoder.encoders[k].self_attn(h, h, h, mask)

    def feed_forward(lm, k, h):
        return lm.encoder.encoders[k].feed_forward(h)

    x = sum_of("embedding", lambda lm: lm.encoder.embed[0](lm.embed(TOKENS)))
    x = stock.encoder.embed[1:](x)
    for k, block in enumerate(stock.encoder.encoders):
        x = x + sum_of(f"blocks.{k}.attention", attention, k, block.norm1(x))
        x = x + sum_of(f"blocks.{k}.feed_forward", feed_forward, k, block.norm2(x))
    want = sum_of("output", lambda lm, h: lm.decoder(h), stock.encoder.after_norm(x))
    torch.testing.assert_close(ours(TOKENS, None)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_gradients_of_the_logits_are_those_of_finite_differences(pair, kind):
    from espnet_mpq.search.nas import Penalty

    _, ours = pair(kind, relaxation="softmax", temperature=0.7, final_temperature=0.5)
    ours.double()
    with torch.no_grad():
        ours.nas.logits.normal_()
        for p in ours.parameters():
            p.mul_(3.0)
    no_dropout(ours)
    ours.nas.budget_n_bytes = int(0.97 * ours.nas.expected_n_bytes(ours.nas.probabilities()))
    penalty = Penalty(ours.nas)
    penalty.multiplier = 0.3

    def loss():
        logits = ours(TOKENS[:, :-1], None)[0].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten()) + penalty()

    (gradient,) = torch.autograd.grad(loss(), ours.nas.logits)
    assert float(gradient.abs().max()) > 1e-3
    numeric = torch.zeros_like(gradient)
    with torch.no_grad():
        for k in range(len(gradient)):
            for sign in (1.0, -1.0):
                ours.nas.logits[k] += sign * 1e-4
                numeric[k] += sign * loss() / 2e-4
                ours.nas.logits[k] -= sign * 1e-4
    torch.testing.assert_close(gradient, numeric, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_who_gets_gradients_in_which_phase(pair, kind):
    for phase in ("weights", "architecture", "joint"):
        _, ours = pair(kind, phase=phase)
        ours.train()
        ours(TOKENS, None)[0].logsumexp(-1).sum().backward()
        graded = {name for name, p in ours.named_parameters() if p.grad is not None}
        every = {name for name, _ in ours.named_parameters()}
        assert (
            graded
            == {
                "weights": every - {"nas.logits"},
                "architecture": {"nas.logits"},
                "joint": every,
            }[phase]
        )


def test_a_path_is_straight_through_for_the_weights(pair):
    stock, ours = pair("lstm", phase="weights", bits=[2, 8])
    no_dropout(ours)
    torch.manual_seed(3)
    ours(TOKENS, None)[0].square().sum().backward()
    torch.manual_seed(3)
    path = ours.nas.draw()
    assert set(path.values()) == {2, 8}
    values = ours.candidates
    lm = copy.deepcopy(stock)
    for cluster in find_clusters(stock):
        with torch.no_grad():
            set_mats(lm, cluster, values.single(cluster.name, path[cluster.name], False))
    lm(TOKENS, None)[0].square().sum().backward()
    for name, p in lm.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_from_fp_lm_to_super_network_to_quantized_class(host, pair, kind):
    stock, ours = pair(kind)
    lm, conf = KINDS[kind]
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in stock.named_parameters()] + ["nas.logits"]
    planned = host.lm_choices.get_class(f"mpq_{lm}")(vocab_size=N_TOKENS, **conf)
    planned.load_state_dict(ours.state_dict())
    for name, p in planned.named_parameters():
        assert torch.equal(p, ours.get_parameter(name))


def test_bad_options_are_clear_errors(pair, host):
    for nas, message in (
        (dict(budget=0.01), "at least"),
        (dict(bugdet=2.0), "did you mean 'budget'"),
        (dict(budget_bytes=5000), "one of them"),
        (dict(bits=[2]), "nas.bits"),
        (dict(bits=[4, 5]), "unsupported bits"),
        (dict(phase="both"), "nas.phase"),
        (dict(temperature=0.0), "nas.temperature"),
        (dict(final_temperature=3.0), "at most nas.temperature"),
        (dict(lr=True), "nas.lr"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            pair("lstm", **nas)
        assert caught.type.__name__ in ("InputError", "PlanError")
    with pytest.raises(InputError, match="lm_conf.plan"):
        host.lm_choices.get_class("mpq_nas_seq_rnn")(
            vocab_size=9, unit=8, nas=dict(budget=150.0), plan={"clusters": {}}
        )
