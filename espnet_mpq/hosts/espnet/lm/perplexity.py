"""Perplexity of an opened LM experiment (fp, quantized or packed) on tokenized text."""

from __future__ import annotations

from typing import List

import torch
import torch.nn.functional as F

from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.perplexity import Perplexity, perplexity
from espnet_mpq.hosts.espnet.experiment.opened import Experiment
from espnet_mpq.text import TokenizedText, batches


def sentence_nll(exp: Experiment, text: TokenizedText, *, batch_size: int = 32) -> List[float]:
    """Negative log-likelihood of each sentence with its end, in nats, summed in float64.

    Raises:
        InputError: a ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise InputError("the batch size", found=batch_size, expected="at least 1")
    nll_nats: List[float] = []
    exp.module.eval()
    with torch.no_grad():
        special_ids = exp.vocabulary.special_ids
        for inputs, targets, mask in batches(text, special_ids, batch_size=batch_size):
            logits, _ = exp.module(inputs, None)
            nll = F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
            nll_nats += nll.double().masked_fill(~mask, 0.0).sum(1).tolist()
    return nll_nats


def measure(exp: Experiment, text: TokenizedText, *, batch_size: int = 32) -> Perplexity:
    """Perplexity as the host's lm_calc_perplexity defines it, with more numbers beside it."""
    return perplexity(
        sentence_nll(exp, text, batch_size=batch_size),
        [len(ids) + 1 for ids in text.ids],
        text.n_words,
        n_oov_tokens=text.n_oov_tokens,
        n_oov_words=text.n_oov_words,
    )
