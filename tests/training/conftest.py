"""A small recurrent LM with the host's parameter names and a batch for it."""

from __future__ import annotations

import pytest
import torch

N_TOKENS, UNIT = 11, 8


class SmallRnn(torch.nn.Module):
    """tokens (B, T) -> logits (B, T, V); parameters named as in the host's recurrent LM."""

    def __init__(self, tie_weights: bool = False, dropout_rate: float = 0.0):
        super().__init__()
        self.encoder = torch.nn.Embedding(N_TOKENS, UNIT, padding_idx=0)
        self.rnn = torch.nn.LSTM(UNIT, UNIT, 1, batch_first=True)
        self.decoder = torch.nn.Linear(UNIT, N_TOKENS)
        self.drop = torch.nn.Dropout(dropout_rate)
        if tie_weights:
            self.decoder.weight = self.encoder.weight

    def forward(self, tokens):
        return self.decoder(self.drop(self.rnn(self.drop(self.encoder(tokens)))[0]))


@pytest.fixture
def small_rnn():
    """Factory small_rnn(tie_weights=False, dropout_rate=0.0, seed=0)."""

    def make(tie_weights=False, dropout_rate=0.0, seed=0):
        torch.manual_seed(seed)
        return SmallRnn(tie_weights, dropout_rate)

    return make


@pytest.fixture
def tokens():
    """(4, 7) token ids, none of them the padding."""
    return torch.randint(1, N_TOKENS, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cross_entropy(tokens):
    """Function lm -> mean next-token loss on ``tokens``."""

    def loss(lm):
        logits = lm(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return loss
