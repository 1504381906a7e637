"""Loading: thousands of damaged or foreign files, each refused with one of two errors."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from espnet_mpq.errors import FormatError, InputError, MismatchError, MpqError
from espnet_mpq.hosts.espnet.families import vocabulary
from espnet_mpq.io import token_list_sha256
from espnet_mpq.packed.container import canonical_json
from espnet_mpq.packed.format import PackedModel, from_bytes, load_packed, tensor_hashes, to_bytes
from espnet_mpq.packed.load import load_into
from espnet_mpq.packed.metadata import header_bytes, self_hash
from espnet_mpq.plan import ClusterSpec, Plan
from espnet_mpq.runtime.rnn_lm import PackedRnn

from packed_models import architecture, mixed, packed_model, tokens, uniform  # isort: skip

N_BIT_FLIPS = 1600
N_TRUNCATIONS = 300
N_GARBAGE = 200
REFUSED = (FormatError, MismatchError)


@pytest.fixture(scope="module")
def small():
    """A packed model with several kinds of tensors in about 6 kB, and its bytes."""
    arch = architecture("rnn_tanh", vocab_size=6, unit=5, nhid=4, nlayers=1)
    specs = [ClusterSpec(2, "paper"), ClusterSpec(4, "uniform", "group", 3), ClusterSpec(16)]
    plan = Plan({c.name: s for c, s in zip(arch.clusters(), specs)})
    packed = packed_model(arch, plan)
    return packed, to_bytes(packed)


@pytest.fixture
def attempt(small, tmp_path):
    """attempt(data): load bytes the way the host does; raises, or returns the filled runtime."""
    packed, _ = small
    path = tmp_path / "packed.safetensors"

    def load(data: bytes, token_list=None):
        path.write_bytes(data)
        runtime = PackedRnn(packed.architecture, packed.plan)
        try:
            load_into(runtime, path, vocabulary(token_list or tokens(6)))
        except MpqError:
            assert not runtime.filled
            raise
        return runtime

    return load


def refused(attempt, data: bytes, kind=REFUSED) -> str:
    with pytest.raises(kind) as info:
        attempt(data)
    message = str(info.value)
    assert "\n" not in message and 10 < len(message) < 900
    return message


def header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def sealed(packed: PackedModel, change, rehash_tensors: bool = False) -> bytes:
    """The file with changed metadata and right hashes again: a forger's best try."""
    metadata = json.loads(canonical_json(packed.metadata))
    change(metadata)
    if rehash_tensors:
        metadata["tensors"] = tensor_hashes(packed.tensors)
    metadata["metadata_sha256"] = self_hash(metadata)
    header = header_bytes(packed.specs, metadata)
    payload = to_bytes(packed)[8 + header_length(to_bytes(packed)) :]
    return len(header).to_bytes(8, "little") + header + payload


def test_the_unchanged_file_loads(attempt, small):
    runtime = attempt(small[1])
    assert runtime.filled and torch.isfinite(runtime.step(torch.tensor([5]))[0]).all()


