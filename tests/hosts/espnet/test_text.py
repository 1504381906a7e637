"""Text: formats, damage, the host's own tokens, batches against the host's loss."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import pytest
import torch

from espnet_mpq.errors import InputError


@pytest.fixture(scope="module")
def text(host):
    from espnet_mpq.hosts.espnet import text

    return text


@pytest.fixture(scope="module")
def exp(host, fp_exp):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    return load_fp_lm(fp_exp.path)


def write(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["an406-fcaw-b ERASE C", "an407-fcaw-b HELLO"], "kaldi"),
        (["1089-134686-0000 HE HOPED", "1089-134686-0001 STUFF IT"], "kaldi"),
        (["the cat", "a dog"], "plain"),
        (["utt1 a", "utt1 b"], "plain"),
        (["1984 was a year", "2001 another"], "plain"),
        (["he said", "she said", "they said", "4th of july"], "plain"),
        (["0001 HELLO", "0002 WORLD"], "kaldi"),
        (["9 a", "10 b", "11 c"], "kaldi"),
        (["spk-a one", "spk-b two"], "kaldi"),
        (["spk_a one", "spk_b two"], "kaldi"),
        ([f"utt{n or 1} a" for n in range(500)], "kaldi"),  # one repeated id
        ([f"utt{n or 1} a" for n in range(50)], "plain"),
        (["10 men", "9 men", "8 men", "no men"], "plain"),
        (["well-known facts"], "plain"),
        (["- hello", "- who is there"], "plain"),
        (["12 men", "12 angry men"], "plain"),
        ([], "plain"),
    ],
)
def test_guesses_the_format(text, lines, expected):
    assert text.guess_format(lines)[0] == expected


@pytest.mark.parametrize(
    "lines, mixed",
    [
        (["0001 a", "0002 b"], False),
        (["utt1 a", "utt2 b"], False),
        (["the cat", "a dog", "4th of july"], False),
        (["1984 was a year", "2001 another"], True),
        (["300 a", "200 b", "100 c"], True),  # one width, in no order
        ([f"utt{n or 1} a" for n in range(500)], True),
        (["utt1 a", "utt1 b"], True),
        (["utt1 a", "utt2 b", "hello c"], True),
    ],
)
def test_mixed_evidence_is_a_warning(text, tmp_path, caplog, lines, mixed):
    assert text.guess_format(lines)[1] == mixed
    path = write(tmp_path / "text", "\n".join(lines))
    with caplog.at_level(logging.INFO, "espnet_mpq"):
        text.read_text(path)
    level = logging.WARNING if mixed else logging.INFO
    assert [r.levelno for r in caplog.records] == [level]
    assert "--text_format" in caplog.text
    caplog.clear()
    text.read_text(path, "plain")
    assert caplog.text == ""


def test_reads_plain_kaldi_and_gzip(text, tmp_path, caplog):
    plain = write(tmp_path / "plain", "a b\n\n  \r\nc\r\n")
    with caplog.at_level(logging.WARNING, "espnet_mpq"):
        assert text.read_text(plain) == [("line0000001", "a b"), ("line0000004", "c")]
    assert "2 of 4 lines are empty" in caplog.text
    kaldi = write(tmp_path / "text", "\ufeffutt-1 a  b \nutt-2\nutt-3 \u00e9t\u00e9\n")
    assert text.read_text(kaldi) == [("utt-1", "a  b"), ("utt-3", "\u00e9t\u00e9")]
    assert text.read_text(kaldi, "plain")[1] == ("line0000002", "utt-2")
    packed = write(tmp_path / "t.gz", gzip.compress(b"a b\nc"))
    assert [s for _, s in text.read_text(packed)] == ["a b", "c"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no sentence: found an empty file"),
        (b"\n \n", "no sentence: found 2 lines, all empty"),
        (b"good\nbad \xff\n", "not UTF-8 text: found byte 0xff in line 2"),
    ],
)
def test_bad_files(text, tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        text.read_text(write(tmp_path / "text", content))


def test_bad_arguments(text, tmp_path):
    with pytest.raises(InputError, match="cannot read the text .*nothing"):
        text.read_text(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot read the text .*bad.gz"):
        text.read_text(write(tmp_path / "bad.gz", b"no gzip"))
    with pytest.raises(InputError, match="did you mean 'kaldi'"):
        text.read_text(tmp_path / "nothing", "kaldy")


def test_counts_unknown_words(text, exp, caplog):
    """5 characters are no tokens, in the words N\u00d6 (both) and 9to5 (twice) and 7."""
    with caplog.at_level(logging.WARNING, "espnet_mpq"):
        got = text.tokenize(exp, [("u", "the N\u00d6 cat"), ("v", "9to5 the 7"), ("w", "it")])
    assert (got.n_oov_tokens, got.n_oov_words) == (5, 3)
    assert got.n_words == [3, 3, 1]
    assert got.ids[1].tolist()[:4] == [1, *(exp.token_list.index(c) for c in "to"), 1]
    assert "5 of 22 tokens" in caplog.text and "(in 3 of 7 words)" in caplog.text
    assert got.n_tokens == 22 + 3
    with pytest.raises(InputError, match="no token of the text is known.*letter case"):
        text.tokenize(exp, [("u", "\u0416\u0416")])


def test_batches_give_the_hosts_loss(text, exp, tiny_text):
    """Sum of our masked losses = the host's nll, whatever the batch size."""
    tokenized = text.tokenize(exp, [(str(i), s) for i, s in enumerate(tiny_text)])
    lengths = torch.tensor([len(x) for x in tokenized.ids])
    padded = torch.nn.utils.rnn.pad_sequence(tokenized.ids, batch_first=True)
    with torch.no_grad():
        nll, _ = exp.model.nll(padded, lengths)
    expected = nll.double().sum(1)
    for options in ({"batch_size": 7}, {"batch_size": 1}, {"max_batch_tokens": 64}, {}):
        rows, widths = [], []
        for inputs, targets, mask in text.batches(exp, tokenized, **options):
            assert inputs.dtype == targets.dtype == torch.int64 and mask.dtype == torch.bool
            assert (inputs[:, 0] == exp.special_ids["sos"]).all()
            with torch.no_grad():
                logp = exp.lm(inputs, None)[0].log_softmax(-1)
            picked = -logp.gather(-1, targets[..., None])[..., 0].double()
            rows.append((picked * mask).sum(1))
            widths.append(inputs.shape)
        assert torch.allclose(torch.cat(rows), expected, rtol=1e-6)
        if "max_batch_tokens" in options:
            assert all(b == 1 or b * t <= 64 for b, t in widths)


