"""The host's own searches with a packed LM find what they find with its float values."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def speech():
    soundfile = pytest.importorskip("soundfile")
    del soundfile
    generator = torch.Generator().manual_seed(5)
    return (0.1 * torch.randn(5000, generator=generator)).numpy()


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


@pytest.mark.parametrize("search", ["batch", "single"])
def test_attention_and_ctc_search(asr_exp, packed_exp, quantized_exp, fp_exp, speech, search):
    from espnet.nets.batch_beam_search import BatchBeamSearch
    from espnet.nets.beam_search import BeamSearch

    found = []
    for lm_exp in (packed_exp, quantized_exp, fp_exp):
        decoder = speech2text(asr_exp, lm_exp)
        assert isinstance(decoder.beam_search, BatchBeamSearch)
        if search == "single":
            decoder.beam_search.__class__ = BeamSearch
        found.append(hypotheses(decoder, speech))
    same(found[0], found[1])
    assert len(found[0][0][0]) > 5
    # The test would see nothing if the LM did not matter: the fp LM scores differently.
    assert found[2][0][1] != pytest.approx(found[0][0][1], abs=1e-2)


def test_length_penalty_and_double_precision(asr_exp, packed_exp, quantized_exp, speech):
    same(
        *(
            hypotheses(speech2text(asr_exp, e, penalty=0.1), speech)
            for e in (packed_exp, quantized_exp)
        )
    )
    decoder = speech2text(asr_exp, packed_exp, dtype="float64")
    buffers = dict(decoder.beam_search.full_scorers["lm"].named_buffers())
    codes = [b for name, b in buffers.items() if b.dtype == torch.uint8]
    assert codes, sorted(buffers)
    same(hypotheses(decoder, speech.astype("float64")), hypotheses(decoder, speech))


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


@pytest.mark.parametrize("search", ["default", "tsd", "alsd", "nsc", "maes"])
def test_transducer_searches(host, packed_exp, quantized_exp, search):
    """zero_state and batch_score with last tokens only; score with growing prefixes."""
    from espnet2.asr.transducer.beam_search_transducer import BeamSearchTransducer

    torch.manual_seed(3)
    decoder, joint, encoded = toy_transducer(len(packed_exp.token_list))
    found = []
    for exp in (packed_exp, quantized_exp):
        model, _ = host.LMTask.build_model_from_file(str(exp.config), str(exp.checkpoint))
        searcher = BeamSearchTransducer(
            decoder,
            joint,
            beam_size=4,
            lm=model.lm.eval(),
            lm_weight=0.4,
            search_type=search,
            u_max=12,
            nstep=2,
            nbest=3,
        )
        with torch.no_grad():
            found.append([([int(i) for i in h.yseq], float(h.score)) for h in searcher(encoded)])
    same(*found)
    assert max(len(h[0]) for h in found[0]) > 4


def test_asr_inference_command(asr_exp, packed_exp, quantized_exp, speech, tmp_path):
    """The command of a recipe's stage 12, in this process: same text, same scores."""
    import soundfile
    from espnet2.bin import asr_inference

    wav = tmp_path / "a.wav"
    soundfile.write(wav, speech, 16000)
    (tmp_path / "wav.scp").write_text(f"utt-a {wav}\n", encoding="utf-8")
    for name, lm_exp in (("packed", packed_exp), ("quantized", quantized_exp)):
        asr_inference.main(
            cmd=[
                *("--output_dir", str(tmp_path / name), "--ngpu", "0", "--num_workers", "0"),
                *("--data_path_and_name_and_type", f"{tmp_path}/wav.scp,speech,sound"),
                *("--asr_train_config", str(asr_exp.config)),
                *("--asr_model_file", str(asr_exp.checkpoint)),
                *("--lm_train_config", str(lm_exp.config), "--lm_file", str(lm_exp.checkpoint)),
                *("--beam_size", "3", "--lm_weight", "2.0", "--ctc_weight", "0.3"),
                *("--maxlenratio", "0.5"),
            ]
        )
    ours, theirs = (tmp_path / name / "1best_recog" for name in ("packed", "quantized"))
    text = (ours / "text").read_text(encoding="utf-8")
    assert len(text.split(maxsplit=1)[1]) > 3
    assert text == (theirs / "text").read_text(encoding="utf-8")
