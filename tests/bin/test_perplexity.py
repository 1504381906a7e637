"""mpq perplexity: the host's number, the words around it, the file it writes."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from espnet_mpq.bin import perplexity as command
from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.perplexity import perplexity
from espnet_mpq.hosts.espnet.experiment.opened import load_lm
from espnet_mpq.hosts.espnet.lm.perplexity import measure
from espnet_mpq.hosts.espnet.lm.tokenizer import tokenize
from espnet_mpq.text import read_text


def parse(*options):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(o) for o in options])


def host_perplexity(config, model, text, output_dir) -> float:
    from espnet2.bin import lm_calc_perplexity

    lm_calc_perplexity.main(
        cmd=[
            *("--data_path_and_name_and_type", f"{text},text,text", "--num_workers", "0"),
            *("--train_config", str(config), "--model_file", str(model)),
            *("--output_dir", str(output_dir), "--batch_size", "4"),
        ]
    )
    return float((output_dir / "ppl").read_text())


def test_same_number_as_the_host(host, fp_exp, kaldi_text_file, text_file, tmp_path, capsys):
    expected = host_perplexity(fp_exp.config, fp_exp.checkpoint, kaldi_text_file, tmp_path / "ppl")
    assert 1.5 < expected < 10
    out = tmp_path / "perplexity.json"
    command.main(parse(fp_exp.path, "--text", kaldi_text_file, "--json", out))
    printed = capsys.readouterr().out
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["ppl"] == pytest.approx(expected, rel=1e-6)
    assert f"{written['ppl']:.4f}" in printed and "text, read as kaldi lines" in printed
    assert written["provenance"]["text_format"] == "kaldi"
    assert (
        written["n_sentences"] == 60 and written["provenance"]["lm_file"] == fp_exp.checkpoint.name
    )
    words = written["n_words"] + written["n_sentences"]
    assert written["word_ppl"] == pytest.approx(math.exp(written["nll_nats"] / words))
    plain = command.measure(fp_exp.path, text_file, batch_size=3)
    assert plain["ppl"] == pytest.approx(expected, rel=1e-6)


def test_packed_and_quantized_directories(
    host, packed_exp, quantized_exp, kaldi_text_file, tmp_path, float_activations
):
    """The host's command takes the packed file too, and all four numbers agree."""
    numbers = []
    for name, exp in (("packed", packed_exp), ("quantized", quantized_exp)):
        numbers.append(command.measure(exp.path, kaldi_text_file)["ppl"])
        out = tmp_path / name
        numbers.append(host_perplexity(exp.config, exp.checkpoint, kaldi_text_file, out))
    assert numbers == pytest.approx([numbers[0]] * 4, rel=1e-6)


def test_unknown_words_are_said(host, fp_exp, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("the 7 cats\n\nit\n", encoding="utf-8")
    command.main(parse(fp_exp.path, "--text", text))
    assert "1 word (1 token), scored as <unk>" in capsys.readouterr().out


def printed(nll_nats, n_tokens, n_words):
    result = perplexity(nll_nats, n_tokens, n_words).to_dict()
    record = {"lm_exp": "exp", "lm_file": "x.pth", "text": "text", "text_format": "plain"}
    return command.to_text({**result, "provenance": record})


def test_one_sentence_has_no_standard_error():
    text = printed([2 * math.log(7)], [2], [1])
    assert "per token  7.0000 (one sentence: no standard error)  (2 tokens, 1 of them a" in text
    assert "per word   7.0000 (one sentence: no standard error)  (1 word and 1 sent" in text
    assert "nan" not in text


def test_large_perplexities_are_short():
    text = printed([30 * math.log(10), 30 * math.log(10)], [3, 3], [2, 2])
    assert "per word   1e+10 +- 0.0000  (4 words and 2 sentence ends)" in text
    text = printed([4 * math.log(99999), 4 * math.log(99999)], [4, 4], [3, 3])
    assert "per token  99999.0000 +- 0.0000" in text
    assert "nan" not in printed([1e6, 1e6], [2, 2], [1, 1])


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_is_checked_first(tmp_path, batch_size):
    with pytest.raises(InputError, match=f"batch_size: found {batch_size}; expected at least 1"):
        command.main(parse(tmp_path, "--text", tmp_path / "no", "--batch_size", batch_size))


def test_weights_that_are_not_finite_give_no_perplexity(host, fp_exp, text_file):
    exp = load_lm(fp_exp.path)
    with torch.no_grad():
        exp.module.decoder.bias[3] = float("nan")
    text = tokenize(exp, read_text(text_file, "plain"))
    with pytest.raises(InputError, match="not finite.*check the checkpoint"):
        measure(exp, text)
    with pytest.raises(InputError, match="batch size: found 0"):
        measure(exp, text, batch_size=0)


def test_text_is_checked_before_the_host_is_started(tmp_path):
    with pytest.raises(InputError, match="cannot read the text"):
        command.main(parse(tmp_path, "--text", tmp_path / "nothing"))
