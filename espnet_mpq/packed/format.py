"""The packed LM file: write it whole or not at all, read it only when every byte is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Dict, List, Mapping, Tuple, Union

import torch

from espnet_mpq.architecture import families
from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster
from espnet_mpq.errors import FormatError, InputError
from espnet_mpq.file_kind import refuse_unfetched
from espnet_mpq.io import atomic_write, sha256_bytes
from espnet_mpq.packed import container
from espnet_mpq.packed.bits import unpack_codes
from espnet_mpq.packed.container import AGAIN, PREFIX_N_BYTES
from espnet_mpq.packed.metadata import VERSION, check, header_bytes
from espnet_mpq.packed.tensors import DTYPES, TensorSpec, find_part, tensor_specs
from espnet_mpq.plan import Plan
from espnet_mpq.quant.grid import make_grid

__all__ = ["PACKED_FILE", "VERSION", "PackedModel", "save_packed", "load_packed"]
PACKED_FILE = "packed.safetensors"  # its name in an experiment


@dataclass
class PackedModel:
    """A packed LM in memory.

    metadata: as FORMAT.md describes, with ``metadata_sha256``.
    tensors: name -> packed codes (uint8), scales (float16 | float32), 16- and 32-bit
        weights and the float32 rest; names and shapes of layout.tensor_specs.
    """

    metadata: dict
    tensors: Dict[str, torch.Tensor] = field(repr=False)

    @cached_property
    def architecture(self) -> Architecture:
        return families.from_dict(self.metadata["architecture"])

    @cached_property
    def plan(self) -> Plan:
        return Plan.from_dict(self.metadata["plan"])

    @property
    def clusters(self) -> List[Cluster]:
        return self.architecture.clusters()

    @property
    def rest(self) -> List[Tuple[str, Tuple[int, ...]]]:
        return self.architecture.rest()

    @property
    def specs(self) -> List[TensorSpec]:
        return tensor_specs(self.architecture, self.plan)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file."""
        header = PREFIX_N_BYTES + len(header_bytes(self.specs, self.metadata))
        return header + sum(spec.n_bytes for spec in self.specs)


def tensor_hashes(tensors: Mapping[str, torch.Tensor]) -> Dict[str, str]:
    """Tensor name -> SHA-256 of its bytes in the file."""
    return {name: sha256_bytes(container.tensor_bytes(t)) for name, t in tensors.items()}


def to_bytes(packed: PackedModel) -> bytes:
    """The whole file as bytes; the same model always gives the same bytes.

    Raises:
        FormatError: metadata and tensors do not fit each other.
    """
    _, plan, specs = check(packed.metadata, "packed model")
    pieces = []
    for spec in specs:
        tensor = packed.tensors.get(spec.name)
        dtype = DTYPES[spec.dtype][0]
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != spec.shape:
            found = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise FormatError(f"tensor {spec.name}", found=found, expected=f"{dtype} {spec.shape}")
        pieces.append(container.tensor_bytes(tensor))
        if sha256_bytes(pieces[-1]) != packed.metadata["tensors"][spec.name]:
            raise FormatError(f"tensor {spec.name} does not have the hash of the metadata")
    _check_values(packed, specs, "packed model")
    header = header_bytes(specs, packed.metadata)
    return b"".join([len(header).to_bytes(PREFIX_N_BYTES, "little"), header, *pieces])


def save_packed(path: Union[str, Path], packed: PackedModel) -> int:
    """Write a packed LM atomically; returns the bytes written.

    Raises:
        FormatError: the model is inconsistent (nothing is written).
        InputError: the file cannot be written, for example the disk is full; an older file
            stays as it was and no partial file is left.
    """
    data = to_bytes(packed)
    atomic_write(path, data)
    return len(data)


def load_packed(path: Union[str, Path]) -> PackedModel:
    """Read and verify a packed LM: container, metadata, hashes and the range of all values.

    Raises:
        InputError: the file cannot be read.
        FormatError: it is damaged, of an unknown version, or no packed LM.
    """
    refuse_unfetched(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the packed LM {path}",
            found=error.strerror or error,
            todo="make it with `mpq pack`",
        ) from error
    return from_bytes(data, str(path))


def from_bytes(data: bytes, path: str = "packed LM") -> PackedModel:
    """As load_packed, from the bytes of a file; ``path`` names it in errors."""
    header, payload = container.split(data, path)
    entries, metadata = container.parse_header(header, path)
    _, _, specs = check(metadata, path)
    # The header follows from the metadata; comparing whole catches any change outside the hash.
    if header_bytes(specs, metadata) != header:
        what, found, expected = container.first_difference(entries, specs)
        raise FormatError(f"{path}: {what}", found=found, expected=expected, todo=AGAIN)
    expected = sum(spec.n_bytes for spec in specs)
    if len(payload) != expected:
        raise FormatError(
            f"{path} is truncated or has bytes too many",
            found=f"{len(payload)} bytes of tensors",
            expected=expected,
            todo=AGAIN,
        )
    tensors, offset = {}, 0
    for spec in specs:
        digest = sha256_bytes(payload[offset : offset + spec.n_bytes])
        if digest != metadata["tensors"][spec.name]:
            raise FormatError(
                f"{path}: tensor {spec.name} is damaged",
                found=f"SHA-256 {digest}",
                expected=metadata["tensors"][spec.name],
                todo=AGAIN,
            )
        tensors[spec.name] = container.read_tensor(payload, offset, spec)
        offset += spec.n_bytes
    packed = PackedModel(metadata, tensors)
    _check_values(packed, specs, path)
    return packed


def _check_values(packed: PackedModel, specs: List[TensorSpec], path: str) -> None:
    """Hashes prove what was written; this proves that a runtime can use it."""
    for spec in specs:
        tensor = packed.tensors[spec.name]
        if spec.role == "codes":
            cluster, part = find_part(packed.architecture, spec.name)
            cluster_spec = packed.plan.clusters[cluster.name]
            grid = make_grid(cluster_spec.grid, cluster_spec.bits)
            largest = _largest_code(tensor, cluster_spec.bits, part.cols)
            if largest >= len(grid.levels):
                raise FormatError(
                    f"{path}: tensor {spec.name} has codes outside its grid or nonzero padding",
                    found=largest,
                    expected=f"below {len(grid.levels)}",
                )
        elif not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{path}: tensor {spec.name} has values that are not finite")
        elif spec.role == "scales" and bool((tensor < 0).any()):
            raise FormatError(f"{path}: tensor {spec.name} has negative scales")


def _largest_code(packed_codes: torch.Tensor, bits: int, cols: int) -> int:
    """The largest code; 256 if a padding bit is set. Works byte-wise, so no unpacked copy."""
    used = cols * bits % 8
    if used and int((packed_codes[:, -1] >> used).max()) != 0:
        return 256
    if bits == 3:  # every code is one of its grid but for the last of "paper"
        return int(unpack_codes(packed_codes, bits, cols).max())
    # Per bit position of a byte, the largest code there.
    mask = 2**bits - 1
    return max(int(((packed_codes >> shift) & mask).max()) for shift in range(0, 8, bits))
