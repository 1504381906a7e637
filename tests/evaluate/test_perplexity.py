"""Perplexity: known answers, the standard error against a bootstrap."""

from __future__ import annotations

import math
import random

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.perplexity import perplexity


def test_uniform_model_has_the_vocabulary_as_perplexity():
    n_tokens = [3, 8, 1]
    result = perplexity([n * math.log(50) for n in n_tokens], n_tokens, [1, 3, 0])
    assert result.ppl == pytest.approx(50, rel=1e-12)
    assert result.ppl_stderr == pytest.approx(0, abs=1e-9)
    # 12 token nlls over 4 words and 3 sentence ends
    assert result.word_ppl == pytest.approx(50 ** (12 / 7), rel=1e-12)
    assert (result.n_tokens, result.n_words, result.n_sentences) == (12, 4, 3)


def test_weights_sentences_by_length():
    result = perplexity([1.0, 9.0], [1, 3], [1, 1])
    assert result.ppl == pytest.approx(math.exp(10 / 4))


def test_standard_error_agrees_with_a_bootstrap_over_sentences():
    rng = random.Random(0)
    n_tokens = [rng.randint(2, 40) for _ in range(300)]
    nll = [n * max(0.1, rng.gauss(3.0, 0.8)) for n in n_tokens]
    result = perplexity(nll, n_tokens, n_tokens)
    draws = []
    for _ in range(1500):
        pick = [rng.randrange(300) for _ in range(300)]
        draws.append(math.exp(sum(nll[i] for i in pick) / sum(n_tokens[i] for i in pick)))
    mean = sum(draws) / len(draws)
    spread = math.sqrt(sum((d - mean) ** 2 for d in draws) / len(draws))
    assert result.ppl_stderr == pytest.approx(spread, rel=0.08)


def test_edges():
    assert math.isnan(perplexity([2.0], [2], [1]).ppl_stderr)
    assert perplexity([1e6], [2], [1]).ppl == math.inf
    with pytest.raises(InputError, match="one value per sentence"):
        perplexity([], [], [])
    with pytest.raises(InputError):
        perplexity([1.0], [2, 3], [1])
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match="not finite: found nll .* of sentence 2"):
            perplexity([1.0, bad], [2, 3], [1, 1])
