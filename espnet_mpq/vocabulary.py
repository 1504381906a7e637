"""Vocabulary: the tokens of a model by id, their hash, and the ids that a host gives a meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Dict, Mapping, Optional, Tuple

from espnet_mpq.io import token_list_sha256

SPECIAL = ("blank", "unk", "sos", "eos")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id.

    Attributes:
        tokens: in the order of ids; may be empty, for a model without tokens.
        special_ids: ids of SPECIAL as the host defines them, None where it has none.
    """

    tokens: Tuple[str, ...]
    special_ids: Mapping[str, Optional[int]] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "tokens", tuple(self.tokens))
        ids = {name: self.special_ids.get(name) for name in SPECIAL}
        object.__setattr__(self, "special_ids", ids)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def sha256(self) -> str:
        """The identity of the token list: SHA-256 of its tokens joined by newlines (UTF-8)."""
        return token_list_sha256(self.tokens)

    def record(self) -> Dict[str, object]:
        """{n_tokens, sha256}, as packed files keep it."""
        return {"n_tokens": len(self.tokens), "sha256": self.sha256}
