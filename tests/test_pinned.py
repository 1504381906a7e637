"""What moving code may not change: receipts, plans and 5 ADMM updates of both LM families."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from found import pack_lm, weights_of

from espnet_mpq.packed.format import load_packed, to_bytes
from espnet_mpq.packed.receipt import receipt
from espnet_mpq.plan import ClusterSpec, Plan
from espnet_mpq.training.admm import AdmmController
from espnet_mpq.training.options import AdmmOptions

from packed_models import architecture, module_of, random_weights, tokens, transformer  # isort: skip

GOLDEN = Path(__file__).parent / "golden"
LMS = {
    "rnn": (
        architecture("lstm", vocab_size=6, unit=8, nlayers=1),
        [ClusterSpec(2), ClusterSpec(1, tying="cluster"), ClusterSpec(4, "paper", "model")]
        + [ClusterSpec(2, "uniform", "group", 3), ClusterSpec(16), ClusterSpec(8)],
    ),
    "transformer": (
        transformer(6, None, embed_unit=4, att_unit=8, head=2, unit=6, layer=1),
        [ClusterSpec(4, "paper", "model"), ClusterSpec(2), ClusterSpec(1), ClusterSpec(32)],
    ),
}
RECEIPTS = {
    "gru": "0732bf24840e3102d574f2804d2d6ca41200de402fad39285c5612b856b6d825",
    "transformer": "56e37bfad57e4aa8c5da5367b43883cc632b92421f017c742f3792be830a099c",
}
TRAINED = {
    "rnn": "56f4767f1ac28aeb96fd2979080b2b37e0843f6ad3c2ae5a3d347347bf474200",
    "transformer": "aa97e193a8b2bde0c64cc0c11d1350ed7296d918883522f8c543938448731b66",
}
PACKED = {
    "rnn": "c2220199740be43c5d3a968bcc31d67a1dc887c3465f5f4be3ec3955d07ba1ba",
    "transformer": "99010fea29c23017455d912a7a08ab7b3c8fad0974e03c8e37ef2e97936b2695",
}


def sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plan_of(family: str) -> Plan:
    arch, specs = LMS[family]
    return Plan({cluster.name: spec for cluster, spec in zip(arch.clusters(), specs)})


def coarse(tensor: torch.Tensor) -> list:
    """Values to three decimal places of their binary exponent: sums may come in any order."""
    mantissa, exponent = torch.frexp(tensor.double())
    return [(mantissa * 1024).round().int().tolist(), exponent.tolist()]


@pytest.mark.parametrize("family", RECEIPTS)
def test_receipts(family):
    packed = load_packed(GOLDEN / f"packed_{family}_v1.safetensors")
    assert sha256(receipt(packed)) == RECEIPTS[family]


@pytest.mark.parametrize("family", LMS)
def test_packed_bytes(family):
    arch, plan = LMS[family][0], plan_of(family)
    weights = {k: (8 * v).round() / 8 for k, v in random_weights(arch).items()}
    packed = pack_lm(weights, arch, plan, tokens(arch.vocab_size), source={"seed": 0})
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert hashlib.sha256(to_bytes(packed)).hexdigest() == PACKED[family]


@pytest.mark.parametrize("family", LMS)
def test_five_updates(family):
    """Made-up gradients, two epochs, the second one in the finishing phase."""
    arch, plan = LMS[family][0], plan_of(family)
    lm = module_of(random_weights(arch))
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.05)
    options = AdmmOptions(gamma=0.05, dual_period=2, finish_epochs=1, projection="mse")
    controller = AdmmController(weights_of(lm), plan, optimizer, options)
    generator = torch.Generator().manual_seed(1)
    for n_epochs_left, n_updates in ((2, 3), (1, 2)):
        controller.start_epoch(n_epochs_left)
        for _ in range(n_updates):
            for p in lm.parameters():
                p.grad = torch.randint(-2, 3, p.shape, generator=generator) / 8
            optimizer.step()
        controller.end_epoch()
    state = {name: coarse(p.detach()) for name, p in lm.named_parameters()}
    assert sha256(state) == TRAINED[family]
