"""The packed LM file: write it whole or not at all, read it only when every byte is right."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Dict, List, Mapping, Tuple, Union

import torch

from espnet_mpq.architecture import families
from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.errors import FormatError, InputError
from espnet_mpq.file_kind import absence, refuse_unfetched
from espnet_mpq.io import atomic_write, sha256_bytes
from espnet_mpq.packed import container
from espnet_mpq.packed.bits import unpack_codes
from espnet_mpq.packed.container import AGAIN, PIECE_N_BYTES, PREFIX_N_BYTES
from espnet_mpq.packed.metadata import VERSION, check, header_bytes
from espnet_mpq.packed.tensors import DTYPES, TensorSpec, parts_by_codes, tensor_specs
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
    architecture, plan, specs = check(packed.metadata, "packed model")
    pieces, parts = [], parts_by_codes(architecture)
    for spec in specs:
        tensor = packed.tensors.get(spec.name)
        dtype = DTYPES[spec.dtype][0]
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != spec.shape:
            found = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise FormatError(f"tensor {spec.name}", found=found, expected=f"{dtype} {spec.shape}")
        pieces.append(container.tensor_bytes(tensor))
        if sha256_bytes(pieces[-1]) != packed.metadata["tensors"][spec.name]:
            raise FormatError(f"tensor {spec.name} does not have the hash of the metadata")
        _check_values(tensor, spec, parts, plan, "packed model")
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
        found = absence(path)
        if found is None:
            with open(path, "rb") as file:
                return _read(file, os.fstat(file.fileno()).st_size, str(path))
    except OSError as error:
        found = error.strerror or str(error), None
    raise InputError(
        f"cannot read the packed LM {path}",
        found=found[0],
        todo=found[1] or "make it with `mpq pack`",
    )


def is_packed(path: Union[str, Path]) -> bool:
    """Whether a file begins as a packed LM; its tensors are not read. False for no file."""
    try:
        with open(path, "rb") as file:
            header = container.read_header(file, os.fstat(file.fileno()).st_size, str(path))
            container.read_metadata(header, str(path))
    except (OSError, FormatError):
        return False
    return True


def from_bytes(data: bytes, path: str = "packed LM") -> PackedModel:
    """As load_packed, from the bytes of a file; ``path`` names it in errors."""
    return _read(io.BytesIO(data), len(data), path)


def _read(file: BinaryIO, n_bytes: int, path: str) -> PackedModel:
    """Memory: the tensors, and no more than a constant besides (strict_json, pieces of 1 MiB)."""
    header = container.read_header(file, n_bytes, path)
    metadata = container.read_metadata(header, path)
    architecture, plan, specs = check(metadata, path)
    # The header follows from the metadata; comparing whole catches any change outside the hash.
    if header_bytes(specs, metadata) != header:
        what, found, expected = container.first_difference(header, specs, path)
        raise FormatError(f"{path}: {what}", found=found, expected=expected, todo=AGAIN)
    expected, found = sum(s.n_bytes for s in specs), n_bytes - PREFIX_N_BYTES - len(header)
    if found != expected:
        raise FormatError(
            f"{path} is truncated or has bytes too many",
            found=f"{found} bytes of tensors",
            expected=expected,
            todo=AGAIN,
        )
    packed = PackedModel(metadata, {})
    packed.architecture, packed.plan = architecture, plan
    parts = parts_by_codes(architecture)
    for spec in specs:
        try:
            tensor, digest = container.read_tensor(file, spec)
        except EOFError:
            raise FormatError(
                f"{path} was cut while it was read", found=f"no more in {spec.name}", todo=AGAIN
            ) from None
        if digest != metadata["tensors"][spec.name]:
            raise FormatError(
                f"{path}: tensor {spec.name} is damaged",
                found=f"SHA-256 {digest}",
                expected=metadata["tensors"][spec.name],
                todo=AGAIN,
            )
        packed.tensors[spec.name] = tensor
        _check_values(tensor, spec, parts, plan, path)
    return packed


def _check_values(
    tensor: torch.Tensor,
    spec: TensorSpec,
    parts: Mapping[str, Tuple[Cluster, Part]],
    plan: Plan,
    path: str,
) -> None:
    """Hashes prove what was written; this proves that a runtime can use it.

    ``parts`` as parts_by_codes gives them.
    """
    row_n_bytes = max(1, spec.n_bytes // max(1, spec.shape[0] if spec.shape else 1))
    for rows in tensor.reshape(spec.shape or (1,)).split(max(1, PIECE_N_BYTES // row_n_bytes)):
        if spec.role == "codes":
            cluster, part = parts[spec.name]
            cluster_spec = plan.clusters[cluster.name]
            n_levels = len(make_grid(cluster_spec.grid, cluster_spec.bits).levels)
            largest = _largest_code(rows, cluster_spec.bits, part.cols)
            if largest >= n_levels:
                raise FormatError(
                    f"{path}: tensor {spec.name} has codes outside its grid or nonzero padding",
                    found=largest,
                    expected=f"below {n_levels}",
                )
        elif not bool(torch.isfinite(rows).all()):
            raise FormatError(f"{path}: tensor {spec.name} has values that are not finite")
        elif spec.role == "scales" and bool((rows < 0).any()):
            raise FormatError(f"{path}: tensor {spec.name} has negative scales")


def _largest_code(packed_codes: torch.Tensor, bits: int, cols: int) -> int:
    """The largest code; 256 if a padding bit is set. Works byte-wise, so no unpacked copy."""
    used = cols * bits % 8  # of the last byte; 0: all
    if used and int((packed_codes[:, -1] >> used).max()) != 0:
        return 256
    if bits == 3:  # every code is one of its grid but for the last of "paper"
        return int(unpack_codes(packed_codes, bits, cols).max())
    # Per bit position of a byte, the largest code there.
    mask = 2**bits - 1
    return max(int(((packed_codes >> shift) & mask).max()) for shift in range(0, 8, bits))
