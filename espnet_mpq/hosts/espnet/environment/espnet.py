"""Is ESPnet there, and new enough? Guards all imports of the host."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from espnet_mpq.errors import HostError
from espnet_mpq.hosts.espnet.environment.installed import is_installed
from espnet_mpq.hosts.espnet.environment.nltk import offer_nltk_placeholders
from espnet_mpq.hosts.espnet.environment.torchaudio import guard_torchaudio

OLDEST_ESPNET = 202402
INSTALL_ESPNET = "install it: pip install espnet"


def prepare_host() -> None:
    """Guard the imports of the host; call it before any import of espnet2. Idempotent.

    Raises:
        HostError: ESPnet is missing or older than 202402.
    """
    check_host()
    offer_nltk_placeholders()
    guard_torchaudio()


def check_host() -> str:
    """Return the version of the installed ESPnet ("202511").

    Raises:
        HostError: it is missing or too old.
    """
    for name in ("espnet2", "espnet"):
        if not is_installed(name):
            raise HostError(
                "ESPnet is needed for this",
                found=f"no module {name} in {sys.prefix}",
                expected=f"ESPnet {OLDEST_ESPNET} or newer",
                todo=INSTALL_ESPNET,
            )
    version = str(getattr(importlib.import_module("espnet"), "__version__", "unknown"))
    digits = version.replace(".", "")[:6]
    if digits.isdigit() and int(digits) < OLDEST_ESPNET:
        raise HostError(
            "this ESPnet is too old",
            found=f"ESPnet {version}",
            expected=f"{OLDEST_ESPNET} or newer",
            todo='upgrade it: pip install --upgrade "espnet>=202402"',
        )
    return version
