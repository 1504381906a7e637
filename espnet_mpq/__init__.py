"""Low-bit language models for ESPnet: version and public names, nothing heavy."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "register"]


def register() -> None:
    """Make the plugin's classes known to the installed ESPnet; may be called any number of times.

    Raises:
        HostError: ESPnet is missing, too old or lacks something that the plugin needs.
    """
    from espnet_mpq.hosts.espnet.registry import register as register_in_host

    register_in_host()
