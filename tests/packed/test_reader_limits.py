"""Reading a packed file: memory of its tensors and a constant, a second at most, no file mapped."""

from __future__ import annotations

import os
import time
import tracemalloc

import pytest
import torch

from espnet_mpq.architecture import families
from espnet_mpq.errors import FormatError, InputError, MpqError
from espnet_mpq.packed import container
from espnet_mpq.packed.format import from_bytes, is_packed, load_packed, save_packed, to_bytes
from espnet_mpq.packed.metadata import build, header_bytes, self_hash
from espnet_mpq.packed.tensors import tensor_specs
from espnet_mpq.plan import ClusterSpec, Plan
from espnet_mpq.strict_json import MOST_N_BYTES

from packed_models import architecture, packed_model, uniform  # isort: skip

LARGEST = 2**31 - 1
CONSTANT = 8 << 20  # bytes beside the tensors, for a header of ordinary size
HUGE = {
    "rnn": dict(
        rnn_type="lstm", vocab_size=LARGEST, unit=LARGEST, nhid=LARGEST, nlayers=1000,
        tie_weights=False,
    ),
    "transformer": dict(
        pos_enc=None, vocab_size=LARGEST, embed_unit=LARGEST, att_unit=512, head=8, unit=LARGEST,
        layer=1000,
    ),
}  # fmt: skip


