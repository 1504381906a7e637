"""The safetensors container: bytes of header and tensors, in the one canonical form we accept."""

from __future__ import annotations

import json
from typing import Dict, Mapping, Sequence, Tuple

import torch

from espnet_mpq.errors import FormatError
from espnet_mpq.packed.tensors import DTYPES, TensorSpec

KEY = "espnet_mpq"
PREFIX_N_BYTES = 8  # little-endian length of the header
LARGEST_HEADER_N_BYTES = 100_000_000  # the limit of the safetensors library
AGAIN = "copy the file again, or make it again with `mpq pack`"


def canonical_json(value) -> str:
    """JSON with sorted keys, no spaces, non-ASCII as is; the form that is hashed.

    Raises:
        ValueError: NaN or infinity.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def header_json(specs: Sequence[TensorSpec], metadata: Mapping) -> bytes:
    """The header without padding: __metadata__, then the tensors in file order."""
    entries: Dict[str, object] = {"__metadata__": {KEY: canonical_json(metadata)}}
    offset = 0
    for spec in specs:
        end = offset + spec.n_bytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def round_up(n_bytes: int, unit: int = 8) -> int:
    return -(-n_bytes // unit) * unit


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Row-major little-endian bytes of a CPU tensor."""
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def read_tensor(payload: memoryview, offset: int, spec: TensorSpec) -> torch.Tensor:
    """A tensor of its own memory from ``spec.n_bytes`` bytes at ``offset``."""
    piece = bytearray(payload[offset : offset + spec.n_bytes])
    return torch.frombuffer(piece, dtype=DTYPES[spec.dtype][0]).reshape(spec.shape)


def split(data: bytes, path: str) -> Tuple[bytes, memoryview]:
    """Cut a file into header (with its padding) and tensor data.

    Raises:
        FormatError: the file is too short for the header it announces.
    """
    if len(data) < PREFIX_N_BYTES:
        raise FormatError(
            f"{path} is no packed LM", found=f"{len(data)} bytes", expected="a header", todo=AGAIN
        )
    n_bytes = int.from_bytes(data[:PREFIX_N_BYTES], "little")
    room = min(len(data) - PREFIX_N_BYTES, LARGEST_HEADER_N_BYTES)
    if not 2 <= n_bytes <= room:
        raise FormatError(
            f"{path} is truncated or no packed LM",
            found=f"a header length of {n_bytes} bytes",
            expected=f"at most {room}",
            todo=AGAIN,
        )
    end = PREFIX_N_BYTES + n_bytes
    return data[PREFIX_N_BYTES:end], memoryview(data)[end:]


def parse_header(header: bytes, path: str) -> Tuple[dict, dict]:
    """The tensor entries and our metadata from a header.

    Raises:
        FormatError: not JSON, or not written by `mpq pack`.
    """
    entries = _object(header, f"{path}: the header", path)
    outer = entries.pop("__metadata__", None)
    if not isinstance(outer, dict) or not isinstance(outer.get(KEY), str):
        raise FormatError(
            f"{path} is a safetensors file but no packed LM",
            found="no metadata of espnet_mpq",
            todo="give the packed.safetensors that `mpq pack` wrote",
        )
    return entries, _object(outer[KEY].encode("utf-8", "replace"), f"{path}: the metadata", path)


def _object(text: bytes, what: str, path: str) -> dict:
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is damaged", found=_short(error), todo=AGAIN) from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} is damaged", found=type(value).__name__, expected="an object")
    return value


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def first_difference(entries: Mapping, specs: Sequence[TensorSpec]) -> Tuple[str, str, str]:
    """What differs first between a header and the tensors it must have: (what, found, expected)."""
    names = [spec.name for spec in specs]
    missing = [name for name in names if name not in entries]
    extra = [name for name in entries if name not in names]
    if missing or extra:
        return (
            "the tensors do not fit the architecture and plan",
            f"extra {extra[:3]}" if extra else "fewer tensors",
            f"also {missing[:3]}" if missing else "nothing more",
        )
    offset = 0
    for spec in specs:
        end = offset + spec.n_bytes
        found = entries[spec.name]
        want = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        if found != want:
            return f"tensor {spec.name} is described wrongly", str(found)[:160], str(want)
        offset = end
    return "the header is not in canonical form", "other spelling, order or padding", "FORMAT.md's"
