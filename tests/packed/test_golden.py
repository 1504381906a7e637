"""The golden files: writing and reading are pinned, and FORMAT.md alone is enough to read them."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from math import prod
from pathlib import Path

import pytest
import torch

import espnet_mpq
from espnet_mpq.architecture.listed import ListedArchitecture
from espnet_mpq.hosts.espnet.families import vocabulary
from espnet_mpq.io import sha256_bytes
from espnet_mpq.packed import metadata
from espnet_mpq.packed.bits import pack_codes
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.packed.format import PackedModel, load_packed, tensor_hashes, to_bytes
from espnet_mpq.packed.metadata import build, format_error
from espnet_mpq.packed.tensors import DTYPES, parts_by_codes
from espnet_mpq.plan import ClusterSpec, Plan
from espnet_mpq.quant.grid import make_grid
from espnet_mpq.vocabulary import SPECIAL

from packed_models import architecture, tokens, transformer  # isort: skip

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = FOLDER / "packed_gru_v1.safetensors"
TRANSFORMER = FOLDER / "packed_transformer_v1.safetensors"
LISTED = FOLDER / "packed_listed_v1.safetensors"
GOLDEN_SHA256 = "66b2719bda4d9ed5dc9586fc9b021d5ec24c9aa7751264bc01cf6e14c777e27b"
SHA256 = {
    GOLDEN: GOLDEN_SHA256,
    TRANSFORMER: "d34ee76f86007ca383f50d45c52278e890791cb653197e363116405efd57f229",
    LISTED: "a8c86aa2ab4d2f56ec83e105c3cc25dd9367c84b0602c9591e0cca6e66c8e71f",
}
VALUES_SHA256 = "031e7b3b40b6c53f630f6bdb0ef22dc8d1381ca9fcb8dfdebef4678f0c9d8be8"
FORMAT_MD = Path(espnet_mpq.__file__).parent / "packed" / "FORMAT.md"


# Every bit-width and tying in one tiny GRU LM, and the parts of a Transformer LM.
MODELS = {
    GOLDEN: (
        architecture("gru", vocab_size=4, unit=5, nhid=3, nlayers=1),
        {
            "embedding": ClusterSpec(2, "uniform", "row"),
            "rnn.l0.r": ClusterSpec(1, "uniform", "group", 2),
            "rnn.l0.z": ClusterSpec(4, "paper", "model"),
            "rnn.l0.n": ClusterSpec(8, "uniform", "cluster"),
            "output": ClusterSpec(16),
        },
    ),
    TRANSFORMER: (
        transformer(4, "sinusoidal", embed_unit=3, att_unit=4, head=2, unit=5, layer=1),
        {
            "embedding": ClusterSpec(4, "paper", "row"),
            "blocks.0.attention": ClusterSpec(2, "uniform", "group", 3),
            "blocks.0.feed_forward": ClusterSpec(1, "uniform", "cluster"),
            "output": ClusterSpec(32),
        },
    ),
    LISTED: (
        ListedArchitecture(
            vocab_size=4,
            title="golden",
            state={
                "conv.weight": (3, 2, 2),
                "out.weight": (4, 3),
                "out.bias": (4,),
                "norm.running_var": (3,),
                "kept": (2, 3),
            },
            groups=(
                ("out", "linear", (("out.weight", 2, 4),)),
                ("conv", "convolution", (("conv.weight", 0, 3), ("out.weight", 0, 2))),
            ),
            tied={"embed.weight": "out.weight"},
            kept_matrices=("kept",),
        ),
        {
            "out": ClusterSpec(1, "uniform", "row"),
            "conv": ClusterSpec(2, "paper", "group", 2),
        },
    ),
}


def golden_model(path: Path) -> PackedModel:
    """The model of a golden file; all its values are exact in binary."""
    arch, specs = MODELS[path]
    plan = Plan(specs)
    packed = PackedModel({"architecture": arch.to_dict(), "plan": plan.to_dict()}, {})
    tensors = packed.tensors
    for n, spec in enumerate(packed.specs):
        if spec.role == "codes":
            cluster, part = parts_by_codes(arch)[spec.name]
            bits = specs[cluster.name].bits
            n_levels = len(make_grid(specs[cluster.name].grid, bits).levels)
            codes = torch.arange(part.n_weights).reshape(part.shape) * 7 + 3 * n
            tensors[spec.name] = pack_codes((codes % n_levels).to(torch.uint8), bits)
        else:
            values = torch.arange(1.0, 1 + torch.Size(spec.shape).numel()).reshape(spec.shape)
            sign = 1 if spec.role == "scales" else (-1) ** n
            tensors[spec.name] = (sign * values / 8).to(DTYPES[spec.dtype][0])
    record = build(
        arch,
        plan,
        token_list=vocabulary(tokens(4)).record(),
        ids=vocabulary(tokens(4)).special_ids,
        source={"tool_version": "0.1.0", "command": "golden", "seed": 0},
        relative_error={name: format_error(k / 16) for k, name in enumerate(specs)},
        error_reference="checkpoint",
        tensors=tensor_hashes(tensors),
    )
    return PackedModel(record, tensors)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_writing_is_pinned(path):
    data = to_bytes(golden_model(path))
    assert data == path.read_bytes()
    assert sha256_bytes(data) == SHA256[path]


def test_reading_is_pinned():
    packed = load_packed(GOLDEN)
    values = float_state(packed)
    assert values["encoder.weight"].tolist() == [
        [0.375, 0.125, -0.125, -0.375, 0.375],
        [0.25, -0.25, -0.75, 0.75, 0.25],
        [-0.375, -1.125, 1.125, 0.375, -0.375],
        [-1.5, 1.5, 0.5, -0.5, -1.5],
    ]
    assert values["rnn.weight_hh_l0"].tolist() == [
        [-0.125, 0.125, -0.25],
        [0.375, -0.375, 0.5],
        [-0.625, 0.625, -0.75],
        [0.625, -0.375, 0.5],
        [-0.5, 0.375, -0.625],
        [0.25, -0.75, 0.125],
        [-12.25, -11.375, -10.5],
        [-9.625, -8.75, -7.875],
        [-7.0, -6.125, -5.25],
    ]
    assert values["decoder.weight"].tolist() == [
        [-0.125, -0.25, -0.375],
        [-0.5, -0.625, -0.75],
        [-0.875, -1.0, -1.125],
        [-1.25, -1.375, -1.5],
    ]
    joined = b"".join(values[name].numpy().tobytes() for name in sorted(values))
    assert sha256_bytes(joined) == VALUES_SHA256
    assert packed.metadata["special_ids"] == {"blank": 0, "unk": 1, "sos": 3, "eos": 3}


def test_reading_a_listed_model_is_pinned():
    values = float_state(load_packed(LISTED))
    assert values["conv.weight"].shape == (3, 2, 2)
    assert values["conv.weight"].tolist() == [
        [[-0.125, 0.0], [0.25, -0.25]],
        [[0.0, 0.375], [-0.5, 0.0]],
        [[0.625, -0.625], [0.0, 0.75]],
    ]
    assert values["out.weight"].tolist() == [
        [-0.125, 0.0, 0.25],
        [-0.375, 0.0, 0.5],
        [-0.125, 0.125, -0.125],
        [0.25, -0.25, 0.25],
    ]
    assert values["kept"].tolist() == [[0.125, 0.25, 0.375], [0.5, 0.625, 0.75]]


def test_reading_a_transformer_is_pinned():
    packed = load_packed(TRANSFORMER)
    values = float_state(packed)
    assert packed.architecture == MODELS[TRANSFORMER][0]
    assert values["embed.weight"].tolist() == [
        [-0.875, 0.0, 0.875],
        [-0.25, 1.5, -0.5],
        [1.875, -1.125, 1.5],
        [-2.0, 1.5, -2.5],
    ]
    assert values["encoder.encoders.0.self_attn.linear_v.weight"].tolist() == [
        [-0.125, -0.375, 0.375, 0.25],
        [-0.375, -1.125, 1.125, 0.5],
        [-0.625, -1.875, 1.875, 0.75],
        [-0.875, -2.625, 2.625, 1.0],
    ]
    assert values["encoder.encoders.0.feed_forward.w_2.weight"].tolist() == [
        [0.125, -0.125, 0.125, -0.125, 0.125],
        [-0.125, 0.125, -0.125, 0.125, -0.125],
        [0.125, -0.125, 0.125, -0.125, 0.125],
        [-0.125, 0.125, -0.125, 0.125, -0.125],
    ]
    assert values["encoder.encoders.0.norm2.bias"].tolist() == [0.125, 0.25, 0.375, 0.5]
    assert values["decoder.weight"][3].tolist() == [1.625, 1.75, 1.875, 2.0]


# From here on nothing of the package is used: FORMAT.md alone, in plain Python. -------------


def columns(parameter: str, sizes: dict) -> int:
    """The width of a weight matrix, from the architecture's record."""
    if sizes["class"] == "listed":
        return prod(sizes["state"][parameter][1:])
    if sizes["class"] == "rnn":
        return sizes["unit" if parameter in ("encoder.weight", "rnn.weight_ih_l0") else "nhid"]
    if parameter in ("embed.weight", "encoder.embed.0.weight"):
        return sizes["embed_unit"]
    return sizes["unit" if parameter.endswith("feed_forward.w_2.weight") else "att_unit"]


