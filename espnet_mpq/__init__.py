"""Low-bit language models and recognisers for ESPnet: version and public names, nothing heavy."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "register"]


def register(*kinds: str, watch_recognisers: bool = False) -> None:
    """Make the plugin's classes known to the installed ESPnet; may be called any number of times.

    Args:
        kinds: "lm", "asr"; none: both.
        watch_recognisers: for programs that decode: from now on an LM must have the token list of
            a recogniser that was loaded before it.

    Raises:
        HostError: ESPnet is missing, too old or lacks something that the plugin needs.
    """
    from espnet_mpq.hosts.espnet import registry

    registry.register(*kinds)
    if watch_recognisers:
        registry.watch_recognisers()
