"""--rounding of several commands: its options, and the Rounder that they ask for."""

from __future__ import annotations

import argparse
import logging
from typing import Optional

from espnet_mpq.bin.material import open_text
from espnet_mpq.errors import InputError

LOG = logging.getLogger("espnet_mpq")
ROUNDINGS = ("nearest", "second_order")
ROUNDING_TOKENS = 24000


def add_rounding_arguments(parser: argparse.ArgumentParser, default: Optional[str]) -> None:
    """--rounding and --rounding_tokens; ``default`` None: the command decides."""
    add = parser.add_argument
    add(
        "--rounding",
        choices=ROUNDINGS,
        default=default,
        help="second_order: codes that change least what every matrix makes of its inputs on "
        "the text; nearest: the nearest levels" + (f" (default: {default})" if default else ""),
    )
    add(
        "--rounding_tokens",
        type=int,
        default=ROUNDING_TOKENS if default else None,
        help=f"tokens of the text that second_order looks at, 0 = all ({ROUNDING_TOKENS})",
    )


def check_rounding_tokens(n_tokens: Optional[int]) -> None:
    """Raise InputError for a number of tokens that is none."""
    if n_tokens is not None and n_tokens < 0:
        raise InputError("--rounding_tokens", found=n_tokens, expected="at least 0")


def make_rounder(exp, rounding: str, n_tokens: int, source, ngpu: int = 0):
    """A rounding.model.Rounder for the model of ``exp``; None where rounding is "nearest".

    source: text, its format, and the seed of the sample. The same arguments give the same
    sentences, so what is measured is what will be stored.
    """
    from espnet_mpq.hosts.espnet.lm.judged import judged_lm
    from espnet_mpq.planning.measure import KL_TOKENS
    from espnet_mpq.rounding.model import Rounder

    if rounding != "second_order":
        return None
    if exp.kind != "lm":
        raise InputError(
            "second_order rounding is there for LMs alone",
            found=f"{exp.config}, a recogniser",
            todo="use --rounding nearest",
        )
    path, text_format, seed = source
    # Another seed: as few of the sentences that a KL is measured on as can be.
    text = open_text(exp, path, text_format, n_tokens, seed + 1)
    exp.use_gpu(ngpu)
    LOG.info("rounding with %d tokens of %d sentences", text.n_tokens, len(text))
    return Rounder(judged_lm(exp, text, KL_TOKENS), exp.weights)

