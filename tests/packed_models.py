"""Small LMs, plans and packed models shared by the tests of packed/, lm/, kernels/ and hosts/."""

from __future__ import annotations

import itertools
import random

import torch
from found import pack_lm

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.architecture.rnn_lm import RnnArchitecture
from espnet_mpq.architecture.transformer_lm import TransformerArchitecture
from espnet_mpq.plan import ClusterSpec, Plan

# (bits, grid, tying, group_size): every tying, both grids, every bit-width.
SPECS = [
    ClusterSpec(bits, grid, tying, 5 if tying == "group" else None)
    for bits, grid, tying in itertools.product(
        (1, 2, 3, 4, 8), ("uniform", "paper"), ("row", "group", "cluster", "model")
    )
] + [ClusterSpec(16), ClusterSpec(32)]


def tokens(n_tokens: int) -> list:
    """A token list in ESPnet's order."""
    letters = [f"tok{i}" for i in range(n_tokens - 3)]
    return ["<blank>", "<unk>", *letters, "<sos/eos>"][:n_tokens]


def architecture(rnn_type="lstm", vocab_size=11, unit=7, nhid=None, nlayers=2, tie_weights=False):
    return RnnArchitecture(rnn_type, vocab_size, unit, nhid or unit, nlayers, tie_weights)


def transformer(vocab_size=11, pos_enc=None, embed_unit=5, att_unit=9, head=3, unit=7, layer=2):
    return TransformerArchitecture(pos_enc, vocab_size, embed_unit, att_unit, head, unit, layer)


def random_weights(arch: Architecture, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.4
        for name, shape in arch.state_shapes().items()
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


class FloatTransformer(torch.nn.Module):
    """As FloatRnn for Transformer LMs; sees token 0, which the host and the runtime hide."""

    def __init__(self, arch: TransformerArchitecture, weights: dict):
        super().__init__()
        width = arch.att_unit
        self.width, self.has_positions = width, arch.pos_enc is not None
        self.embed = torch.nn.Embedding(arch.vocab_size, arch.embed_unit)
        self.input = torch.nn.Sequential(
            torch.nn.Linear(arch.embed_unit, width), torch.nn.LayerNorm(width), torch.nn.ReLU()
        )
        make = torch.nn.TransformerEncoderLayer
        options = dict(dropout=0.0, layer_norm_eps=1e-12, batch_first=True, norm_first=True)
        blocks = [make(width, arch.head, arch.unit, **options) for _ in range(arch.layer)]
        self.blocks = torch.nn.ModuleList(blocks)
        self.norm = torch.nn.LayerNorm(width, eps=1e-12)
        self.decoder = torch.nn.Linear(width, arch.vocab_size)
        self.names = self._host_names(arch)
        state = {ours: torch.cat([weights[n] for n in names]) for ours, names in self.names.items()}
        self.load_state_dict(state, strict=True)
        self.eval()

    @staticmethod
    def _host_names(arch: TransformerArchitecture) -> dict:
        """Our parameters -> the host's, whose rows they stack."""
        modules = {"input.0": ["encoder.embed.0"], "input.1": ["encoder.embed.1"]}
        modules.update(norm=["encoder.after_norm"], decoder=["decoder"])
        names = {"embed.weight": ["embed.weight"]}
        for block in range(arch.layer):
            ours, theirs = f"blocks.{block}.", f"encoder.encoders.{block}."
            pairs = {"linear1": "feed_forward.w_1", "linear2": "feed_forward.w_2"}
            pairs.update({"self_attn.out_proj": "self_attn.linear_out"})
            pairs.update(norm1="norm1", norm2="norm2")
            modules.update({ours + a: [theirs + b] for a, b in pairs.items()})
            for kind in ("weight", "bias"):
                qkv = [f"{theirs}self_attn.linear_{x}.{kind}" for x in "qkv"]
                names[f"{ours}self_attn.in_proj_{kind}"] = qkv
        for ours, theirs in modules.items():
            names.update({f"{ours}.{k}": [f"{n}.{k}" for n in theirs] for k in ("weight", "bias")})
        return names

    def weights(self) -> dict:
        """The parameters under the host's names."""
        found = {}
        for ours, value in self.state_dict().items():
            pieces = value.clone().chunk(len(self.names[ours]))
            found.update(zip(self.names[ours], pieces))
        return found

    def forward(self, ids):
        x = self.input(self.embed(ids))
        length, width = ids.shape[1], self.width
        if self.has_positions:
            angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
            table = torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(length, width)
            x = x * width**0.5 + table.to(x.dtype)
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.decoder(self.norm(x)), None


def module_of(weights: dict) -> torch.nn.Module:
    """A module that has these parameters, under these (dotted) names, and computes nothing."""
    root = torch.nn.Module()
    for name, value in weights.items():
        *path, last = name.split(".")
        module = root
        for key in path:
            if not hasattr(module, key):
                module.add_module(key, torch.nn.Module())
            module = getattr(module, key)
        module.register_parameter(last, torch.nn.Parameter(value.clone()))
    return root
