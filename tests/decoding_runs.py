"""Decoding with the host's searches, for several test files."""

from __future__ import annotations

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
