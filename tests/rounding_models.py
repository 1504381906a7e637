"""Small models cut into stages, for the tests of rounding: recurrent, tied, with attention."""

from __future__ import annotations

import torch
from found import find_clusters

from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.sensitivity.judged import Batch, Judged, Stages

N_TOKENS = 13


class Recurrent(torch.nn.Module):
    """Embedding, two recurrent layers, output; every layer is a stage."""

    def __init__(self, kind=torch.nn.LSTM, tied=False, width=8):
        super().__init__()
        self.encoder = torch.nn.Embedding(N_TOKENS, width)
        self.rnn = kind(width, width, 2, batch_first=True)
        self.decoder = torch.nn.Linear(width, N_TOKENS)
        if tied:
            self.decoder.weight = self.encoder.weight

    def layer(self, k, x, ids):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        run = getattr(torch, self.rnn.mode.lower())
        zero = x.new_zeros(1, x.shape[0], self.rnn.hidden_size)
        state = (zero, zero) if self.rnn.mode == "LSTM" else zero
        weights = [getattr(self.rnn, f"{name}_l{k}") for name in names]
        return run(x, state, weights, True, 1, 0.0, False, False, True)[0]

    def stages(self):
        layers = [lambda x, ids: self.encoder(x)]
        layers += [lambda x, ids, k=k: self.layer(k, x, ids) for k in range(2)]
        first = {"embedding": 0, "output": 3}
        first.update({name: 1 + int(name[5]) for name in self.cluster_names() if "." in name})
        return Stages(layers, self.decoder, first)

    def cluster_names(self):
        return [cluster.name for cluster in find_clusters(self)]


class Attention(torch.nn.Module):
    """A stage with an embedding and a linear layer, one with query, key, value, out; an output."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = torch.nn.Embedding(N_TOKENS, 6)
        self.front = torch.nn.Linear(6, width, bias=False)
        self.out, self.v, self.k, self.q = (torch.nn.Linear(width, width) for _ in range(4))
        self.decoder = torch.nn.Linear(width, N_TOKENS)

    def block(self, x, ids):
        q, k, v = self.q(x), self.k(x), self.v(x)
        n = x.shape[1]
        scores = (q @ k.transpose(1, 2)).masked_fill(torch.ones(n, n).triu(1).bool(), -1e9)
        return x + self.out(scores.softmax(-1) @ v)

    def stages(self):
        layers = [lambda x, ids: self.front(self.embed(x)), self.block]
        return Stages(layers, self.decoder, {"embedding": 0, "attention": 1, "output": 2})

    def clusters(self):
        def cluster(name, kind, *modules):
            parts = [Part(f"{m}.weight", 0, *getattr(self, m).weight.shape) for m in modules]
            return Cluster(name, kind, tuple(parts))

        return [
            cluster("embedding", "embedding", "embed", "front"),
            cluster("attention", "attention", "q", "k", "v", "out"),
            cluster("output", "output", "decoder"),
        ]


def make_batches(n_batches=3, n_sentences=20, length=9, seed=0):
    """Sentences of random tokens and lengths."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n_batches):
        ids = torch.randint(0, N_TOKENS, (n_sentences, length), generator=g)
        lengths = torch.randint(2, length + 1, (n_sentences, 1), generator=g)
        mask = torch.arange(length)[None] < lengths
        batches.append(Batch(ids * mask, mask))
    return batches


def judged_of(model, batches):
    """Model, stages and sentences as a Rounder takes them."""
    return Judged.of(model, model.stages(), batches)