def test_single_bit_flips_anywhere(attempt, small):
    _, data = small
    rng = random.Random(1)
    end = 8 + header_length(data)
    # All of the length prefix, the end of the JSON and the padding, and random bits elsewhere.
    text_end = len(data[:end].rstrip(b" "))
    places = list(range(64)) + [8 * b + rng.randrange(8) for b in range(text_end - 40, end, 4)]
    places += [rng.randrange(8 * end) for _ in range(N_BIT_FLIPS // 2)]
    places += [rng.randrange(8 * end, 8 * len(data)) for _ in range(N_BIT_FLIPS // 2)]
    for place in places:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        refused(attempt, bytes(changed))


def test_truncations_and_additions(attempt, small):
    _, data = small
    rng = random.Random(2)
    lengths = list(range(20)) + [len(data) - 1, 8 + header_length(data)]
    lengths += [rng.randrange(len(data)) for _ in range(N_TRUNCATIONS)]
    for length in lengths:
        refused(attempt, data[:length], FormatError)
    for extra in (b"\0", b" " * 8, data):
        refused(attempt, data + extra, FormatError)


def test_garbage(attempt, small):
    _, data = small
    rng = random.Random(3)
    for k in range(N_GARBAGE):
        junk = rng.randbytes(rng.randrange(1, 3000))
        if k % 2:  # behind a plausible header length
            junk = len(junk).to_bytes(8, "little") + junk
        refused(attempt, junk, FormatError)
    for n_bytes in (0, 1, 2**31, 2**63, 2**64 - 1, len(data), 10**8 + 1):
        refused(attempt, n_bytes.to_bytes(8, "little") + data[8:], FormatError)
    headers = ["[" * 5000, '{"a":' * 3000, "[]", "{}", "null", '"x"', '{"__metadata__":1}']
    headers += ['{"__metadata__":{"espnet_mpq":"' + "[" * 3000 + '"}}', "9" * 5000]
    headers += ['{"__metadata__":{"espnet_mpq":"{}"}}', '{"__metadata__":{"espnet_mpq":"\\ud800"}}']
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    headers += ['{"__metadata__":{"format":"pt"},"w":%s}' % entry, '{"w":%s}' % entry]
    for text in headers:
        raw = text.encode()
        refused(attempt, len(raw).to_bytes(8, "little") + raw, FormatError)


def test_swapped_tensors(attempt, small):
    packed, data = small
    start = 8 + header_length(data)
    offsets, places = start, {}
    for spec in packed.specs:
        places[spec.name] = (offsets, offsets + spec.n_bytes)
        offsets += spec.n_bytes
    a, b = places["rnn.bias_ih_l0"], places["rnn.bias_hh_l0"]
    assert a[1] - a[0] == b[1] - b[0]
    (a, b) = sorted((a, b))
    swapped = data[: a[0]] + data[slice(*b)] + data[a[1] : b[0]] + data[slice(*a)] + data[b[1] :]
    assert len(swapped) == len(data) and swapped != data
    assert "damaged" in refused(attempt, swapped, FormatError)
    # Names swapped in the header instead.
    header = data[8:start]
    for one, two in ((b"rnn.bias_ih_l0", b"rnn.bias_hh_l0"),):
        renamed = header.replace(one, b"#").replace(two, one).replace(b"#", two)
        refused(attempt, data[:8] + renamed + data[start:], FormatError)


def test_metadata_and_header_edits(attempt, small):
    packed, data = small
    header = data[8 : 8 + header_length(data)]
    payload = data[8 + len(header) :]
    edits = [
        (b'"dtype":"F32"', b'"dtype":"U32"'),
        (b"[0,", b"[1,"),
        (b'\\"bits\\":2', b'\\"bits\\":4'),
        (b'\\"bits\\":2', b'\\"bits\\":3'),
        (b'\\"version\\":1', b'\\"version\\":2'),
        (b'\\"vocab_size\\":6', b'\\"vocab_size\\":7'),
        (b"espnet_mpq.packed", b"espnet_mpq.pecked"),
        (b"true", b"null"),
        (b"  ", b"\t "),
    ]
    for old, new in edits:
        for edited in (header.replace(old, new, 1), header.replace(old, new)):
            if edited != header:
                refused(attempt, len(edited).to_bytes(8, "little") + edited + payload)
    # The same content in another spelling is refused too: there is one form of a file.
    pretty = json.dumps(json.loads(header), indent=1).encode()
    refused(attempt, len(pretty).to_bytes(8, "little") + pretty + payload, FormatError)
    unpadded = header.rstrip(b" ")
    refused(attempt, len(unpadded).to_bytes(8, "little") + unpadded + payload, FormatError)


@pytest.mark.parametrize("version", (0, 2, 99, "1", 1.0, True, None, [1]))
def test_other_versions(attempt, small, version):
    data = sealed(small[0], lambda m: m.update(version=version))
    assert "version" in refused(attempt, data, FormatError)


def test_forged_metadata_with_right_hashes(attempt, small):
    packed, _ = small

    def setter(*path_and_value):
        *path, key, value = path_and_value

        def change(metadata):
            for step in path:
                metadata = metadata[step]
            metadata[key] = value

        return change

    changes = [
        setter("format", "other"),
        setter("architecture", "nlayers", 10**9),
        setter("architecture", "vocab_size", -1),
        setter("architecture", "vocab_size", 10**30),
        setter("architecture", "rnn_type", ["lstm"]),
        setter("architecture", "rnn_type", "transformer"),
        setter("architecture", "class", "transformer"),
        setter("architecture", "tie_weights", 1),
        setter("architecture", "unit", True),
        setter("architecture", []),
        setter("plan", None),
        setter("plan", "clusters", {}),
        setter("plan", "clusters", "output", "bits", 3),
        setter("plan", "clusters", "output", "bits", [2]),
        setter("plan", "clusters", "output", "bits", 2.0),
        setter("plan", "clusters", "output", "grid", {}),
        setter("plan", "clusters", "output", "tying", None),
        setter("plan", "clusters", "rnn.l0.h", "group_size", 0),
        setter("plan", "clusters", "nonsense", {"bits": 2}),
        setter("plan", "scale_dtype", ["float16"]),
        setter("token_list", {}),
        setter("token_list", "n_tokens", 7),
        setter("token_list", "sha256", 0),
        setter("special_ids", "eos", 6),
        setter("special_ids", "eos", "5"),
        setter("special_ids", []),
        setter("source", "command", {"a": 1}),
        setter("relative_error", "output", 0.5),
        setter("relative_error", {}),
        setter("error_reference", "nobody"),
        setter("tensors", "decoder.bias", "0" * 64),
        setter("tensors", "decoder.bias", None),
        setter("tensors", "extra", "0" * 64),
        setter("surprise", 1),
        lambda m: m.pop("source"),
    ]
    for change in changes:
        refused(attempt, sealed(packed, change), FormatError)


def test_values_out_of_range_with_right_hashes(small):
    packed, _ = small

    def broken(name, change):
        tensors = {k: t.clone() for k, t in packed.tensors.items()}
        change(tensors[name])
        metadata = {**packed.metadata, "tensors": tensor_hashes(tensors)}
        metadata["metadata_sha256"] = self_hash(metadata)
        return PackedModel(metadata, tensors)

    def fill(index, value):
        return lambda tensor: tensor.__setitem__(index, value)

    for name, change, word in [
        ("embedding/encoder.weight.codes", fill((0, 0), 3), "grid"),  # the paper grid has 3 levels
        ("embedding/encoder.weight.codes", fill((0, -1), 0x40), "padding"),
        ("embedding/encoder.weight.scales", fill((0, 0), float("nan")), "finite"),
        ("embedding/encoder.weight.scales", fill((1, 0), -1.0), "negative"),
        ("output/decoder.weight.weight", fill((0, 0), float("inf")), "finite"),
        ("rnn.bias_ih_l0", fill(0, float("nan")), "finite"),
    ]:
        forged = broken(name, change)
        with pytest.raises(FormatError, match=word):
            to_bytes(forged)
        header = header_bytes(forged.specs, forged.metadata)
        pieces = [forged.tensors[s.name].numpy().tobytes() for s in forged.specs]
        with pytest.raises(FormatError, match=word):
            from_bytes(b"".join([len(header).to_bytes(8, "little"), header, *pieces]))


def test_wrong_token_list(attempt, small):
    packed, data = small
    other = tokens(6)
    other[2], other[3] = other[3], other[2]
    for token_list in (other, tokens(7), tokens(5), ["a"] * 6, []):
        if token_list:
            with pytest.raises(MismatchError) as info:
                attempt(data, token_list)
            message = str(info.value)
            assert token_list_sha256(token_list) in message
            assert packed.metadata["token_list"]["sha256"] in message and "mpq pack" in message
    foreign = sealed(packed, lambda m: m["token_list"].update(sha256=token_list_sha256(other)))
    assert "another token list" in refused(attempt, foreign, MismatchError)


def test_wrong_architecture_or_plan(small, tmp_path):
    packed, data = small
    path = tmp_path / "packed.safetensors"
    path.write_bytes(data)
    arch = packed.architecture
    for key, value in [("nhid", 5), ("rnn_type", "rnn_relu"), ("unit", 6), ("nlayers", 2)]:
        other = type(arch)(**{**dataclasses.asdict(arch), key: value})
        runtime = PackedRnn(other, uniform(other, ClusterSpec(2)))
        with pytest.raises(MismatchError, match=f"{key}.*{value!r} in config.yaml.*in the file"):
            load_into(runtime, path, vocabulary(tokens(6)))
        assert not runtime.filled
    specs = {**packed.plan.clusters, "output": ClusterSpec(8)}
    for plan in (Plan(specs), Plan(packed.plan.clusters, "float32")):
        runtime = PackedRnn(arch, plan)
        with pytest.raises(MismatchError, match="config.yaml"):
            load_into(runtime, path, vocabulary(tokens(6)))
    with pytest.raises(MismatchError, match="another kind: found LSTM; expected the runtime of"):
        load_into(torch.nn.LSTM(2, 2), path, vocabulary(tokens(6)))
    with pytest.raises(InputError, match="cannot read"):
        load_into(PackedRnn(arch, packed.plan), tmp_path / "none", vocabulary(tokens(6)))


def test_flips_in_a_larger_file_of_every_kind(tmp_path):
    """One flip inside every tensor of a model with all tyings is seen, and named."""
    arch = architecture("lstm", vocab_size=9, unit=6, nhid=6, nlayers=2)
    packed = packed_model(arch, mixed(arch, 5))
    data = to_bytes(packed)
    offset = 8 + header_length(data)
    for spec in packed.specs:
        changed = bytearray(data)
        changed[offset + spec.n_bytes // 2] ^= 0x10
        with pytest.raises(FormatError, match="damaged") as info:
            from_bytes(bytes(changed))
        assert spec.name in str(info.value)
        offset += spec.n_bytes


def test_what_was_not_fetched_is_named(tmp_path):
    path = tmp_path / "packed.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="Git LFS pointer.*git lfs pull"):
        load_packed(path)
    path.unlink()
    path.symlink_to("../.git/annex/objects/x/packed.safetensors")
    with pytest.raises(InputError, match="git annex get"):
        load_packed(path)
