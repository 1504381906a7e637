"""Packed layers in place of torch's: the same numbers in every shape, swapped by class."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from espnet_mpq.architecture.listed import list_module
from espnet_mpq.errors import InputError, PlanError
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.packed.pack import pack
from espnet_mpq.plan import ClusterSpec, Plan, uniform_plan
from espnet_mpq.runtime.modules import (
    PACKED_LAYERS,
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLayers,
    PackedLinear,
)
from espnet_mpq.vocabulary import Vocabulary

SPECS = (
    ClusterSpec(1),
    ClusterSpec(2, "paper", "group", 4),
    ClusterSpec(3, "uniform", "cluster"),
    ClusterSpec(4, "paper", "model"),
    ClusterSpec(8),
    ClusterSpec(16),
    ClusterSpec(32),
)
CONVOLUTIONS = {
    "pointwise": (torch.nn.Conv1d(5, 7, 1), (2, 5, 9)),
    "kernel": (torch.nn.Conv1d(5, 7, 3, padding=1), (2, 5, 9)),
    "strided": (torch.nn.Conv1d(5, 7, 4, stride=3, dilation=2, bias=False), (1, 5, 20)),
    "one frame": (torch.nn.Conv1d(5, 7, 3, padding=1), (1, 5, 1)),
    "circular": (torch.nn.Conv1d(5, 7, 3, padding=1, padding_mode="circular"), (2, 5, 9)),
    "same": (torch.nn.Conv1d(5, 7, 4, padding="same"), (2, 5, 9)),
    "grouped": (torch.nn.Conv1d(6, 8, 3, groups=2), (2, 6, 9)),
    "subsampling": (torch.nn.Conv2d(3, 4, 3, stride=2), (2, 3, 11, 9)),
    "oblong": (torch.nn.Conv2d(3, 4, (2, 5), stride=(1, 3), padding=(1, 0)), (1, 3, 6, 13)),
    "reflected": (torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (1, 3, 6, 5)),
}


def packed_pair(module, spec):
    """(module with dequantized weights, the same with packed layers)."""
    architecture = list_module(module)
    names = [cluster.name for cluster in architecture.clusters()]
    plan = Plan(dict.fromkeys(names, spec), "float32")
    shapes = architecture.state_shapes()
    state = {name: value for name, value in module.state_dict().items() if name in shapes}
    packed = pack(state, architecture, plan, Vocabulary(()))
    dense, swapped = copy.deepcopy(module).eval(), copy.deepcopy(module).eval()
    dense.load_state_dict(float_state(packed), strict=False)
    for parameter in swapped.parameters():
        parameter.data.fill_(float("nan"))  # none of them is used
    layers = PackedLayers(swapped, architecture, plan)
    layers.fill(swapped, packed)
    return dense, swapped.eval()


def x_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.tying}")
def test_convolutions_on_the_reference(name, spec, float_activations):
    layer, shape = CONVOLUTIONS[name]
    dense, swapped = packed_pair(torch.nn.Sequential(layer), spec)
    assert isinstance(swapped[0], (PackedConv1d, PackedConv2d))
    with torch.no_grad():
        torch.testing.assert_close(swapped(x_of(shape)), dense(x_of(shape)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
@pytest.mark.parametrize("bits", [4, 32])
def test_convolutions_on_the_kernels(name, bits, kernels):
    """Float layers: the host's numbers. Codes: windows quantized row by row, as any matrix."""
    layer, shape = CONVOLUTIONS[name]
    dense, swapped = packed_pair(torch.nn.Sequential(layer), ClusterSpec(bits))
    x = x_of(shape, 3)
    with torch.no_grad():
        mine, expected = swapped(x), dense(x)
    assert mine.shape == expected.shape and mine.is_contiguous() == expected.is_contiguous()
    has_floats = bits == 32 or name in ("circular", "same", "grouped", "reflected")
    error = float((mine - expected).norm() / expected.norm())
    assert error < (1e-6 if has_floats else 0.02)
    assert has_floats or error > 1e-5


