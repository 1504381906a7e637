"""mpq perplexity: the host's number, the words around it, the file it writes."""

from __future__ import annotations

import argparse
import json
import math

import pytest

from espnet_mpq.bin import perplexity as command
from espnet_mpq.errors import InputError


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
    assert f"{written['ppl']:.4f}" in printed
    assert (
        written["n_sentences"] == 60 and written["provenance"]["lm_file"] == fp_exp.checkpoint.name
    )
    words = written["n_words"] + written["n_sentences"]
    assert written["word_ppl"] == pytest.approx(math.exp(written["nll_nats"] / words))
    plain = command.measure(fp_exp.path, text_file, batch_size=3)
    assert plain["ppl"] == pytest.approx(expected, rel=1e-6)


def test_packed_and_quantized_directories(
    host, packed_exp, quantized_exp, kaldi_text_file, tmp_path
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
    assert "1 words (1 tokens), scored as <unk>" in capsys.readouterr().out


def test_text_is_checked_before_the_host_is_started(tmp_path):
    with pytest.raises(InputError, match="cannot read the text"):
        command.main(parse(tmp_path, "--text", tmp_path / "nothing"))
