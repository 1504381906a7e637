"""The one family of errors: each message says what was found, what was expected, what to do."""

from __future__ import annotations

import copy
import difflib
from typing import Iterable, Optional

MOST_CHARACTERS = 4000  # of one part of a message


class MpqError(Exception):
    """Base of all errors that a user can cause or mend.

    Not a RuntimeError: ESPnet catches RuntimeError while it loads a model and
    retries on a legacy path, which would hide our message.

    Attributes:
        kind: a word that programs can act on; one for each class, never reworded.
        what, found, expected, todo: the parts of the message; all but ``what`` may be None.
        place: the file or folder that ``at`` named, or None.
    """

    kind = "error"

    def __init__(
        self,
        what: str,
        *,
        found: Optional[object] = None,
        expected: Optional[object] = None,
        todo: Optional[str] = None,
    ):
        self.what, self.found, self.expected, self.todo = what, found, expected, todo
        self.place: Optional[str] = None
        super().__init__(self._text())

    def _text(self) -> str:
        parts = []
        if self.found is not None:
            parts.append(f"found {_clipped(self.found)}")
        if self.expected is not None:
            parts.append(f"expected {_clipped(self.expected)}")
        if self.todo:
            parts.append(_clipped(self.todo))
        return _clipped(self.what) + (": " + "; ".join(parts) if parts else "")

    def at(self, place: object) -> "MpqError":
        """This error with its place in front; for ``raise error.at(path) from error``."""
        return self._changed(place=str(place), what=f"{place}: {self.what}")

    def advising(self, todo: str) -> "MpqError":
        """This error with another advice, where the caller knows more than who raised it."""
        return self._changed(todo=todo)

    def _changed(self, **parts: object) -> "MpqError":
        other = copy.copy(self)
        vars(other).update(parts)
        other.args = (other._text(),)
        return other


def _clipped(part: object) -> str:
    """A part as text, without its middle if a damaged file made it endless."""
    text = str(part)
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


class PlanError(MpqError):
    """A plan that cannot be: unsupported bits, unknown or missing cluster."""

    kind = "plan"


class InputError(MpqError):
    """A file, text or option that cannot be used as given."""

    kind = "input"


class WriteError(InputError):
    """A file cannot be written: no permission, or (``is_full``) no room."""

    kind = "write"
    is_full = False


class BusyError(InputError):
    """Another process is writing the same output."""

    kind = "busy"


class CheckpointError(InputError):
    """A file that is no checkpoint, or a damaged one."""

    kind = "checkpoint"


class FormatError(MpqError):
    """A file of ours that is damaged or of an unknown version."""

    kind = "format"


class MismatchError(MpqError):
    """Two artefacts that do not belong together (token list, checkpoint, plan)."""

    kind = "mismatch"


class HostError(MpqError):
    """ESPnet is missing or lacks something that the plugin needs."""

    kind = "host"


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'a' or 'b'?" for close spellings, else "known: a, b, ..." (12 names)."""
    known = [str(k) for k in known]
    # No name that is known is so long, and comparing takes time that grows with the square.
    name = str(name)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6) if len(name) < 200 else []
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {listed}"
