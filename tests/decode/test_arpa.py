"""ARPA files: backing off by hand, unknown words, the same numbers as kenlm, damage."""

from __future__ import annotations

import gzip
import importlib.util
import math

import pytest

from espnet_mpq.decode.arpa import Ngram
from espnet_mpq.errors import InputError

ARPA = """\\data\\
ngram 1=5
ngram 2=4
ngram 3=2

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.5
-1.5\t</s>
-0.7\tthe\t-0.3
-1.2\tcat\t-0.2

\\2-grams:
-0.4\t<s> the\t-0.1
-0.6\tthe cat\t-0.05
-0.9\tcat </s>
-1.1\tcat cat\t-0.15

\\3-grams:
-0.2\t<s> the cat
-0.3\tthe cat </s>

\\end\\
"""


@pytest.fixture
def arpa(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(ARPA, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "words, log10",
    [
        (["the", "cat"], [-0.4, -0.2, -0.3]),
        # p(cat | <s>) backs off to the unigram; p(the | <s> cat): no context, b(cat) + unigram
        (["cat", "the"], [-0.5 - 1.2, -0.2 - 0.7, -0.3 - 1.5]),
        # p(cat | the cat): b(the cat) + bigram; p(</s> | cat cat): b(cat cat) + bigram
        (["the", "cat", "cat"], [-0.4, -0.2, -0.05 - 1.1, -0.15 - 0.9]),
        (["the", "dog"], [-0.4, -0.1 - 0.3 - 1.0, -1.5]),
        ([], [-0.5 - 1.5]),
    ],
)
def test_backing_off_by_hand(arpa, words, log10):
    found = Ngram(arpa, use_kenlm=False).word_log_probs(words)
    assert found == pytest.approx([math.log(10) * x for x in log10], abs=1e-9)


def test_same_as_kenlm(arpa):
    if importlib.util.find_spec("kenlm") is None:
        pytest.skip("kenlm is not installed")
    ours, theirs = Ngram(arpa, use_kenlm=False), Ngram(arpa)
    assert (ours.reader, theirs.reader) == ("own", "kenlm")
    for words in (["the", "cat"], ["cat", "the", "the", "dog", "cat", "cat"], [], ["dog"]):
        assert ours.word_log_probs(words) == pytest.approx(theirs.word_log_probs(words), abs=1e-5)


def test_compressed_and_without_unk(tmp_path):
    text = ARPA.replace("-1.0\t<unk>\n", "").replace("ngram 1=5", "ngram 1=4")
    path = tmp_path / "lm.arpa.gz"
    path.write_bytes(gzip.compress(text.encode()))
    lm = Ngram(path, use_kenlm=False)
    assert lm.knows("cat") and not lm.knows("dog")
    assert lm.word_log_probs(["dog"])[0] == pytest.approx(math.log(10) * (-0.5 - 100.0))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t.replace("ngram 2=4", "ngram 2=5"), "no whole ARPA.*found n-grams"),
        (lambda t: t.replace("\\end\\", ""), "no whole ARPA.*no .end"),
        (lambda t: t.replace("-0.6\tthe cat\t-0.05", "-0.6 the"), "line 15 is no 2-gram"),
        (lambda t: t.replace("-0.6\tthe", "much\tthe"), "line 15 is no 2-gram"),
        (lambda t: "some text\n", "no whole ARPA"),
    ],
)
def test_damage(arpa, spoil, message):
    arpa.write_text(spoil(ARPA), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Ngram(arpa, use_kenlm=False)


def test_missing(tmp_path):
    with pytest.raises(InputError, match="there is no n-gram LM"):
        Ngram(tmp_path / "none.arpa")
