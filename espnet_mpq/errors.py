"""The one family of errors: each message says what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
from typing import Iterable, Optional


class MpqError(Exception):
    """Base of all errors that a user can cause or mend.

    Not a RuntimeError: ESPnet catches RuntimeError while it loads a model and
    retries on a legacy path, which would hide our message.
    """

    def __init__(
        self,
        what: str,
        *,
        found: Optional[object] = None,
        expected: Optional[object] = None,
        todo: Optional[str] = None,
    ):
        parts = []
        if found is not None:
            parts.append(f"found {found}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if todo:
            parts.append(todo)
        super().__init__(what + (": " + "; ".join(parts) if parts else ""))


class PlanError(MpqError):
    """A plan that cannot be: unsupported bits, unknown or missing cluster."""


class InputError(MpqError):
    """A file, text or option that cannot be used as given."""


class FormatError(MpqError):
    """A packed file that is damaged or of an unknown version."""


class MismatchError(MpqError):
    """Two artefacts that do not belong together (token list, checkpoint, plan)."""


class HostError(MpqError):
    """ESPnet is missing or lacks something that the plugin needs."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'a' or 'b'?" for close spellings, else the known names."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {listed}"
