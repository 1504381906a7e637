"""The form of values in a sensitivity file; FormatError says what was found and expected."""

from __future__ import annotations

from typing import Callable, Iterable

from espnet_mpq.errors import FormatError

AGAIN = "make it again with `mpq sensitivity` or `mpq nas`"
LARGEST_NUMBER = 1e100


def need(is_right: bool, where: str, name: str, value: object, expected: str) -> None:
    """Raise FormatError, with the start of ``value``, unless ``is_right``."""
    if not is_right:
        raise FormatError(
            f"{where} has a malformed {name}",
            found=repr(value)[:80],
            expected=expected,
            todo=AGAIN,
        )


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> bool:
    """A number: no nan, no infinity, no boolean, nor one whose sums would overflow."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and abs(value) <= LARGEST_NUMBER


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    return is_integer(value) and value >= 0


def is_in(known: Iterable[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in known


def is_list(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))