def from_document(path: Path) -> dict:
    """Parameter name -> rows of floats, read from a golden file by the rules of FORMAT.md."""
    data = path.read_bytes()
    (n_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n_bytes])
    facts = json.loads(header.pop("__metadata__")["espnet_mpq"])
    body = {k: v for k, v in facts.items() if k != "metadata_sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == facts["metadata_sha256"]
    payload, tensors = data[8 + n_bytes :], {}
    for name, entry in header.items():
        piece = payload[slice(*entry["data_offsets"])]
        assert hashlib.sha256(piece).hexdigest() == facts["tensors"][name]
        if entry["dtype"] == "U8":
            flat = list(piece)
        else:
            kind, size = {"F16": ("e", 2), "F32": ("f", 4)}[entry["dtype"]]
            flat = list(struct.unpack(f"<{len(piece) // size}{kind}", piece))
        cols = entry["shape"][-1]
        tensors[name] = [flat[i : i + cols] for i in range(0, len(flat), cols)]
    values = {}
    for name, mat in tensors.items():
        cluster, slash, rest = name.partition("/")
        if not slash:
            values[name] = mat[0] if len(mat) == 1 else mat
        elif rest.endswith(".weight") and name + ".codes" not in tensors and rest.count(".") > 1:
            values[rest[: -len(".weight")]] = mat
        elif rest.endswith(".codes"):
            parameter = rest[: -len(".codes")]
            spec = facts["plan"]["clusters"][cluster]
            bits = spec["bits"]
            top = 2 ** (bits - 1) - 1
            if bits == 1:
                levels = [-1, 1]
            elif spec["grid"] == "paper":
                levels = range(-top, top + 1)
            else:
                levels = range(-128, 128) if bits == 8 else range(1 - 2**bits, 2**bits, 2)
            scales = {
                "row": tensors.get(f"{cluster}/{parameter}.scales"),
                "group": tensors.get(f"{cluster}/{parameter}.scales"),
                "cluster": tensors.get(f"{cluster}/scale"),
                "model": tensors.get(f"model/{bits}-{spec['grid']}/scale"),
            }[spec["tying"]]
            cols = columns(parameter, facts["architecture"])
            group = spec.get("group_size", cols)
            rows = []
            for r, row in enumerate(mat):
                whole = int.from_bytes(bytes(row), "little")
                codes = [whole >> (j * bits) & (2**bits - 1) for j in range(cols)]
                own = scales[r if len(scales) > 1 else 0]
                rows.append([levels[code] * own[j // group] for j, code in enumerate(codes)])
            values.setdefault(parameter, {})[cluster] = rows
    starts = {  # cluster, parameter -> first row, where the record says it
        (cluster, parameter): start
        for cluster, _, parts in facts["architecture"].get("groups", ())
        for parameter, start, _ in parts
    }
    for name, value in values.items():
        if isinstance(value, dict):  # gates stack in the order r, z, n; others are whole
            order = [f"rnn.l0.{gate}" for gate in "rzn"] if len(value) > 1 else list(value)
            if starts:
                order = sorted(value, key=lambda cluster: starts[cluster, name])
            values[name] = [row for cluster in order for row in value[cluster]]
    return values


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_an_implementation_from_the_document_agrees(path):
    mine, values = from_document(path), float_state(load_packed(path))
    assert set(mine) == set(values)
    for name, value in values.items():
        assert mine[name] == value.flatten(1 if value.dim() > 1 else 0).tolist(), name


def documented_examples() -> list:
    text = FORMAT_MD.read_text(encoding="utf-8")
    return [json.loads(block) for block in re.findall(r"```json example\n(.*?)```", text, re.S)]


def test_worked_examples_of_the_document():
    examples = documented_examples()
    assert len(examples) >= 5
    for example in examples:
        bits, codes = example["bits"], example["codes"]
        grid = make_grid(example["grid"], bits)
        packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), bits)
        assert packed[0].tolist() == list(bytes.fromhex(example["bytes"]))
        assert [grid.levels[code] for code in codes] == example["levels"]
        group = example.get("group_size", len(codes))
        scales = [example["scales"][j // group] for j in range(len(codes))]
        assert [a * b for a, b in zip(scales, example["levels"])] == example["values"]


def test_numbers_of_the_document_are_those_of_the_golden_file():
    text, data = FORMAT_MD.read_text(encoding="utf-8"), GOLDEN.read_bytes()
    n_bytes = int.from_bytes(data[:8], "little")
    assert f"`{data[:8].hex(' ')}`" in text and f"{n_bytes} bytes" in text
    assert f"{len(data)} bytes" in text and GOLDEN_SHA256 in text
    assert f"{TRANSFORMER.stat().st_size} bytes" in text and SHA256[TRANSFORMER] in text
    header = json.loads(data[8 : 8 + n_bytes])
    begin, end = header["embedding/encoder.weight.codes"]["data_offsets"]
    codes = data[8 + n_bytes + begin : 8 + n_bytes + end]
    assert f"`{codes.hex(' ')}`" in text and f"[{begin}, {end}]" in text


def test_document_names_every_key():
    text = FORMAT_MD.read_text(encoding="utf-8")
    assert f"m + {metadata.RESERVED_N_BYTES}" in text
    for name in metadata.KEYS + SPECIAL + metadata.ERROR_REFERENCES:
        assert f"`{name}`" in text or f'`"{name}"`' in text, name
