"""Small LMs, plans and packed models shared by the tests of packed/, lm/, kernels/ and hosts/."""

from __future__ import annotations

import itertools
import random

import torch

from espnet_mpq.packed.architecture import Architecture, RnnArchitecture
from espnet_mpq.packed.pack import pack_lm
from espnet_mpq.plan import ClusterSpec, Plan

# (bits, grid, tying, group_size): every tying, both grids, every bit-width.
SPECS = [
    ClusterSpec(bits, grid, tying, 5 if tying == "group" else None)
    for bits, grid, tying in itertools.product(
        (1, 2, 4, 8), ("uniform", "paper"), ("row", "group", "cluster", "model")
    )
] + [ClusterSpec(16), ClusterSpec(32)]


def tokens(n_tokens: int) -> list:
    """A token list in ESPnet's order."""
    letters = [f"tok{i}" for i in range(n_tokens - 3)]
    return ["<blank>", "<unk>", *letters, "<sos/eos>"][:n_tokens]


def architecture(rnn_type="lstm", vocab_size=11, unit=7, nhid=None, nlayers=2, tie_weights=False):
    return RnnArchitecture(rnn_type, vocab_size, unit, nhid or unit, nlayers, tie_weights)


def random_weights(arch: Architecture, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.4
        for name, shape in arch.parameter_shapes().items()
    }


def uniform(arch: Architecture, spec: ClusterSpec, scale_dtype="float16") -> Plan:
    return Plan({cluster.name: spec for cluster in arch.clusters()}, scale_dtype)


def mixed(arch: Architecture, seed: int = 0, scale_dtype="float16", specs=SPECS) -> Plan:
    """A random spec for every cluster."""
    choose = random.Random(seed).choice
    return Plan({cluster.name: choose(specs) for cluster in arch.clusters()}, scale_dtype)


def packed_model(arch: Architecture, plan: Plan, seed: int = 0, **more):
    return pack_lm(random_weights(arch, seed), arch, plan, tokens(arch.vocab_size), **more)


class FloatRnn(torch.nn.Module):
    """A float LM written with torch's own modules: the independent second opinion."""

    def __init__(self, arch: Architecture, weights: dict):
        super().__init__()
        name = arch.rnn_type
        make = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(name, torch.nn.RNN)
        options = {"nonlinearity": name[4:]} if name.startswith("rnn_") else {}
        self.encoder = torch.nn.Embedding(arch.vocab_size, arch.unit)
        self.rnn = make(arch.unit, arch.nhid, arch.nlayers, batch_first=True, **options)
        self.decoder = torch.nn.Linear(arch.nhid, arch.vocab_size)
        if arch.tie_weights:
            self.decoder.weight = self.encoder.weight
            weights = {**weights, "decoder.weight": weights["encoder.weight"]}
        self.load_state_dict(weights, strict=True)
        self.eval()

    @torch.no_grad()
    def forward(self, ids, state=None):
        hidden, state = self.rnn(self.encoder(ids), state)
        return self.decoder(hidden), state
