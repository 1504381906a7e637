"""What of a transcript is scored: tokens as the host's scoring makes and sclite reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, FrozenSet, List, Optional, Sequence, Union

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.io import read_lines

UNITS = ("word", "char")
_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
_TAIL = re.compile(r"(?<!\\);.*", re.DOTALL)  # sclite's place for notes on a word


@dataclass(frozen=True)
class Scoring:
    """How words become the tokens that are aligned; the defaults are those of the host.

    The host's scoring stage cleans the text, takes non-linguistic symbols out, splits it and
    calls NIST sclite without options. sclite then ignores the case of ASCII letters (and of no
    others), leaves "@" out (its word for nothing), and cuts a word at ";".

    Attributes:
        unit: "word", or "char" for characters with `<space>` between words.
        case_sensitive: as sclite -s.
        symbols: non-linguistic symbols, taken out of references and hypotheses.
        cleaner: applied to the text of a line first; None leaves it as it is.

    Raises:
        InputError: an unknown unit.
    """

    unit: str = "word"
    case_sensitive: bool = False
    symbols: FrozenSet[str] = frozenset()
    cleaner: Optional[Callable[[str], str]] = None

    def __post_init__(self):
        if self.unit not in UNITS:
            raise InputError(f"unknown unit {self.unit!r}", todo=near_matches(self.unit, UNITS))

    def tokens(self, words: Sequence[str]) -> List[str]:
        """The tokens of a line, given the words that white space separates."""
        line = " ".join(words)
        if self.cleaner is not None:
            line = self.cleaner(line)
        if self.unit == "char":
            found = self._characters(line)
        else:
            found = line.split()
            if self.symbols:
                found = [word for word in found if word not in self.symbols]
            if ";" not in line:  # the usual line, all its words at once
                if not self.case_sensitive:
                    found = " ".join(found).translate(_ASCII_LOWER).split(" ") if found else found
                return [token for token in found if token != "@"] if "@" in found else found
        return [self._as_compared(token) for token in found if token != "@"]

    def _characters(self, line: str) -> List[str]:
        """The characters with `<space>`; symbols are found in words, too, as the host does."""
        if self.symbols:
            longest_first = sorted(self.symbols, key=len, reverse=True)
            line = re.sub("|".join(map(re.escape, longest_first)), "", line)
        return ["<space>" if c == " " else c for c in line]

    def _as_compared(self, token: str) -> str:
        token = _TAIL.sub("", token) or ";"
        return token if self.case_sensitive else token.translate(_ASCII_LOWER)


AS_HOST = Scoring()


def read_symbols(path: Union[str, Path]) -> FrozenSet[str]:
    """Non-linguistic symbols, one a line, as the host's nlsyms_txt; raises InputError."""
    return frozenset(line.rstrip() for line in read_lines(path) if line.strip())
