"""The host's text cleaners, which its scoring stage applies to references and hypotheses."""

from __future__ import annotations

from typing import Callable

from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet.registry import register


def make_cleaner(name: str) -> Callable[[str], str]:
    """The cleaner of the host's option --cleaner (tacotron, jaconv, ...).

    Raises:
        InputError: the host has none of this name, or it lacks a package.
        HostError: no suitable ESPnet.
    """
    register()
    from espnet2.text.cleaner import TextCleaner

    cleaner = TextCleaner(name)
    try:
        cleaner("a")  # names are looked up at the first text
    except Exception as error:  # whatever the host or the cleaner's package say
        raise InputError(
            f"no text cleaner {name!r}",
            found=f"{type(error).__name__}: {error}",
            expected="a cleaner of the host: tacotron, jaconv, vietnamese, korean_cleaner, ...",
        ) from error
    return cleaner
