"""Packed files: exact round trip, predicted size, canonical container, atomic writes."""

from __future__ import annotations

import json
import os
import resource
import signal

import pytest
import torch
from found import pack_lm

from espnet_mpq.errors import FormatError, InputError, PlanError
from espnet_mpq.packed import format as packed_format
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.packed.format import (
    PackedModel,
    from_bytes,
    load_packed,
    save_packed,
    to_bytes,
)
from espnet_mpq.packed.metadata import self_hash
from espnet_mpq.packed.size import header_n_bytes
from espnet_mpq.plan import ClusterSpec, Plan, plan_size

from packed_models import (  # isort: skip
    SPECS,
    architecture,
    mixed,
    packed_model,
    random_weights,
    tokens,
    transformer,
    uniform,
)

ARCHITECTURES = [
    architecture(),
    architecture(tie_weights=True, nlayers=3),
    architecture("gru", vocab_size=5, unit=3, nhid=10, nlayers=1),
    architecture("rnn_tanh", vocab_size=3, unit=1, nhid=1, nlayers=2),
    architecture("lstm", vocab_size=37, unit=33, nhid=17, nlayers=1),
    transformer(),
    transformer(13, "sinusoidal", embed_unit=1, att_unit=6, head=2, unit=3, layer=11),
]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
def test_round_trip_and_predicted_size_are_exact(tmp_path, arch, seed):
    scale_dtype = ("float16", "float32")[seed % 2]
    plan = mixed(arch, seed, scale_dtype)
    packed = packed_model(arch, plan, seed)
    path = tmp_path / "packed.safetensors"
    written = save_packed(path, packed)
    assert written == path.stat().st_size == packed.n_bytes
    size = plan_size(plan, arch.clusters(), arch.rest(), header_n_bytes(arch, plan))
    assert size.n_bytes == written
    loaded = load_packed(path)
    assert loaded.metadata == packed.metadata
    assert loaded.plan == plan and loaded.architecture == arch
    assert list(loaded.tensors) == [spec.name for spec in packed.specs]
    for name, tensor in packed.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert to_bytes(loaded) == path.read_bytes()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_predicted_size_for_every_spec(spec):
    arch = architecture(unit=13, nhid=9, vocab_size=29)
    plan = uniform(arch, spec)
    source = {"command": "mpq pack --lm_exp exp/lm_x", "config_sha256": "a" * 64}
    data = to_bytes(packed_model(arch, plan, source=source))
    size = plan_size(plan, arch.clusters(), arch.rest(), header_n_bytes(arch, plan))
    assert size.n_bytes == len(data)


@pytest.mark.parametrize("tie_weights", (False, True))
def test_predicted_size_of_two_by_650(tie_weights):
    arch = architecture("lstm", 2000, 650, 650, 2, tie_weights)
    plan = uniform(arch, ClusterSpec(2))
    size = plan_size(plan, arch.clusters(), arch.rest(), header_n_bytes(arch, plan))
    data = to_bytes(packed_model(arch, plan))
    assert size.n_bytes == len(data)
    # 650 columns at 2 bits are 162.5 bytes: rows are padded to 163.
    n_rows = 2000 * (1 if tie_weights else 2) + 4 * 4 * 650
    floats = 4 * (2 * 2 * 4 * 650 + 2000)
    assert len(data) == header_n_bytes(arch, plan) + n_rows * (163 + 2) + floats
    assert header_n_bytes(arch, plan) < 16_000
    n_weights = (1300 if not tie_weights else 650) * 2000 + 4 * 4 * 650 * 650 + floats // 4
    assert size.effective_bits == pytest.approx(8 * len(data) / n_weights, rel=1e-12)
    assert 2.0 < size.effective_bits < 2.2


def test_weights_on_the_grid_come_back_exactly():
    arch = architecture(unit=20)
    for seed, spec in enumerate(SPECS):
        plan = uniform(arch, spec)
        first = float_state(packed_model(arch, plan, seed))
        again = pack_lm(first, arch, plan, tokens(arch.vocab_size))
        second = float_state(again)
        for name, value in first.items():
            assert torch.allclose(value, second[name], rtol=1e-6, atol=0), (spec, name)
        assert all(float(e) < 1e-10 for e in again.metadata["relative_error"].values()), spec


def test_dequantized_weights_are_scale_times_level_and_rest_is_untouched():
    arch = architecture()
    weights = random_weights(arch)
    packed = pack_lm(weights, arch, uniform(arch, ClusterSpec(2)), tokens(arch.vocab_size))
    values = float_state(packed)
    for name in ("decoder.bias", "rnn.bias_ih_l1"):
        assert torch.equal(values[name], weights[name])
    gate_f = values["rnn.weight_hh_l0"][7:14]
    scales = packed.tensors["rnn.l0.f/rnn.weight_hh_l0.scales"].float()
    assert scales.shape == (7, 1)
    ratio = (gate_f / scales).round()
    assert torch.equal(ratio * scales, gate_f) and set(ratio.unique().tolist()) <= {-3, -1, 1, 3}
    # No other 2-bit code of the row is nearer to the weight.
    weight = weights["rnn.weight_hh_l0"][7:14]
    for level in (-3, -1, 1, 3):
        assert ((weight - gate_f).abs() <= (weight - level * scales).abs() + 1e-6).all()


