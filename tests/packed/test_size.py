"""Predicted sizes: least headers against whole ones, and that recognisers do not wait for them."""

from __future__ import annotations

import time

import pytest
import torch

from espnet_mpq.architecture.listed import list_module
from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.packed.container import header_json
from espnet_mpq.packed.metadata import RESERVED
from espnet_mpq.packed.size import _blank, header_n_bytes, least_header_n_bytes
from espnet_mpq.packed.tensors import SHARED, tensor_specs
from espnet_mpq.plan import ClusterSpec, Plan

from packed_models import architecture, mixed, transformer  # isort: skip

CHOICES = {
    "row": {b: ClusterSpec(b) for b in (1, 2, 4, 8, 16, 32)},
    "group": {b: ClusterSpec(b, "paper", "group", 3) for b in (1, 8)},
    "cluster": {b: ClusterSpec(b, tying="cluster") for b in (2, 32)},
    "model": {b: ClusterSpec(b, tying="model") for b in (1, 4, 16)},
}


class Block(torch.nn.Module):
    """The layers of a Conformer block, small."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(5))
        self.forwards = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(4))
        self.pointwise = torch.nn.ModuleList(torch.nn.Conv1d(width, width, 1) for _ in range(2))
        self.depthwise = torch.nn.Conv1d(width, width, 5, groups=width)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(5))
        self.norm = torch.nn.BatchNorm1d(width)


def sublayer(path: str):
    block, _, rest = path.partition(".")
    kind = rest.split(".")[0]
    return (f"blocks.{block}.{kind}", kind) if kind else None


@pytest.fixture(scope="module")
def conformer():
    """As many clusters (89) and tensors as a recogniser of 17 + 6 blocks, with few weights."""
    module = torch.nn.ModuleList(Block(4) for _ in range(29))
    module.append(torch.nn.Embedding(11, 4))
    module.append(torch.nn.Linear(4, 11))
    return module, list_module(module, vocab_size=11, cluster_of=sublayer)


def text_n_bytes(arch, plan) -> int:
    """The bare header built whole, without the digits of offsets and without shared scales."""
    specs = [s for s in tensor_specs(arch, plan) if not s.name.startswith(SHARED)]
    offset = digits = 0
    for spec in specs:
        digits += len(f"{offset}{offset + spec.n_bytes}")
        offset += spec.n_bytes
    return len(header_json(specs, {**_blank(arch, plan, specs), **RESERVED})) - digits


@pytest.mark.parametrize("tying", CHOICES)
@pytest.mark.parametrize("arch", [architecture(nlayers=1), transformer()], ids=["rnn", "tf"])
def test_increments_are_those_of_whole_headers(arch, tying):
    """Offsets of one digit each, so that only the clusters' own entries differ."""
    choices = CHOICES[tying]
    names = [cluster.name for cluster in arch.clusters()]
    first = next(iter(choices.values()))
    base = text_n_bytes(arch, Plan(dict.fromkeys(names, first)))
    _, own = least_header_n_bytes(arch, choices, "float16")
    _, digits_of_first = least_header_n_bytes(arch, {0: first}, "float16")
    for name in names:
        for bits, spec in choices.items():
            plan = Plan({**dict.fromkeys(names, first), name: spec})
            _, digits = least_header_n_bytes(arch, {0: spec}, "float16")
            # What is added for the digits of a cluster's own offsets is known apart.
            expected = text_n_bytes(arch, plan) - base + digits[name][0]
            assert own[name][bits] == expected, (name, bits)
    assert all(own[name][next(iter(choices))] == digits_of_first[name][0] for name in names)


@pytest.mark.parametrize("seed", range(8))
def test_no_header_is_shorter(seed):
    arch = architecture(vocab_size=300, unit=40, nlayers=2)
    choices = CHOICES["row"]
    fixed, own = least_header_n_bytes(arch, choices, "float16")
    plan = mixed(arch, seed, specs=list(choices.values()))
    least = fixed + sum(own[name][spec.bits] for name, spec in plan.clusters.items())
    assert least <= header_n_bytes(arch, plan) <= least + 40 * len(plan.clusters)


def test_sizes_of_a_recogniser_take_no_time(conformer):
    _, arch = conformer
    assert len(arch.clusters()) >= 89
    start = time.process_time()
    least_header_n_bytes(arch, CHOICES["row"], "float16")
    assert time.process_time() - start < 1.0
    start = time.process_time()
    header_n_bytes(arch, mixed(arch))
    assert time.process_time() - start < 0.5


def test_reading_and_writing_all_clusters_takes_milliseconds(conformer):
    """What an optimizer update pays besides moving the weights themselves; best of 5."""
    module, arch = conformer
    weights = ClusterWeights(module, arch.clusters())
    kept = {name: [m.clone() for m in weights.mats(name)] for name in weights.clusters}
    spent = []
    for _ in range(5):
        start = time.process_time()
        for name in weights.clusters:
            weights.mats(name)
            weights.set(name, kept[name])
        spent.append(time.process_time() - start)
    assert min(spent) < 0.010, spent
