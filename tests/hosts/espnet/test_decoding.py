"""The host's own searches with a packed LM find what they find with its float values."""

from __future__ import annotations

import pytest
import torch
from decoding_runs import (
    check_attention_and_ctc_search,
    hypotheses,
    same,
    speech2text,
    toy_transducer,
    transducer_hypotheses,
)

# Scores compare to four decimals here; test_kernels.py decodes with int8 activations.
pytestmark = pytest.mark.usefixtures("float_activations")


@pytest.mark.parametrize("search", ["batch", "single"])
def test_attention_and_ctc_search(asr_exp, packed_exp, quantized_exp, fp_exp, speech, search):
    check_attention_and_ctc_search(asr_exp, packed_exp, quantized_exp, fp_exp, speech, search)


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


@pytest.mark.parametrize("search", ["default", "tsd", "alsd", "nsc", "maes"])
def test_transducer_searches(host, packed_exp, quantized_exp, search):
    """zero_state and batch_score with last tokens only; score with growing prefixes."""
    torch.manual_seed(3)
    transducer = toy_transducer(len(packed_exp.token_list))
    found = []
    for exp in (packed_exp, quantized_exp):
        model, _ = host.LMTask.build_model_from_file(str(exp.config), str(exp.checkpoint))
        found.append(transducer_hypotheses(transducer, model.lm.eval(), search))
    same(*found)


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
