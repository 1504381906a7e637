"""The token lists of the recognisers of this process: an LM must have one of them."""

from __future__ import annotations

import argparse
import logging
from typing import List, Tuple

from espnet_mpq.errors import MismatchError
from espnet_mpq.hosts.espnet.families import OPTION, is_ours

LOG = logging.getLogger("espnet_mpq")
# Of a recogniser or translator; the second one is that of the source language.
LISTS = ("token_list", "src_token_list")
_known: List[Tuple[str, List[str]]] = []  # (configuration, tokens)


def remember_recogniser(args: argparse.Namespace, where: object) -> None:
    """Keep the token lists of a loaded model; ``where`` names its files in errors."""
    for name in LISTS:
        tokens = getattr(args, name, None)
        if isinstance(tokens, (list, tuple)):
            _known.append((str(where), list(tokens)))


def forget_recognisers() -> None:
    """As at the start of the process."""
    _known.clear()


def check_recogniser(args: argparse.Namespace, where: object) -> None:
    """Refuse an LM whose token list is that of no recogniser that was remembered.

    The host adds scores by token id: other tokens at the same ids give words without a sign.
    For an LM of the host itself with as many tokens that is a warning.

    Raises:
        MismatchError: says the first token that differs.
    """
    tokens = getattr(args, "token_list", None)
    if not _known or not isinstance(tokens, (list, tuple)):
        return
    tokens = list(tokens)
    if any(tokens == known for _, known in _known):
        return
    place, known = _known[0]
    first = next((i for i, (a, b) in enumerate(zip(tokens, known)) if a != b), None)
    found, expected = f"{len(tokens)} tokens in {where}", f"{len(known)} in {place}"
    if first is not None:
        found += f", token {first} is {tokens[first]!r}"
        expected += f", token {first} is {known[first]!r}"
    error = MismatchError(
        "the LM and the recogniser have different token lists",
        found=found,
        expected=expected,
        todo="decode with an LM that was trained on the token list of the recogniser",
    )
    if is_ours(getattr(args, OPTION, None)) or len(tokens) != len(known):
        raise error
    LOG.warning("%s", error)