def test_sixteen_and_thirty_two_bits():
    arch = architecture(rnn_type="gru")
    weights = random_weights(arch)
    names = [cluster.name for cluster in arch.clusters()]
    plan = uniform(arch, ClusterSpec(32))
    plan = type(plan)({**plan.clusters, names[0]: ClusterSpec(16)})
    values = float_state(pack_lm(weights, arch, plan, tokens(arch.vocab_size)))
    for name, value in values.items():
        want = weights[name].half().float() if name == "encoder.weight" else weights[name]
        assert torch.equal(value, want)
    weights["encoder.weight"][0, 0] = 1e6
    with pytest.raises(InputError, match="float16"):
        pack_lm(weights, arch, plan, tokens(arch.vocab_size))


def test_model_tying_stores_one_scale_per_grid():
    arch = architecture()
    packed = packed_model(arch, uniform(arch, ClusterSpec(4, "paper", "model")))
    scales = {n: t for n, t in packed.tensors.items() if "scale" in n}
    assert list(scales) == ["model/4-paper/scale"] and scales["model/4-paper/scale"].shape == (1, 1)


def test_header_is_what_the_safetensors_library_writes(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    arch = architecture()
    packed = packed_model(arch, mixed(arch, 3))
    data = to_bytes(packed)
    n_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n_bytes])
    metadata = {"espnet_mpq": header["__metadata__"]["espnet_mpq"]}
    theirs = safetensors.save(packed.tensors, metadata)
    n_theirs = int.from_bytes(theirs[:8], "little")
    assert data[8 : 8 + n_bytes].rstrip(b" ") == theirs[8 : 8 + n_theirs].rstrip(b" ")
    assert data[8 + n_bytes :] == theirs[8 + n_theirs :]
    path = tmp_path / "packed.safetensors"
    path.write_bytes(data)
    for name, tensor in safetensors.load_file(path).items():
        assert torch.equal(tensor, packed.tensors[name])


def test_a_long_command_is_cut_so_that_the_size_stays_as_predicted():
    arch = architecture()
    plan = uniform(arch, ClusterSpec(2))
    short = packed_model(arch, plan)
    for letter in ("x", '"', "\n", "\u00e4", "\u4e2d"):
        long = packed_model(arch, plan, source={"command": letter * 3000})
        assert len(to_bytes(long)) == len(to_bytes(short)) == short.n_bytes
        command = from_bytes(to_bytes(long)).metadata["source"]["command"]
        assert command.endswith("...") and len(command) > 100
        assert set(command[:-3]) == {letter}
    kept = packed_model(arch, plan, source={"command": "mpq pack " * 40}).metadata["source"]
    assert kept["command"] == "mpq pack " * 40


def test_other_long_sources_make_a_longer_header():
    arch = architecture()
    plan = uniform(arch, ClusterSpec(2))
    long = packed_model(arch, plan, source={"note": "x" * 3000})
    assert len(to_bytes(long)) == long.n_bytes > packed_model(arch, plan).n_bytes + 2000
    assert from_bytes(to_bytes(long)).metadata["source"]["note"] == "x" * 3000


def test_codebook_is_refused():
    arch = architecture()
    with pytest.raises(PlanError, match="codebook"):
        packed_model(arch, uniform(arch, ClusterSpec(2, "codebook")))


def test_saving_refuses_an_inconsistent_model(tmp_path):
    arch = architecture()
    packed = packed_model(arch, uniform(arch, ClusterSpec(2)))
    path = tmp_path / "x.safetensors"
    broken = dict(packed.tensors)
    broken["decoder.bias"] = broken["decoder.bias"] + 1
    with pytest.raises(FormatError, match="hash"):
        save_packed(path, PackedModel(packed.metadata, broken))
    del broken["decoder.bias"]
    with pytest.raises(FormatError, match="decoder.bias"):
        save_packed(path, PackedModel(packed.metadata, broken))
    assert list(tmp_path.iterdir()) == []


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match="mpq pack"):
            load_packed(path)


def test_full_disk_leaves_nothing_and_keeps_the_old_file(tmp_path):
    arch = architecture(unit=64, vocab_size=200)
    packed = packed_model(arch, uniform(arch, ClusterSpec(8)))
    path = tmp_path / "packed.safetensors"
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # write fails instead of a kill
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for old in (None, b"older"):
            if old:
                path.write_bytes(old)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            with pytest.raises(InputError, match=r"cannot write .*packed.safetensors"):
                save_packed(path, packed)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert os.listdir(tmp_path) == (["packed.safetensors"] if old else [])
            assert old is None or path.read_bytes() == old
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_handler)
    assert save_packed(path, packed) == path.stat().st_size


def test_version_is_two_with_three_bits_alone():
    arch = architecture(vocab_size=9, unit=5, nlayers=1)
    for bits, version in ((4, 1), (3, 2)):
        specs = {c.name: ClusterSpec(2) for c in arch.clusters()}
        packed = packed_model(arch, Plan({**specs, "output": ClusterSpec(bits)}))
        assert packed.metadata["version"] == version <= packed_format.VERSION
        assert from_bytes(to_bytes(packed)).metadata == packed.metadata
        forged = {**packed.metadata, "version": 3 - version}
        forged["metadata_sha256"] = self_hash(forged)
        with pytest.raises(FormatError, match="version"):
            to_bytes(PackedModel(forged, packed.tensors))