def peak_n_bytes(call) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A packed file of 20 MiB: tensors of all roles, one of them large."""
    arch = architecture("lstm", vocab_size=30_000, unit=256, nhid=128, nlayers=1)
    plan = uniform(arch, ClusterSpec(8, "paper"))
    plan = Plan({**plan.clusters, "output": ClusterSpec(16), "embedding": ClusterSpec(8)})
    path = tmp_path_factory.mktemp("large") / "packed.safetensors"
    save_packed(path, packed_model(arch, plan))
    return path


def test_the_tensors_are_in_memory_once(large):
    n_bytes = large.stat().st_size
    assert n_bytes > 15 << 20
    load_packed(large)  # imports and caches
    assert peak_n_bytes(lambda: load_packed(large)) < n_bytes + CONSTANT


def test_each_tensor_has_its_own_writable_memory(large):
    packed = load_packed(large)
    addresses = {tensor.data_ptr() for tensor in packed.tensors.values()}  # each from its start
    assert len(addresses) == len(packed.tensors)
    before = to_bytes(packed)
    packed.tensors["decoder.bias"].add_(1)
    assert before == large.read_bytes()


def test_a_file_that_is_cut_or_written_over_afterwards_changes_nothing(large, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes(large.read_bytes())
    packed = load_packed(path)
    with open(path, "r+b") as file:
        file.truncate(100)
    assert to_bytes(packed) == large.read_bytes()


def test_a_file_that_is_cut_while_it_is_read(large, tmp_path, monkeypatch):
    path = tmp_path / "copy.safetensors"
    path.write_bytes(large.read_bytes())
    read, n_read = container.read_tensor, []

    def cut(file, spec):
        n_read.append(spec)
        if len(n_read) == 3:
            os.truncate(path, path.stat().st_size - (1 << 20))
        return read(file, spec)

    monkeypatch.setattr(container, "read_tensor", cut)
    with pytest.raises(FormatError, match="was cut while it was read"):
        load_packed(path)


def test_damage_is_found_in_memory_of_the_tensors_before_it(large, tmp_path):
    data = bytearray(large.read_bytes())
    data[-1] ^= 1
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data)
    del data

    def refuse():
        with pytest.raises(FormatError, match="is damaged"):
            load_packed(path)

    assert peak_n_bytes(refuse) < path.stat().st_size + CONSTANT


def hostile(arch: dict) -> bytes:
    """A right header of any architecture, and next to no data."""
    arch = families.from_dict(arch)
    spec = ClusterSpec(2, "uniform", "group", 128)
    plan = Plan({cluster.name: spec for cluster in arch.clusters()})
    specs = tensor_specs(arch, plan)
    metadata = build(
        arch,
        plan,
        token_list={"n_tokens": arch.vocab_size, "sha256": "0" * 64},
        ids=dict.fromkeys(("blank", "unk", "sos", "eos"), 0),
        source={},
        relative_error=dict.fromkeys(plan.clusters, "1.0000e-01"),
        error_reference="fp",
        tensors={spec.name: "0" * 64 for spec in specs},
    )
    header = header_bytes(specs, metadata)
    return len(header).to_bytes(8, "little") + header + b"\0" * 100


@pytest.mark.parametrize("family", HUGE)
def test_a_header_of_a_thousand_layers_takes_no_second(family):
    data = hostile({"class": family, **HUGE[family]})
    assert len(data) < MOST_N_BYTES

    def refuse():
        with pytest.raises(FormatError, match="found 100 bytes of tensors"):
            from_bytes(data)

    start_s = time.process_time()
    refuse()
    assert time.process_time() - start_s < 3  # of a busy machine; an idle one takes 0.5


def with_metadata(small: bytes, **changes) -> bytes:
    """The file with other metadata, sealed again, in a header of right spelling."""
    packed = from_bytes(small)
    metadata = {**packed.metadata, **changes}
    metadata["metadata_sha256"] = self_hash(metadata)
    header = header_bytes(packed.specs, metadata)
    return len(header).to_bytes(8, "little") + header + small[-100:]


LONG = "x" * 1_000_000
CHANGES = {
    "a long class": {"architecture": {"class": LONG}},
    "a long key": {"architecture": {"class": "rnn", LONG: 1}},
    "a long cluster": {"plan": {"clusters": {LONG: {"bits": 2}}}},
    "a long grid": {"plan": {"clusters": {"embedding": {"bits": 2, "grid": LONG}}}},
    "many clusters": {"plan": {"clusters": {f"{i}": {"bits": 2} for i in range(35_000)}}},
    "many shapes": {
        "architecture": {
            "class": "listed", "vocab_size": 0, "title": "", "groups": [], "tied": {},
            "state": {f"{i}": [LARGEST, LARGEST] for i in range(25_000)}, "kept_matrices": [],
        },
    },
    "one row each": {
        "architecture": {
            "class": "listed", "vocab_size": 0, "title": "", "tied": {}, "kept_matrices": [],
            "state": {"w": [LARGEST, LARGEST]},
            "groups": [[f"{i}", "k", [["w", i, i + 1]]] for i in range(20_000)],
        },
    },
    "a long source": {"source": {"note": LONG}, "version": 2},
}  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_hostile_metadata_are_refused_shortly(changes):
    arch = architecture("rnn_tanh", vocab_size=6, unit=5, nhid=4, nlayers=1)
    data = with_metadata(to_bytes(packed_model(arch, uniform(arch, ClusterSpec(2)))), **changes)
    start_s = time.process_time()
    with pytest.raises(FormatError) as info:
        from_bytes(data)
    assert time.process_time() - start_s < 3
    assert len(str(info.value)) < 20_000


def test_what_is_no_file_is_named(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(InputError, match="no regular file"):
        load_packed(fifo)
    with pytest.raises(InputError, match="a folder"):
        load_packed(tmp_path)
    assert not is_packed(tmp_path / "none") and not is_packed(tmp_path)


def test_a_header_longer_than_any_lm_has_is_not_read(tmp_path):
    path = tmp_path / "packed.safetensors"
    with open(path, "wb") as file:
        file.write((MOST_N_BYTES + 1).to_bytes(8, "little"))
        file.truncate(1 << 33)  # sparse

    def refuse():
        with pytest.raises(MpqError, match="header length"):
            load_packed(path)

    assert peak_n_bytes(refuse) < 1 << 20


def test_tensors_without_elements_are_read(tmp_path):
    arch = families.from_dict(
        {
            "class": "listed", "vocab_size": 2, "title": "t", "tied": {}, "kept_matrices": [],
            "state": {"w": [3, 5], "none": [0], "scalar": []},
            "groups": [["w", "k", [["w", 0, 3]]]],
        }
    )  # fmt: skip
    packed = packed_model(arch, uniform(arch, ClusterSpec(2)))
    again = from_bytes(to_bytes(packed))
    assert again.tensors["none"].shape == (0,) and again.tensors["scalar"].shape == ()
    assert all(torch.equal(again.tensors[n], t) for n, t in packed.tensors.items())