def test_sample_keeps_whole_sentences_and_order(text, exp, tiny_text):
    tokenized = text.tokenize(exp, [(str(i), s) for i, s in enumerate(tiny_text)])
    some = tokenized.sample(300, seed=1)
    assert 260 <= some.n_tokens <= 300
    positions = [int(u) for u in some.utts]
    assert positions == sorted(positions)
    for position, ids in zip(positions, some.ids):
        assert torch.equal(ids, tokenized.ids[position])
    assert some.utts == tokenized.sample(300, seed=1).utts != tokenized.sample(300, seed=2).utts
    assert tokenized.sample(None) is tokenized and len(tokenized.sample(1)) == 1


def test_word_tokens(text, make_lm_exp, tmp_path):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    tokens = ["<blank>", "<unk>", "the", "cat", "sees", "<sos/eos>"]
    made = make_lm_exp(tmp_path / "word", token_list=tokens, n_steps=0, keep_nbest_models=1)
    config = made.config.read_text(encoding="utf-8").replace("token_type: char", "token_type: word")
    made.config.write_text(config, encoding="utf-8")
    got = text.tokenize(load_fp_lm(made.path), [("u", "the cat sees the bird")])
    assert got.ids[0].tolist() == [2, 3, 4, 2, 1]
    assert (got.n_oov_tokens, got.n_oov_words) == (1, 1)


def test_bpe_model_is_found_or_searched_aloud(text, make_lm_exp, tmp_path, tiny_text, monkeypatch):
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
    got = text.tokenize(exp, [("u", tiny_text[0])])
    expected = model.encode(tiny_text[0], out_type=str)
    assert [exp.token_list[i] for i in got.ids[0]] == expected
    Path(f"{prefix}.model").unlink()
    with pytest.raises(InputError, match="bpemodel file of .*missing.*data/bpe/bpe.model"):
        text.tokenize(exp, [("u", tiny_text[0])])
