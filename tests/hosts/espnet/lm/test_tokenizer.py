"""The host's tokenizer: its own tokens, unknown words, batches against the host's loss."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch

from espnet_mpq.errors import InputError
from espnet_mpq.text import batches


@pytest.fixture(scope="module")
def tokenizer(host):
    from espnet_mpq.hosts.espnet.lm import tokenizer

    return tokenizer


@pytest.fixture(scope="module")
def exp(host, fp_exp):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    return load_fp_lm(fp_exp.path)


def write(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_counts_unknown_words(tokenizer, exp, caplog):
    """5 characters are no tokens, in the words N\u00d6 (both) and 9to5 (twice) and 7."""
    with caplog.at_level(logging.WARNING, "espnet_mpq"):
        got = tokenizer.tokenize(exp, [("u", "the N\u00d6 cat"), ("v", "9to5 the 7"), ("w", "it")])
    assert (got.n_oov_tokens, got.n_oov_words) == (5, 3)
    assert got.n_words == [3, 3, 1]
    assert got.ids[1].tolist()[:4] == [1, *(exp.vocabulary.tokens.index(c) for c in "to"), 1]
    assert "5 of 22 tokens" in caplog.text and "(in 3 of 7 words)" in caplog.text
    assert got.n_tokens == 22 + 3
    with pytest.raises(InputError, match="no token of the text is known.*letter case"):
        tokenizer.tokenize(exp, [("u", "\u0416\u0416")])


def test_batches_give_the_hosts_loss(tokenizer, exp, tiny_text):
    """Sum of our masked losses = the host's nll, whatever the batch size."""
    tokenized = tokenizer.tokenize(exp, [(str(i), s) for i, s in enumerate(tiny_text)])
    lengths = torch.tensor([len(x) for x in tokenized.ids])
    padded = torch.nn.utils.rnn.pad_sequence(tokenized.ids, batch_first=True)
    with torch.no_grad():
        nll, _ = exp.model.nll(padded, lengths)
    expected = nll.double().sum(1)
    for options in ({"batch_size": 7}, {"batch_size": 1}, {"max_batch_tokens": 64}, {}):
        rows, widths = [], []
        for inputs, targets, mask in batches(tokenized, exp.vocabulary.special_ids, **options):
            assert inputs.dtype == targets.dtype == torch.int64 and mask.dtype == torch.bool
            assert (inputs[:, 0] == exp.vocabulary.special_ids["sos"]).all()
            with torch.no_grad():
                logp = exp.module(inputs, None)[0].log_softmax(-1)
            picked = -logp.gather(-1, targets[..., None])[..., 0].double()
            rows.append((picked * mask).sum(1))
            widths.append(inputs.shape)
        assert torch.allclose(torch.cat(rows), expected, rtol=1e-6)
        if "max_batch_tokens" in options:
            assert all(b == 1 or b * t <= 64 for b, t in widths)


def test_sample_keeps_whole_sentences_and_order(tokenizer, exp, tiny_text):
    tokenized = tokenizer.tokenize(exp, [(str(i), s) for i, s in enumerate(tiny_text)])
    some = tokenized.sample(300, seed=1)
    assert 260 <= some.n_tokens <= 300
    positions = [int(u) for u in some.utts]
    assert positions == sorted(positions)
    for position, ids in zip(positions, some.ids):
        assert torch.equal(ids, tokenized.ids[position])
    assert some.utts == tokenized.sample(300, seed=1).utts != tokenized.sample(300, seed=2).utts
    assert tokenized.sample(None) is tokenized and len(tokenized.sample(1)) == 1


def test_word_tokens(tokenizer, make_lm_exp, tmp_path):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    tokens = ["<blank>", "<unk>", "the", "cat", "sees", "<sos/eos>"]
    made = make_lm_exp(tmp_path / "word", token_list=tokens, n_steps=0, keep_nbest_models=1)
    config = made.config.read_text(encoding="utf-8").replace("token_type: char", "token_type: word")
    made.config.write_text(config, encoding="utf-8")
    got = tokenizer.tokenize(load_fp_lm(made.path), [("u", "the cat sees the bird")])
    assert got.ids[0].tolist() == [2, 3, 4, 2, 1]
    assert (got.n_oov_tokens, got.n_oov_words) == (1, 1)


def test_bpe_model_is_found_or_searched_aloud(
    tokenizer, make_lm_exp, tmp_path, tiny_text, monkeypatch
):
    spm = pytest.importorskip("sentencepiece")
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    corpus = write(tmp_path / "corpus", "\n".join(tiny_text))
    prefix = tmp_path / "recipe" / "data" / "bpe" / "bpe"
    prefix.parent.mkdir(parents=True)
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(prefix), vocab_size=40, minloglevel=2
    )
    model = spm.SentencePieceProcessor(model_file=f"{prefix}.model")
    pieces = [model.id_to_piece(i) for i in range(3, model.get_piece_size())]
    made = make_lm_exp(
        tmp_path / "recipe" / "exp" / "lm_bpe",
        token_list=["<blank>", "<unk>", *pieces, "<sos/eos>"],
        n_steps=0,
        bpemodel="data/bpe/bpe.model",
    )
    config = made.config.read_text(encoding="utf-8").replace("token_type: char", "token_type: bpe")
    made.config.write_text(config, encoding="utf-8")
    exp = load_fp_lm(made.path)
    monkeypatch.chdir(tmp_path)  # not the recipe folder
    got = tokenizer.tokenize(exp, [("u", tiny_text[0])])
    expected = model.encode(tiny_text[0], out_type=str)
    assert [list(exp.vocabulary.tokens)[i] for i in got.ids[0]] == expected
    Path(f"{prefix}.model").unlink()
    with pytest.raises(InputError, match="bpemodel file of .*missing.*data/bpe/bpe.model"):
        tokenizer.tokenize(exp, [("u", tiny_text[0])])


def test_white_space_without_a_token_is_named(tokenizer, exp, caplog):
    """The blank has a token, other white space and zero-width signs have none."""
    with caplog.at_level(logging.WARNING, "espnet_mpq"):
        got = tokenizer.tokenize(exp, [("u", "it\u2028is\tit"), ("v", "a\u200b it is")])
    assert (got.n_oov_tokens, got.n_oov_words, got.n_words) == (3, 1, [3, 3])
    assert r"scored as <unk>: '\t' '\u2028' 'a\u200b' ..." in caplog.text


@pytest.mark.parametrize("content", ["<noise>\n\n<x>\n", "<noise>\n \t\n"])
def test_an_empty_symbol_is_refused(tokenizer, exp, tmp_path, content):
    """The host's tokenizer would find it without end."""
    symbols = write(tmp_path / "nlsyms", content)
    args = copy.copy(exp.args)
    args.non_linguistic_symbols = str(symbols)
    with pytest.raises(InputError, match="nlsyms, non-linguistic .* an empty one in line 2"):
        tokenizer.build_tokenizer(args)
    write(symbols, "<noise>\r\n<x>\n")
    assert len(tokenizer.build_tokenizer(args)("u", {"text": "a<noise>"})["text"]) == 2