@pytest.mark.parametrize("shape", [(1, 6), (3, 6), (2, 1, 6), (2, 3, 4, 6), (0, 6), (6,)])
@pytest.mark.parametrize("path", ["reference", "auto"])
def test_linear_takes_every_shape(shape, path, kernels, monkeypatch):
    monkeypatch.setenv("MPQ_KERNEL", path)
    for bias in (True, False):
        module = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=bias))
        dense, swapped = packed_pair(module, ClusterSpec(8))
        assert isinstance(swapped[0], PackedLinear)
        with torch.no_grad():
            mine, expected = swapped(x_of(shape)), dense(x_of(shape))
        assert mine.shape == expected.shape
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6 if path != "auto" else 0.05)


def test_embedding_and_the_weight_that_hosts_read(kernels):
    module = torch.nn.Sequential(torch.nn.Embedding(9, 6, padding_idx=0))
    dense, swapped = packed_pair(module, ClusterSpec(4))
    assert isinstance(swapped[0], PackedEmbedding)
    ids = torch.tensor([[1, 8, 0], [0, 3, 3]])
    with torch.no_grad():
        assert torch.equal(swapped(ids), dense(ids))
    assert torch.equal(swapped[0].weight, dense[0].weight) and swapped[0].bias is None


def test_what_moves_keeps_its_numbers(kernels):
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    _, swapped = packed_pair(module, ClusterSpec(4, "uniform", "group", 4))
    x = x_of((3, 6))
    with torch.no_grad():
        before = swapped(x)
        assert torch.equal(copy.deepcopy(swapped)(x), before)
        assert torch.equal(swapped.float()(x), before)
        double = copy.deepcopy(swapped).double()
        assert double(x.double()).dtype == torch.float64
        half = copy.deepcopy(swapped).half()
    assert half[0].tensor("0/0.weight.codes").dtype == torch.uint8
    assert set(swapped.state_dict()) == {
        f"{k}.{name}" for k in "02" for name in (f"{k}/{k}:weight:codes", f"{k}/{k}:weight:scales")
    } | {"0.0:bias", "2.2:bias"}


class Odd(torch.nn.Linear):
    """A layer whose forward pass is its own."""

    def forward(self, x):
        return F.linear(x, self.weight.abs(), self.bias)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.odd, self.plain = Odd(6, 6), torch.nn.Linear(6, 6)
        self.shared = self.again = torch.nn.Linear(6, 6)
        self.embed, self.out = torch.nn.Embedding(4, 6), torch.nn.Linear(6, 4, bias=False)
        self.out.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(6)
        self.rnn = torch.nn.LSTM(6, 6, batch_first=True)

    def forward(self, x):
        x = self.again(self.shared(self.plain(self.odd(x)))) + self.embed(torch.tensor(1))
        return self.out(self.rnn(self.norm(x)[None])[0])


def test_only_known_layers_are_swapped(float_activations):
    torch.manual_seed(0)
    net = Net()
    net(x_of((5, 6)))  # statistics of the norm
    dense, swapped = packed_pair(net.eval(), ClusterSpec(2))
    assert type(swapped.plain) is PackedLinear and type(swapped.odd) is Odd
    assert swapped.shared is swapped.again and type(swapped.shared) is torch.nn.Linear
    assert swapped.out.weight is swapped.embed.weight  # tied: both stay
    with torch.no_grad():
        torch.testing.assert_close(swapped(x_of((5, 6))), dense(x_of((5, 6))), rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in swapped.parameters())
    assert Odd not in PACKED_LAYERS


def test_errors():
    net = torch.nn.Sequential(torch.nn.Linear(6, 5))
    architecture = list_module(net)
    with pytest.raises(PlanError, match="unknown cluster"):
        PackedLayers(net, architecture, Plan({"x": ClusterSpec(4)}))
    PackedLayers(net, architecture, uniform_plan(architecture.clusters(), 4))
    with pytest.raises(InputError, match="the packed model is empty"):
        net(x_of((1, 6)))
