"""The harm of a recogniser: equal to its definition, computed with the host's own calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from espnet_mpq.errors import InputError
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.quant.spec import ClusterSpec
from espnet_mpq.sensitivity.hessian import FisherMeter, HessianMeter
from espnet_mpq.sensitivity.kl import KlMeter, kl


@pytest.fixture(scope="module")
def asr(host):
    from espnet_mpq.hosts.espnet.asr import data, judged
    from espnet_mpq.hosts.espnet.experiment import opened

    return SimpleNamespace(
        load=opened.load_fp, judged=judged.judged_asr, read=data.read_speech
    )


def host_posteriors(model, speech, k):
    """Log-probabilities of the CTC (T, V) and the decoder (L + 1, V) of utterance k, as the host
    computes them alone."""
    samples, ids = torch.from_numpy(speech.samples[k])[None], torch.from_numpy(speech.tokens[k])
    with torch.no_grad():
        rows, lengths = model.encode(samples, torch.tensor([samples.shape[1]]))
        rows = rows[0] if isinstance(rows, tuple) else rows
        tokens = torch.cat([torch.tensor([model.sos]), ids])[None]
        states = model.decoder(rows, lengths, tokens, torch.tensor([tokens.shape[1]]))[0]
        return model.ctc.log_softmax(rows)[0], states.log_softmax(-1)[0]


@pytest.mark.parametrize("name", ["encoder.1.ffn", "decoder.0.src_attn", "ctc.ctc_lo"])
def test_harm_is_its_definition(asr, asr_exp, speech_dir, name):
    """ctc_weight x sum over frames + (1 - ctc_weight) x sum over tokens, by the frames."""
    exp = asr.load(asr_exp.path)
    speech, weights = asr.read(exp, speech_dir), exp.weights
    mats = project_cluster(weights.mats(name), ClusterSpec(2)).values
    before = [host_posteriors(exp.model, speech, k) for k in range(len(speech))]
    fp = [m.clone() for m in weights.mats(name)]
    weights.set(name, mats)
    after = [host_posteriors(exp.model, speech, k) for k in range(len(speech))]
    weights.set(name, fp)
    frames = sum(float(kl(a[0].double(), b[0].double()).sum()) for a, b in zip(before, after))
    tokens = sum(float(kl(a[1].double(), b[1].double()).sum()) for a, b in zip(before, after))
    n_frames = sum(len(a[0]) for a in before)
    n_tokens = sum(len(a[1]) for a in before)

    # A batch each, as padding leaks into convolutions, in the host's training too.
    both = KlMeter(asr.judged(exp, speech, 1), weights)
    assert both.judged.unit == "nats/frame" and both.n_rows == n_frames
    harm, stderr = both.measure({name: mats})
    assert harm == pytest.approx((0.3 * frames + 0.7 * tokens) / n_frames, rel=1e-3)
    assert harm > 1e-5 and 0 < stderr < harm * 10
    ctc = KlMeter(asr.judged(exp, speech, 1, {"ctc": 1.0}), weights)
    assert ctc.measure({name: mats})[0] == pytest.approx(frames / n_frames, rel=1e-3, abs=1e-12)
    decoder = KlMeter(asr.judged(exp, speech, 1, {"decoder": 1.0}), weights)
    assert decoder.judged.unit == "nats/token" and decoder.n_rows == n_tokens
    assert decoder.measure({name: mats})[0] == pytest.approx(tokens / n_tokens, rel=1e-3, abs=1e-12)
    # Nothing but the weights measured was changed.
    for a, b in zip(weights.mats(name), fp):
        assert torch.equal(a, b)


def test_stages_are_the_hosts_forward_pass(asr, asr_exp, speech_dir):
    """In one batch, padded: from every stage on, the same logits as the host's encode."""
    exp = asr.load(asr_exp.path)
    judged = asr.judged(exp, asr.read(exp, speech_dir), 10**6)
    (batch,) = judged.batches
    model, inputs, stages = exp.model, batch.inputs, judged.stages
    with torch.no_grad():
        rows, lengths, _ = model.encoder(inputs.frames, inputs.n_frames)
        states = model.decoder(rows, lengths, inputs.tokens, inputs.n_tokens)[0]
        expected = torch.cat([model.ctc.ctc_lo(rows), states], dim=1)
        x = inputs
        for k, layer in enumerate(stages.layers):
            torch.testing.assert_close(stages.run(x, inputs, k), expected, rtol=0, atol=1e-5)
            x = layer(x, inputs)
    assert len(stages.layers) == 1 + 2 + 1 + 2 + 1
    first = stages.first
    assert first["encoder.embed.conv.2"] == 0 and first["encoder.1.attn"] == 2
    assert first["decoder.embed"] == 3 and first["decoder.1.ffn"] == 5
    assert first["ctc.ctc_lo"] == first["decoder.output_layer"] == 6
    n_frames = int(lengths.sum())
    assert batch.n_rows == n_frames and judged.n_sentences == 6


