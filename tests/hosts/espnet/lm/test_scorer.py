"""LM experiments as scorers: equal to the host's own model, one hypothesis after the other."""

from __future__ import annotations

import pytest
import torch
import yaml

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.hosts.espnet.experiment.opened import load_lm
from espnet_mpq.hosts.espnet.lm.scorer import open_scorer
from espnet_mpq.hosts.espnet.lm.tokenizer import build_tokenizer

TEXTS = [
    "the cat sees a tree",
    "the cat sees a house",
    "the cat",
    "the old man",
    "",
    "she",
    "zz 9 unheard of",
    "the cat sees a tree",  # twice
    " ".join(["it has some water"] * 100),  # 400 words
]
HYPS = [(text, None) for text in TEXTS]


def naive(lm_exp, texts=TEXTS):
    """Log-probabilities by the host's model and preprocessor alone."""
    exp = load_lm(lm_exp)
    preprocess = build_tokenizer(exp.args, str(exp.config))
    found = []
    for text in texts:
        ids = torch.from_numpy(preprocess("utt", {"text": text})["text"]).long()
        with torch.no_grad():
            nll, _ = exp.model.nll(ids[None], torch.tensor([len(ids)]))
        found.append(-float(nll.double().sum()))
    return found


@pytest.fixture(scope="module")
def word_exp(make_lm_exp, tiny_text, tmp_path_factory):
    """A word LM with random weights."""
    words = sorted({word for line in tiny_text for word in line.split()})
    folder = tmp_path_factory.mktemp("word") / "lm"
    tokens = ["<blank>", "<unk>", *words, "<sos/eos>"]
    exp = make_lm_exp(folder, token_list=tokens, n_steps=0)
    return with_settings(exp, token_type="word")


@pytest.fixture(scope="module")
def bpe_exp(make_lm_exp, tiny_text, text_file, tmp_path_factory):
    """A sentencepiece LM with random weights, a GRU."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("bpe") / "lm"
    folder.mkdir()
    spm.SentencePieceTrainer.train(
        input=str(text_file), model_prefix=str(folder / "bpe"), vocab_size=40, model_type="bpe"
    )
    vocab = (folder / "bpe.vocab").read_text(encoding="utf-8").splitlines()
    pieces = [line.split("\t")[0] for line in vocab][3:]
    tokens = ["<blank>", "<unk>", *pieces, "<sos/eos>"]
    conf = dict(unit=16, nlayers=1, rnn_type="gru")
    exp = make_lm_exp(folder, token_list=tokens, n_steps=0, lm_conf=conf)
    return with_settings(exp, token_type="bpe", bpemodel=str(folder / "bpe.model"))


@pytest.fixture(scope="module")
def transformer_exp(make_lm_exp, tmp_path_factory):
    conf = dict(pos_enc="sinusoidal", embed_unit=8, att_unit=16, head=2, unit=16, layer=2)
    folder = tmp_path_factory.mktemp("transformer") / "lm"
    return make_lm_exp(folder, lm="transformer", lm_conf=conf, n_steps=5)


def with_settings(exp, **settings):
    values = yaml.safe_load(exp.config.read_text(encoding="utf-8"))
    exp.config.write_text(yaml.safe_dump({**values, **settings}), encoding="utf-8")
    return exp


@pytest.mark.parametrize(
    "name", ["fp_exp", "quantized_exp", "word_exp", "bpe_exp", "transformer_exp", "packed_exp"]
)
def test_scores_of_the_host_hypothesis_by_hypothesis(name, request, float_activations):
    exp = request.getfixturevalue(name)
    found = [score.total for score in open_scorer("lm", exp.path).score(HYPS)]
    expected = naive(exp.path)
    # 1,800 characters in float32
    assert found[:-1] == pytest.approx(expected[:-1], abs=1e-4)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-6)
    assert len(set(expected)) == len(TEXTS) - 1


def test_packed_lm_on_kernels_equals_its_own_full_sequences(packed_exp, kernels):
    found = [score.total for score in open_scorer("lm", packed_exp.path).score(HYPS)]
    assert found == pytest.approx(naive(packed_exp.path), abs=1e-4, rel=1e-6)


def test_packed_transformer(transformer_exp, kernels, tmp_path):
    from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment
    from espnet_mpq.hosts.espnet.families import architecture_of
    from espnet_mpq.plan import ClusterSpec, Plan

    conf = transformer_exp.settings["lm_conf"]
    clusters = architecture_of("transformer", conf, 31).clusters()
    plan = Plan({c.name: ClusterSpec(4) for c in clusters})
    pack_experiment(transformer_exp.path, tmp_path / "packed", plan=plan)
    found = [score.total for score in open_scorer("lm", tmp_path / "packed").score(HYPS)]
    assert found == pytest.approx(naive(tmp_path / "packed"), abs=1e-4, rel=1e-5)


def test_backward_lm_reads_the_words_from_the_end(fp_exp):
    scorer = open_scorer("lm", fp_exp.path, backward=True)
    found = [score.total for score in scorer.score(HYPS[:3])]
    turned = ["tree a sees cat the", "house a sees cat the", "cat the"]
    assert found == pytest.approx(naive(fp_exp.path, turned), abs=1e-4)
    assert scorer.identity() != open_scorer("lm", fp_exp.path).identity()


@pytest.mark.parametrize("name", ["fp_exp", "word_exp", "bpe_exp"])
def test_scores_of_words_add_up(name, request):
    exp = request.getfixturevalue(name)
    for (text, _), score in zip(HYPS, open_scorer("lm", exp.path, per_word=True).score(HYPS)):
        assert len(score.words) == len(text.split()) + 1
        assert sum(score.words) == pytest.approx(score.total)


def test_a_word_of_a_character_lm_ends_with_its_space(fp_exp):
    scorer = open_scorer("lm", fp_exp.path, per_word=True)
    one, other = scorer.score([("she has it", None), ("she", None)])
    ids = scorer.tokenizer.encode("she has it")
    assert ids[1] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3]
    assert one.words[0] < other.words[0]  # the space is not certain


def test_tokens_of_the_first_pass(fp_exp):
    scorer = open_scorer("lm", fp_exp.path, tokens_from="nbest")
    (found,) = scorer.score([("anything", "s h e <space> h a s")])
    assert found.total == pytest.approx(naive(fp_exp.path, ["she has"])[0], abs=1e-4)
    with pytest.raises(MismatchError, match="▁she, Q in 'she'.*--tokens text"):
        scorer.score([("she", "▁she Q")])
    with pytest.raises(InputError, match="have no tokens"):
        scorer.score([("she", None)])


def test_text_of_another_alphabet(fp_exp):
    scorer = open_scorer("lm", fp_exp.path)
    with pytest.raises(MismatchError, match="knows no token.*found 'ЁЖ'.*letter case"):
        scorer.check([("ЁЖ", None), ("", None)])
    assert scorer.unknown() == ""
    scorer.score([("a Ё", None)])
    assert scorer.unknown() == "1 of 3 tokens are unknown to lm"
    scorer.check([("", None)])
    scorer.check([("ЁЖ a", None)])
