"""A module that is no LM on the whole road: clusters, harm, plan, training, packing, loading."""

from __future__ import annotations

import json

import pytest
import torch

from espnet_mpq.architecture.families import from_dict
from espnet_mpq.architecture.listed import ListedArchitecture, list_module
from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import InputError
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.packed.format import load_packed, save_packed
from espnet_mpq.packed.pack import pack
from espnet_mpq.packed.size import packed_size
from espnet_mpq.plan import Plan
from espnet_mpq.planning.planner import Planner, joint_kl
from espnet_mpq.planning.storage import Storage
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.sensitivity.judged import Batch, Judged, whole_model
from espnet_mpq.sensitivity.kl import KlMeter
from espnet_mpq.sensitivity.table import SensitivityTable
from espnet_mpq.training.admm import AdmmController
from espnet_mpq.training.options import AdmmOptions
from espnet_mpq.vocabulary import Vocabulary

N_OUT, DIM = 7, 8


class Encoder(torch.nn.Module):
    """Frames (B, T, 8) -> logits (B, T / 2, 7): a recogniser's layers, none of an LM's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((DIM,), 0.25))  # as GlobalMVN has it
        self.subsampling = torch.nn.Conv2d(1, 4, (2, 3), stride=(2, 1), padding=(0, 1))
        self.pointwise = torch.nn.Conv1d(4 * DIM, 12, 1)
        self.depthwise = torch.nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.norm = torch.nn.BatchNorm1d(12)
        self.rnn = torch.nn.LSTM(12, 6, 1, batch_first=True, bidirectional=True)
        self.kinds = torch.nn.Embedding(3, 12)
        self.position = torch.nn.Parameter(torch.zeros(2, 12))
        self.output = torch.nn.Linear(12, N_OUT)

    def forward(self, frames):
        x = self.subsampling((frames - self.mean)[:, None])
        x = self.pointwise(x.permute(0, 1, 3, 2).flatten(1, 2))
        x = self.norm(self.depthwise(x)).transpose(1, 2)
        x = x + self.kinds.weight[1] + self.position[0]
        return self.output(self.rnn(x)[0])


@pytest.fixture
def module():
    torch.manual_seed(3)
    made = Encoder()
    made(torch.randn(4, 20, DIM))  # moves the running statistics of the norm
    return made.eval()


@pytest.fixture
def architecture(module):
    return list_module(module, title="test encoder", keep=["position"])


def judged(module, weights) -> Judged:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for n_frames in (6, 16):
        mask = torch.ones(3, n_frames // 2, dtype=torch.bool)
        mask[1, n_frames // 4 :] = False
        batches.append(Batch(torch.randn(3, n_frames, DIM, generator=generator), mask))
    stages = whole_model(module, weights.clusters.values())
    return Judged.of(module, stages, batches, "nats/frame")


def test_clusters_and_what_stays_float(architecture):
    assert [c.name for c in architecture.clusters()] == [
        "subsampling",
        "pointwise",
        *(f"rnn.l0{reverse}.{gate}" for reverse in ("", ".reverse") for gate in "ifgo"),
        "kinds",
        "output",
    ]
    rest = dict(architecture.rest())
    assert rest["mean"] == (DIM,) and rest["norm.running_var"] == (12,)
    assert rest["depthwise.weight"] == (12, 1, 3) and rest["position"] == (2, 12)
    assert not any("num_batches_tracked" in name for name in architecture.state_shapes())
    assert set(architecture.kept()) == {"depthwise.weight", "position"}
    assert from_dict(json.loads(json.dumps(architecture.to_dict()))) == architecture
    assert architecture.describe() == "test encoder"


def test_sublayers_may_share_a_cluster(module):
    names = {"pointwise": ("front", "front"), "subsampling": ("front", "front")}
    architecture = list_module(module, keep=["posi*"], cluster_of=names.get)
    front = architecture.clusters()[0]
    assert front.name == "front" and len(front.parts) == 2
    assert front.n_weights == 4 * 6 + 12 * 32


def test_the_whole_road(module, architecture, tmp_path):
    weights = ClusterWeights(module, architecture.clusters())
    frames = judged(module, weights)
    meter = KlMeter(frames, weights)
    storage = Storage()
    table = SensitivityTable({"scale_dtype": "float16"}, "kl")
    for name in weights.clusters:
        for bits in (1, 4, 8):
            table.add(name, bits, meter.entry(name, storage.spec(bits)))
    assert all(row[8].harm < row[4].harm < row[1].harm for row in table.entries.values())

    planner = Planner(architecture, storage, table)
    budget = packed_size(architecture, planner.uniform(4)).n_bytes
    plan = planner.allocate(budget)
    assert packed_size(architecture, plan).n_bytes <= budget
    assert joint_kl(meter, plan)[0] <= joint_kl(meter, planner.uniform(4))[0]

    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    options = AdmmOptions(gamma=0.1, dual_period=2, finish_epochs=0)
    controller = AdmmController(weights, plan, optimizer, options)
    controller.start_epoch(1)
    for _ in range(4):
        optimizer.zero_grad()
        module(frames.batches[1].inputs).square().mean().backward()
        optimizer.step()
    controller.end_epoch()
    assert not torch.equal(module.output.weight, before["output.weight"])
    for name, spec in plan.clusters.items():
        values = project_cluster(weights.mats(name), spec).values
        for mat, value in zip(weights.mats(name), values):
            torch.testing.assert_close(mat, value, rtol=1e-6, atol=0)

    state = {n: v for n, v in module.state_dict().items() if v.is_floating_point()}
    packed = pack(state, architecture, plan, Vocabulary(()))
    n_bytes = save_packed(tmp_path / "packed.safetensors", packed)
    assert n_bytes == packed_size(architecture, plan).n_bytes <= budget

    other = Encoder().eval()
    loaded = float_state(load_packed(tmp_path / "packed.safetensors"))
    keys = other.load_state_dict(loaded, strict=False)
    assert keys.unexpected_keys == []
    assert set(keys.missing_keys) <= {"norm.num_batches_tracked"}  # newer torch fills it in
    inputs = frames.batches[0].inputs
    torch.testing.assert_close(other(inputs), module(inputs), rtol=1e-5, atol=1e-5)
    assert torch.equal(other.norm.running_mean, module.norm.running_mean)


def test_tied_matrices_are_stored_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.output = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5)
            self.output.weight = self.embed.weight

    module = Tied()
    architecture = list_module(module, vocab_size=5)
    assert [c.name for c in architecture.clusters()] == ["embed"]
    assert architecture.ties() == {"output.weight": "embed.weight"}
    plan = Plan({"embed": Storage().spec(8)})
    packed = pack(module.state_dict(), architecture, plan, Vocabulary("abcde"))
    assert set(float_state(packed)) == {"embed.weight", "output.bias"}


def test_what_cannot_be_listed(module):
    with pytest.raises(InputError, match="outside every cluster: found position"):
        list_module(module).clusters()
    module.position = None
    module.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="steps is no float tensor"):
        list_module(module)
    with pytest.raises(InputError, match="LSTM with a projection"):
        list_module(torch.nn.LSTM(3, 4, proj_size=2))


@pytest.mark.parametrize(
    "change",
    [
        {"groups": [["a", "linear", [["output.weight", 0, 6]]]]},  # a row in no cluster
        {"groups": [["a", "linear", [["output.weight", 0, 8]]]]},
        {"groups": [["a", "linear", [["output.bias", 0, 7]]]]},
        {"groups": [["a", "x", [["output.weight", 0, 7]]], ["a", "x", [["kinds.weight", 0, 3]]]]},
        {"groups": [["a", "linear", "output.weight"]]},
        {"groups": [["a", "linear", [["output.weight", 0, 3], ["output.weight", 3, 7]]]]},
        {"state": {"output.weight": [7, -1]}},
        {"state": {"output.weight": [7, 2**40]}},
        {"state": [["output.weight", [7, 12]]]},
        {"tied": {"output.weight": "kinds.weight"}},
        {"kept_matrices": ["nothing"]},
        {"title": 3},
        {"vocab_size": -1},
        {"vocab_size": True},
        {"more": 1},
    ],
)
def test_malformed_records_are_refused(architecture, change):
    with pytest.raises(InputError, match="architecture"):
        ListedArchitecture.from_dict({**architecture.to_dict(), **change})
