"""Fill a packed LM of a host from its file, after checking that they belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.errors import MismatchError
from espnet_mpq.packed.format import PackedModel, load_packed
from espnet_mpq.plan import Plan
from espnet_mpq.vocabulary import Vocabulary

AGAIN = "use the config.yaml and packed.safetensors of one `mpq pack` run"


def check_vocabulary(packed: PackedModel, vocabulary: Vocabulary, path: str) -> None:
    """Raise MismatchError unless the file was packed for this token list."""
    record = packed.metadata["token_list"]
    if record != vocabulary.record():
        raise MismatchError(
            f"{path} was packed for another token list",
            found=f"{len(vocabulary)} tokens, SHA-256 {vocabulary.sha256}",
            expected=f"{record['n_tokens']} tokens, SHA-256 {record['sha256']}",
            todo=AGAIN,
        )


def check_model(packed: PackedModel, architecture: Architecture, plan: Plan, path: str) -> None:
    """Raise MismatchError unless the file has this architecture and plan; names what differs."""
    difference = architecture.first_difference(packed.architecture)
    if difference is not None:
        key, found, expected = difference
        raise MismatchError(
            f"{path} does not fit config.yaml: {key}",
            found=f"{found} in config.yaml",
            expected=f"{expected} as in the file",
            todo=AGAIN,
        )
    if plan.scale_dtype != packed.plan.scale_dtype:
        raise MismatchError(
            f"{path} does not fit config.yaml: plan.scale_dtype",
            found=f"{plan.scale_dtype!r} in config.yaml",
            expected=f"{packed.plan.scale_dtype!r} as in the file",
            todo=AGAIN,
        )
    for name, spec in packed.plan.clusters.items():
        if plan.clusters.get(name) != spec:
            other = plan.clusters.get(name)
            raise MismatchError(
                f"{path} does not fit config.yaml: plan of cluster {name}",
                found=f"{other.to_dict() if other else None} in config.yaml",
                expected=f"{spec.to_dict()} as in the file",
                todo=AGAIN,
            )


def load_into(
    runtime, path: Union[str, Path], vocabulary: Optional[Vocabulary] = None
) -> PackedModel:
    """Read, verify and fill: the one way to give a packed model its weights.

    Args:
        runtime: has ``architecture``, ``plan`` and ``load(PackedModel)`` (runtime.PackedModule or
            the host's class around it).
        vocabulary: of the host's config.yaml; None skips that check.

    Raises:
        InputError: the file cannot be read.
        FormatError: it is damaged.
        MismatchError: it belongs to another token list, architecture or plan, or ``runtime`` is
            none.
    """
    packed = load_packed(path)
    if not hasattr(runtime, "load"):
        raise MismatchError(
            f"{path} is a packed LM but config.yaml describes another kind",
            found=type(runtime).__name__,
            expected=f"the runtime of a packed file: {packed.architecture.describe()}",
            todo=AGAIN,
        )
    if vocabulary is not None:
        check_vocabulary(packed, vocabulary, str(path))
    check_model(packed, runtime.architecture, runtime.plan, str(path))
    runtime.load(packed)
    return packed
