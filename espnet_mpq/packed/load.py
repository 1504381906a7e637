"""Fill a packed LM of a host from its file, after checking that they belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Sequence, Union

from espnet_mpq.errors import MismatchError
from espnet_mpq.io import token_list_sha256
from espnet_mpq.packed.architecture import Architecture
from espnet_mpq.packed.format import PackedModel, load_packed
from espnet_mpq.plan import Plan

AGAIN = "use the config.yaml and packed.safetensors of one `mpq pack` run"


def check_token_list(packed: PackedModel, token_list: Sequence[str], path: str) -> None:
    """Raise MismatchError unless the file was packed for this token list."""
    record = packed.metadata["token_list"]
    digest = token_list_sha256(token_list)
    if record["n_tokens"] != len(token_list) or record["sha256"] != digest:
        raise MismatchError(
            f"{path} was packed for another token list",
            found=f"{len(token_list)} tokens, SHA-256 {digest}",
            expected=f"{record['n_tokens']} tokens, SHA-256 {record['sha256']}",
            todo=AGAIN,
        )


def check_model(packed: PackedModel, architecture: Architecture, plan: Plan, path: str) -> None:
    """Raise MismatchError unless the file has this architecture and plan; names what differs."""
    found, expected = architecture.to_dict(), packed.architecture.to_dict()
    for key, value in expected.items():
        if found.get(key) != value:
            raise MismatchError(
                f"{path} does not fit lm_conf: {key}",
                found=f"{found.get(key)!r} in lm_conf",
                expected=f"{value!r} as in the file",
                todo=AGAIN,
            )
    if plan.scale_dtype != packed.plan.scale_dtype:
        raise MismatchError(
            f"{path} does not fit lm_conf: plan.scale_dtype",
            found=f"{plan.scale_dtype!r} in lm_conf",
            expected=f"{packed.plan.scale_dtype!r} as in the file",
            todo=AGAIN,
        )
    for name, spec in packed.plan.clusters.items():
        if plan.clusters.get(name) != spec:
            other = plan.clusters.get(name)
            raise MismatchError(
                f"{path} does not fit lm_conf: plan of cluster {name}",
                found=f"{other.to_dict() if other else None} in lm_conf",
                expected=f"{spec.to_dict()} as in the file",
                todo=AGAIN,
            )


def load_into(
    lm, path: Union[str, Path], token_list: Optional[Sequence[str]] = None
) -> PackedModel:
    """Read, verify and fill: the one way to give a packed LM its weights.

    Args:
        lm: an LM with ``architecture``, ``plan`` and ``load(PackedModel)`` (lm.rnn.PackedRnn or
            the host's class around it).
        token_list: the vocabulary of the host's config.yaml; None skips that check.

    Raises:
        InputError: the file cannot be read.
        FormatError: it is damaged.
        MismatchError: it belongs to another token list, architecture or plan, or ``lm`` is not a
            packed LM.
    """
    packed = load_packed(path)
    if not hasattr(lm, "architecture") or not hasattr(lm, "plan"):
        raise MismatchError(
            f"{path} is a packed LM but config.yaml describes another kind",
            found=type(lm).__name__,
            expected=f"lm: {packed.architecture.PACKED_LM}",
            todo=AGAIN,
        )
    if token_list is not None:
        check_token_list(packed, token_list, str(path))
    check_model(packed, lm.architecture, lm.plan, str(path))
    lm.load(packed)
    return packed