def test_clusters_change_nothing_below_their_stage(asr, asr_exp, speech_dir):
    """What enters the first stage of a cluster does not depend on it, for every cluster."""
    exp = asr.load(asr_exp.path)
    judged, weights = asr.judged(exp, asr.read(exp, speech_dir), 10**6), exp.weights
    inputs = judged.batches[0].inputs
    stages = judged.stages

    def entering(stage):
        x = inputs
        for layer in stages.layers[:stage]:
            x = layer(x, inputs)
        found = []

        def gather(value):
            if isinstance(value, tuple):
                for one in value:
                    gather(one)
            elif isinstance(value, torch.Tensor):
                found.append(value)

        gather(x)
        return found

    with torch.no_grad():
        for name, stage in stages.first.items():
            before = entering(stage)
            out = stages.run(inputs, inputs)
            fp = [m.clone() for m in weights.mats(name)]
            weights.set(name, [m * 1.5 for m in fp])
            after = entering(stage)
            assert all(torch.equal(a, b) for a, b in zip(before, after)), name
            assert not torch.allclose(stages.run(inputs, inputs), out), name
            weights.set(name, fp)


@pytest.mark.parametrize(
    "options",
    [
        dict(encoder_conf=dict(interctc_layer_idx=[1], interctc_use_conditioning=True)),
        dict(encoder="rnn", plain=True, encoder_conf=dict(hidden_size=8, output_size=16)),
    ],
    ids=["conditioned", "rnn"],
)
def test_other_models_are_judged_as_a_whole(asr, make_asr_exp, speech_dir, tmp_path, options):
    exp = asr.load(make_asr_exp(tmp_path / "asr", **options).path)
    exp.model.train()  # judged_asr turns dropout off
    speech = asr.read(exp, speech_dir)
    judged = asr.judged(exp, speech, 1)
    assert len(judged.stages.layers) == 1 + 1 + 2 + 1
    ctc, tokens = host_posteriors(exp.model, speech, 0)
    logits = next(judged.logits()).detach().log_softmax(-1)
    torch.testing.assert_close(logits, torch.cat([ctc, tokens]), rtol=0, atol=1e-5)


def test_ctc_alone_needs_no_text(asr, make_asr_exp, speech_dir, tmp_path):
    exp = asr.load(make_asr_exp(tmp_path / "asr", ctc_weight=1.0).path)
    speech = asr.read(exp, speech_dir, needs_text=False)
    judged = asr.judged(exp, speech, 10**6)
    assert judged.unit == "nats/frame" and judged.batches[0].inputs.tokens is None
    meter = KlMeter(judged, exp.weights)
    harms = [meter.entry("encoder.0.attn", ClusterSpec(b)).harm for b in (8, 4, 2, 1)]
    assert 0 < harms[0] < harms[1] < harms[2] < harms[3]


def test_attention_alone_is_in_nats_a_token(asr, make_asr_exp, speech_dir, tmp_path):
    exp = asr.load(make_asr_exp(tmp_path / "asr", ctc_weight=0.0).path)
    judged = asr.judged(exp, asr.read(exp, speech_dir), 10**6)
    assert judged.unit == "nats/token" and exp.model.ctc is None
    n_tokens = sum(len(x) + 1 for x in asr.read(exp, speech_dir).tokens)
    assert judged.n_rows == n_tokens


def test_fisher_weighs_heads_as_the_harm_does(asr, conformer_exp, speech_dir):
    """Traces of both heads: those of each, weighted; the Hessian, which needs a loss, says so."""
    exp = asr.load(conformer_exp.path)
    speech, weights = asr.read(exp, speech_dir), exp.weights

    def squares(heads):
        judged = asr.judged(exp, speech, 10**6, heads)
        generator = torch.Generator().manual_seed(1)
        n = int(judged.batches[0].mask.sum())
        full = torch.zeros(n, 31)
        if heads and "decoder" not in heads:
            full = torch.randn(n, 31, generator=generator)
        return FisherMeter(judged, weights), judged, full

    meter, judged, random = squares({"ctc": 1.0})
    alone = meter.squares([random])
    scaled, other, _ = squares({"ctc": 0.25})
    for name, value in scaled.squares([random]).items():
        assert value == pytest.approx(0.25 * alone[name], rel=1e-4), name
    assert alone["decoder.embed"] == 0 < alone["encoder.0.attn"]
    both, joint, _ = squares(None)
    # Random vectors that leave the tokens out: the frames' part alone, at its weight.
    mask = joint.batches[0].mask
    is_frame = (joint.batches[0].counts > 0)[mask]
    rows = torch.zeros(int(mask.sum()), 31)
    rows[is_frame] = random
    for name, value in both.squares([rows]).items():
        assert value == pytest.approx(0.3 * alone[name], rel=1e-4, abs=1e-12), name
    with pytest.raises(InputError, match="--method fisher"):
        HessianMeter(judged, weights)
    with pytest.raises(InputError, match="printed form needs targets"):
        KlMeter(judged, weights, printed_form=True)
