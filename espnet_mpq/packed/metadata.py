"""The metadata of a packed file: what it records, its self hash, and the check of its form."""

from __future__ import annotations

import re
from typing import List, Mapping, Optional, Sequence, Tuple

from espnet_mpq.architecture import families
from espnet_mpq.architecture.base import Architecture
from espnet_mpq.errors import FormatError, MpqError
from espnet_mpq.io import sha256_bytes
from espnet_mpq.packed.container import (
    AGAIN,
    canonical_json,
    header_json,
    round_up,
)
from espnet_mpq.packed.tensors import TensorSpec, tensor_specs
from espnet_mpq.plan import Plan
from espnet_mpq.vocabulary import SPECIAL

FORMAT = "espnet_mpq.packed"
VERSION = 2
# Room kept in every header for the values that are known only when packing, so that the size of
# a file follows from architecture and plan alone. If they need more, the header gets longer.
RESERVED_N_BYTES = 768
RESERVED = {"source": {}, "special_ids": {}, "error_reference": ""}
ELLIPSIS = "..."
KEYS = (
    "format",
    "version",
    "architecture",
    "plan",
    "token_list",
    "special_ids",
    "source",
    "relative_error",
    "error_reference",
    "tensors",
    "metadata_sha256",
)
ERROR_REFERENCES = ("fp", "checkpoint")  # the weights that relative_error compares with
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ERROR = re.compile(r"[0-9]\.[0-9]{4}e[+-][0-9]{2}")


def version_of(plan: Plan) -> int:
    """The version of a file: 2 where the plan has clusters of 3 bits, else 1."""
    return 2 if any(spec.bits == 3 for spec in plan.clusters.values()) else 1


def format_error(relative_error: float) -> str:
    """A relative error as it is stored: five digits, always ten characters."""
    value = float(relative_error)
    return f"{0.0 if value < 1e-99 else min(value, 9e99):.4e}"


def self_hash(metadata: Mapping) -> str:
    """SHA-256 of the canonical JSON of everything but ``metadata_sha256``."""
    rest = {key: value for key, value in metadata.items() if key != "metadata_sha256"}
    return sha256_bytes(canonical_json(rest).encode("utf-8"))


def build(
    architecture: Architecture,
    plan: Plan,
    *,
    token_list: Mapping,
    ids: Mapping[str, Optional[int]],
    source: Mapping,
    relative_error: Mapping[str, str],
    error_reference: str,
    tensors: Mapping[str, str],
) -> dict:
    """Complete metadata with its self hash; ``tensors`` is name -> SHA-256 of its bytes."""
    metadata = {
        "format": FORMAT,
        "version": version_of(plan),
        "architecture": architecture.to_dict(),
        "plan": plan.to_dict(provenance=False),
        "token_list": dict(token_list),
        "special_ids": dict(ids),
        "source": dict(source),
        "relative_error": dict(relative_error),
        "error_reference": error_reference,
        "tensors": dict(tensors),
    }
    metadata["metadata_sha256"] = self_hash(metadata)
    return metadata


def header_bytes(specs: Sequence[TensorSpec], metadata: Mapping) -> bytes:
    """The header as it stands in the file, padded with spaces to the reserved length."""
    text = header_json(specs, metadata)
    # Without the values that RESERVED stands for.
    bare_n_bytes = len(text)
    for key, value in RESERVED.items():
        bare_n_bytes += _stored_n_bytes(value) - _stored_n_bytes(metadata.get(key, value))
    n_bytes = max(round_up(bare_n_bytes + RESERVED_N_BYTES), round_up(len(text)))
    return text.ljust(n_bytes, b" ")


def _stored_n_bytes(value) -> int:
    """Of a value of the metadata, escaped once more as they are in the header."""
    return len(canonical_json(canonical_json(value)).encode("utf-8")) - 2


def shorten_command(specs: Sequence[TensorSpec], metadata: Mapping) -> dict:
    """Sealed metadata whose header has the predicted size, if a shorter command can do it."""
    source = dict(metadata["source"])
    bare = header_json(specs, {**metadata, **RESERVED})
    while True:
        shorter = {**metadata, "source": source}
        command = source.get("command") or ""
        too_long = len(header_json(specs, shorter)) - len(bare) - RESERVED_N_BYTES
        if too_long <= 0 or len(command) <= len(ELLIPSIS):
            shorter["metadata_sha256"] = self_hash(shorter)
            return shorter
        keep = max(0, len(command) - len(ELLIPSIS) - max(1, too_long // 6))
        source["command"] = command[:keep] + ELLIPSIS


def check(metadata: dict, path: str) -> Tuple[Architecture, Plan, List[TensorSpec]]:
    """Check format, version, self hash and form; return what the tensors must be.

    Raises:
        FormatError: another format or version, or damaged metadata.
    """
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{path} is no packed LM", found=repr(metadata.get("format"))[:80])
    version = metadata.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise FormatError(
            f"{path} has an unknown format version",
            found=repr(metadata.get("version"))[:80],
            expected=f"1 to {VERSION}",
            todo="upgrade espnet_mpq, or make the file again with `mpq pack`",
        )
    try:
        computed = self_hash(metadata)
    except ValueError as error:  # NaN, infinity, lone surrogates
        raise FormatError(f"{path}: the metadata is damaged", found=error, todo=AGAIN) from error
    if metadata.get("metadata_sha256") != computed:
        raise FormatError(
            f"{path}: the metadata was changed",
            found=f"SHA-256 {computed}",
            expected=str(metadata.get("metadata_sha256"))[:80],
            todo=AGAIN,
        )
    try:
        _check_form(metadata)
        architecture = families.from_dict(metadata["architecture"])
        plan = Plan.from_dict(metadata["plan"])
        specs = tensor_specs(architecture, plan)
        _need(plan.to_dict(provenance=False) == metadata["plan"], "plan")
        _need(version == version_of(plan), "version")
        _need(set(metadata["relative_error"]) == set(plan.clusters), "relative_error")
        _need(set(metadata["tensors"]) == {spec.name for spec in specs}, "tensors")
        _need(metadata["token_list"]["n_tokens"] == architecture.vocab_size, "token_list")
    except MpqError as error:
        raise FormatError(f"{path}: bad metadata", found=error) from error
    except TypeError as error:  # unhashable or incomparable values inside plan or architecture
        raise FormatError(f"{path}: bad metadata", found=error) from error
    return architecture, plan, specs


def _need(condition: bool, key: str) -> None:
    if not condition:
        raise FormatError(f"metadata key {key!r} is malformed")


def _check_form(metadata: dict) -> None:
    _need(set(metadata) == set(KEYS), "(top level)")
    for key in ("token_list", "special_ids", "source", "relative_error", "tensors"):
        _need(isinstance(metadata[key], dict), key)
    record = metadata["token_list"]
    _need(set(record) == {"n_tokens", "sha256"} and type(record["n_tokens"]) is int, "token_list")
    _need(_is_hash(record["sha256"]), "token_list")
    ids = metadata["special_ids"]
    _need(set(ids) == set(SPECIAL), "special_ids")
    for value in ids.values():
        in_range = type(value) is int and 0 <= value < record["n_tokens"]
        _need(value is None or in_range, "special_ids")
    for value in metadata["source"].values():
        _need(value is None or type(value) in (int, str), "source")
    for value in metadata["relative_error"].values():
        _need(isinstance(value, str) and _ERROR.fullmatch(value) is not None, "relative_error")
    _need(metadata["error_reference"] in ERROR_REFERENCES, "error_reference")
    for value in metadata["tensors"].values():
        _need(_is_hash(value), "tensors")


def _is_hash(value) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
