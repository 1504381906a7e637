"""The safetensors container: bytes of header and tensors, in the one canonical form we accept."""

from __future__ import annotations

import hashlib
import json
from typing import BinaryIO, Dict, Mapping, Sequence, Tuple

import torch

from espnet_mpq import strict_json
from espnet_mpq.errors import FormatError
from espnet_mpq.packed.tensors import DTYPES, TensorSpec

KEY = "espnet_mpq"
_START = b'{"__metadata__":{"%s":"' % KEY.encode()
PREFIX_N_BYTES = 8  # little-endian length of the header
PIECE_N_BYTES = 1 << 20  # read and hashed at a time
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


def read_tensor(file: BinaryIO, spec: TensorSpec) -> Tuple[torch.Tensor, str]:
    """The next tensor of a file, in memory of its own, and the SHA-256 of its bytes.

    Each tensor has its own memory, so that a runtime can free it alone, and the file may be
    changed afterwards: views of a memory map would die with it (SIGBUS) or change.

    Raises:
        EOFError: the file ends before.
    """
    memory, digest = bytearray(spec.n_bytes), hashlib.sha256()
    for start in range(0, spec.n_bytes, PIECE_N_BYTES):
        piece = memoryview(memory)[start : start + PIECE_N_BYTES]
        if file.readinto(piece) != len(piece):
            raise EOFError
        digest.update(piece)
    dtype = DTYPES[spec.dtype][0]
    flat = torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)
    return flat.reshape(spec.shape), digest.hexdigest()


def read_header(file: BinaryIO, n_bytes: int, path: str) -> bytes:
    """The header with its padding, from the start of a file of ``n_bytes`` bytes.

    Raises:
        FormatError: the file is too short for the header it announces, or that is too long.
    """
    prefix = file.read(PREFIX_N_BYTES)
    if len(prefix) < PREFIX_N_BYTES:
        raise FormatError(
            f"{path} is no packed LM", found=f"{len(prefix)} bytes", expected="a header", todo=AGAIN
        )
    announced = int.from_bytes(prefix, "little")
    most = min(n_bytes - PREFIX_N_BYTES, strict_json.MOST_N_BYTES)
    header = file.read(announced) if 2 <= announced <= most else b""
    if len(header) != announced:
        raise FormatError(
            f"{path} is truncated or no packed LM",
            found=f"a header length of {announced} bytes",
            expected=f"at most {most}",
            todo=AGAIN,
        )
    return header


def read_metadata(header: bytes, path: str) -> dict:
    """Our metadata from a header; the entries of the tensors are not looked at.

    Raises:
        FormatError: not JSON, or not written by `mpq pack`.
    """
    text = None
    if header.startswith(_START):
        try:
            text, _ = json.decoder.scanstring(header.decode("utf-8"), len(_START))
        except ValueError as error:
            raise FormatError(
                f"{path}: the header is damaged", found=_short(error), todo=AGAIN
            ) from error
    else:
        outer = _object(header, f"{path}: the header", path).get("__metadata__")
        text = outer.get(KEY) if isinstance(outer, dict) else None
    if not isinstance(text, str):
        raise FormatError(
            f"{path} is a safetensors file but no packed LM",
            found="no metadata of espnet_mpq",
            todo="give the packed.safetensors that `mpq pack` wrote",
        )
    return _object(text.encode("utf-8", "replace"), f"{path}: the metadata", path)


def _object(text: bytes, what: str, path: str) -> dict:
    try:
        value = strict_json.parse(text)
    except ValueError as error:
        raise FormatError(f"{what} is damaged", found=_short(error), todo=AGAIN) from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} is damaged", found=type(value).__name__, expected="an object")
    return value


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def first_difference(
    header: bytes, specs: Sequence[TensorSpec], path: str
) -> Tuple[str, str, str]:
    """What differs first between a header and the tensors it must have: (what, found, expected).

    Raises:
        FormatError: the header is not JSON.
    """
    entries = _object(header, f"{path}: the header", path)
    entries.pop("__metadata__", None)
    names = {spec.name for spec in specs}
    missing = [spec.name for spec in specs if spec.name not in entries]
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
