"""Decoding with the host's searches, for several test files."""

from __future__ import annotations

import random

import pytest
import torch


def speech2text(asr_exp, lm_exp, **options):
    from espnet2.bin.asr_inference import Speech2Text

    return Speech2Text(
        asr_train_config=str(asr_exp.config),
        asr_model_file=str(asr_exp.checkpoint),
        lm_train_config=str(lm_exp.config),
        lm_file=str(lm_exp.checkpoint),
        beam_size=3,
        lm_weight=2.0,
        ctc_weight=0.3,
        maxlenratio=0.5,
        nbest=3,
        **options,
    )


def hypotheses(decoder, speech):
    """(token ids, total score, LM score) of the n-best list."""
    found = []
    for result in decoder(speech):
        hypothesis = result[-1]
        ids = [int(i) for i in hypothesis.yseq]
        found.append((ids, float(hypothesis.score), float(hypothesis.scores["lm"])))
    return found


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    assert [h[0] for h in ours] == [h[0] for h in theirs]
    for got, expected in zip(ours, theirs):
        assert got[1:] == pytest.approx(expected[1:], abs=2e-4)


def check_attention_and_ctc_search(asr_exp, packed, quantized, fp, speech, search):
    """The packed LM's n-best list is that of its float values; ``search``: batch or single."""
    from espnet.nets.batch_beam_search import BatchBeamSearch
    from espnet.nets.beam_search import BeamSearch

    found = []
    for lm_exp in (packed, quantized, fp):
        decoder = speech2text(asr_exp, lm_exp)
        assert isinstance(decoder.beam_search, BatchBeamSearch)
        if search == "single":
            decoder.beam_search.__class__ = BeamSearch
        found.append(hypotheses(decoder, speech))
    same(found[0], found[1])
    assert len(found[0][0][0]) > 4
    # The test would see nothing if the LM did not matter: the fp LM scores differently.
    assert found[2][0][1] != pytest.approx(found[0][0][1], abs=1e-2)


def check_changing_beam(packed, quantized, n_tokens: int):
    """Hypotheses split, die and reorder; every score is that of the float LM on all its tokens."""
    rng = random.Random(0)
    beam = [((n_tokens - 1,), packed.init_state(None))]
    for _ in range(12):
        ys = torch.tensor([prefix for prefix, _ in beam])
        scores, states = packed.batch_score(ys, [state for _, state in beam], None)
        with torch.no_grad():
            want = quantized(ys, None)[0][:, -1].log_softmax(-1)
        torch.testing.assert_close(scores, want, atol=1e-5, rtol=0)
        grown = []
        for i, (prefix, _) in enumerate(beam):
            for token in rng.sample(range(1, n_tokens), 3):
                grown.append((prefix + (token,), packed.select_state(states, i)))
        rng.shuffle(grown)
        beam = grown[: rng.choice((1, 2, 3, 5, 10))]


def transducer_hypotheses(transducer, lm, search: str):
    """(token ids, score) of the n-best list; ``transducer`` is what toy_transducer gives."""
    from espnet2.asr.transducer.beam_search_transducer import BeamSearchTransducer

    decoder, joint, encoded = transducer
    options = dict(beam_size=4, lm_weight=0.4, u_max=12, nstep=2, nbest=3)
    searcher = BeamSearchTransducer(decoder, joint, lm=lm, search_type=search, **options)
    with torch.no_grad():
        found = [([int(i) for i in h.yseq], float(h.score)) for h in searcher(encoded)]
    assert max(len(h[0]) for h in found) > 4
    return found


def toy_transducer(n_tokens: int):
    """A prediction network that says the last label, and a joint network that wants the label
    of the frame once and then a blank: hypotheses have about one label per frame."""
    from espnet2.asr.decoder.transducer_decoder import TransducerDecoder

    class LastLabel(TransducerDecoder):
        def rnn_forward(self, x, state):
            return x, state

    class Joint(torch.nn.Module):
        def forward(self, encoded, last_label):
            said = (encoded.softmax(-1) * last_label).sum(-1, keepdim=True)
            labels = (encoded + 0 * last_label)[..., 1:]
            return torch.cat([7 * said, labels], dim=-1)

    decoder = LastLabel(n_tokens, hidden_size=n_tokens).eval()
    decoder.embed.weight.data = torch.eye(n_tokens)
    labels = torch.tensor([5, 9, 4, 20, 2, 7, 11])
    encoded = 4 * torch.nn.functional.one_hot(labels, n_tokens).float()
    return decoder, Joint(), encoded + 0.5 * torch.randn(encoded.shape)
