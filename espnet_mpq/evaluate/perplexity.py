"""Perplexity per token and per word with standard errors, from per-sentence sums."""

from __future__ import annotations

import dataclasses
import math
from typing import Sequence, Tuple

from espnet_mpq.errors import InputError
from espnet_mpq.statistics import ratio_of_sums


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text.

    Attributes:
        ppl: exp(total nll / predicted tokens); every sentence end is one predicted token, as
            in the host's lm_calc_perplexity.
        ppl_stderr: standard error of ``ppl`` over sentences.
        word_ppl, word_ppl_stderr: the same per word; the sentence end counts as one word.
        nll_nats: total negative log-likelihood, natural logarithm.
        n_sentences, n_tokens (with ends), n_words (without ends).
        n_oov_tokens, n_oov_words: unknown tokens (scored as <unk>) and words that hold one.
    """

    ppl: float
    ppl_stderr: float
    word_ppl: float
    word_ppl_stderr: float
    nll_nats: float
    n_sentences: int
    n_tokens: int
    n_words: int
    n_oov_tokens: int
    n_oov_words: int

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def perplexity(
    nll_nats: Sequence[float],
    n_tokens: Sequence[int],
    n_words: Sequence[int],
    *,
    n_oov_tokens: int = 0,
    n_oov_words: int = 0,
) -> Perplexity:
    """Sum up per-sentence values.

    Args:
        nll_nats: nll of each sentence including its end, in nats.
        n_tokens: predicted tokens of each sentence, its end included (at least 1).
        n_words: words of each sentence, its end not included.

    Raises:
        InputError: no sentence, lists of different lengths, or an nll that is not finite.

    The standard error is that of `ratio_of_sums` over sentences, through exp() by the delta
    method. One sentence gives nan.
    """
    if not nll_nats or not len(nll_nats) == len(n_tokens) == len(n_words):
        raise InputError(
            "perplexity needs one value per sentence",
            found=f"{len(nll_nats)} nll, {len(n_tokens)} token and {len(n_words)} word counts",
        )
    for number, nll in enumerate(nll_nats, start=1):
        if not math.isfinite(nll):
            raise InputError(
                "the LM's log-probabilities are not finite",
                found=f"nll {nll} of sentence {number}",
                todo="check the checkpoint",
            )
    ppl, ppl_stderr = _exp_ratio(nll_nats, n_tokens)
    word_ppl, word_ppl_stderr = _exp_ratio(nll_nats, [n + 1 for n in n_words])
    return Perplexity(
        ppl=ppl,
        ppl_stderr=ppl_stderr,
        word_ppl=word_ppl,
        word_ppl_stderr=word_ppl_stderr,
        nll_nats=math.fsum(nll_nats),
        n_sentences=len(nll_nats),
        n_tokens=int(sum(n_tokens)),
        n_words=int(sum(n_words)),
        n_oov_tokens=n_oov_tokens,
        n_oov_words=n_oov_words,
    )


def _exp_ratio(nll_nats: Sequence[float], counts: Sequence[int]) -> Tuple[float, float]:
    """exp(sum nll / sum counts) and its standard error over sentences; inf when too large."""
    mean, stderr = ratio_of_sums(nll_nats, counts)
    try:
        value = math.exp(mean)
    except OverflowError:
        return math.inf, math.nan
    return value, value * stderr
