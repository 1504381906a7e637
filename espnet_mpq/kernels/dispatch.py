"""Finds the kernel library and says which path runs: argument, MPQ_KERNEL, or the fastest here."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Dict, Optional, Tuple

import torch

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.kernels.build import LIBRARY

# In the library's numbering, slowest first. "reference" is torch with float activations.
PATHS = ("scalar", "avx2", "avx512", "avx512vbmi", "neon")
NUMBERS = {path: number for number, path in enumerate(PATHS)}
REFERENCE, AUTO = "reference", "auto"
ABI_VERSION = 4
FAILURES = {  # enum Status of api.h
    -1: "bad argument",
    -2: "this machine has not got the path",
    -3: "out of memory",
    -4: "a token outside the vocabulary",
}
_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "mpq_has_path": (_INT, [_INT]),
    "mpq_max_cols": (_INT64, []),
    "mpq_n_workers": (_INT, []),
    "mpq_trim": (None, []),
    "mpq_matrix_of_codes": (
        _POINTER,
        [_POINTER, _INT64, _INT64, _INT, _POINTER, _INT, _POINTER, _INT64, _INT64],
    ),
    "mpq_matrix_of_floats": (_POINTER, [_POINTER, _INT64, _INT64, _INT]),
    "mpq_matrix_free": (None, [_POINTER]),
    "mpq_matrix_n_bytes": (_INT64, [_POINTER]),
    "mpq_matrix_stored": (_INT, [_POINTER, _POINTER]),
    "mpq_matrix_rows": (_INT, [_POINTER, _POINTER, _INT64, _POINTER]),
    "mpq_product": (_INT, [_POINTER, _POINTER, _INT64, _POINTER, _INT, _INT]),
    "mpq_quantize": (_INT, [_POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT]),
    "mpq_linear": (_INT, [_POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT, _INT]),
    "mpq_lstm_lm_new": (_POINTER, [_INT, _INT64, _INT64, _INT64, _POINTER, _POINTER]),
    "mpq_lstm_lm_free": (None, [_POINTER]),
    "mpq_lstm_lm_run": (
        _INT,
        [_POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]
        + [_INT, _INT, _INT],
    ),
}
log = logging.getLogger(__name__)


def library() -> Optional[ctypes.CDLL]:
    """The kernel library, or None when it was not built ($MPQ_KERNEL_LIBRARY: another file)."""
    return _open(os.environ.get("MPQ_KERNEL_LIBRARY") or str(LIBRARY))[0]


def why_no_library() -> str:
    """What library() found instead of a library; empty when there is one."""
    return _open(os.environ.get("MPQ_KERNEL_LIBRARY") or str(LIBRARY))[1]


_opened: Dict[str, ctypes.CDLL] = {}


def _open(path: str) -> Tuple[Optional[ctypes.CDLL], str]:
    if path in _opened:  # failures are not kept: the library may be built meanwhile
        return _opened[path], ""
    build = "build it with a C++ compiler: python -m espnet_mpq.kernels.build"
    if not Path(path).is_file():
        return None, f"there is no kernel library {path}; {build}"
    try:
        opened = ctypes.CDLL(path)
        version = opened.mpq_abi_version()
        if version != ABI_VERSION:
            return None, f"{path} has interface {version}, wanted {ABI_VERSION}; {build}"
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(opened, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{path} is of no use ({error}); {build}"
    _opened[path] = opened
    return opened, ""


@lru_cache(maxsize=None)
def _paths(opened: ctypes.CDLL) -> Tuple[str, ...]:
    return tuple(name for i, name in enumerate(PATHS) if opened.mpq_has_path(i))


def available_paths() -> Tuple[str, ...]:
    """The paths this machine can run, slowest first; empty without a library."""
    opened = library()
    return _paths(opened) if opened is not None else ()


def choose(path: Optional[str] = None) -> str:
    """The path that runs: the argument, else $MPQ_KERNEL, else the fastest this machine has.

    Returns:
        One of PATHS, or "reference", which also stands in, and says so once, when there is no
        library and no path was asked for.

    Raises:
        InputError: an unknown path, or one that cannot run here.
    """
    asked = path or os.environ.get("MPQ_KERNEL") or AUTO
    if asked == REFERENCE:
        return REFERENCE
    here = available_paths()
    if asked in here:
        return asked
    if asked == AUTO:
        if here:
            return here[-1]
        _say_once(why_no_library())
        return REFERENCE
    known = (AUTO, *PATHS, REFERENCE)
    if asked not in known:
        raise InputError("unknown kernel", found=repr(asked), todo=near_matches(asked, known))
    raise InputError(
        "this machine cannot run the kernel asked for (MPQ_KERNEL)",
        found=repr(asked),
        expected=", ".join((*here, REFERENCE)),
        todo=why_no_library() or None,
    )


@lru_cache(maxsize=None)
def _say_once(why: str) -> None:
    log.warning("packed LMs run on the slow reference kernel: %s", why)


def needed_library() -> ctypes.CDLL:
    """The kernel library; raises InputError when there is none."""
    found = library()
    if found is None:
        raise InputError("no kernels", found=why_no_library())
    return found


def max_cols() -> int:
    """Columns of the widest matrix that the library takes; raises InputError without a library."""
    return needed_library().mpq_max_cols()


def trim() -> None:
    """Gives freed memory back to the system: codes of a file are freed between what stays."""
    needed_library().mpq_trim()


def path_number(path: Optional[str] = None) -> int:
    """The library's number of the path that choose() gives.

    Raises:
        InputError: as choose(), and when it gives the reference.
    """
    name = choose(path)
    if name == REFERENCE:
        raise InputError(
            "kernels called while the reference is forced (MPQ_KERNEL)",
            todo="use kernels/reference.py",
        )
    return NUMBERS[name]


def check(code: int, what: str) -> None:
    """Raises InputError when the library returned a failure."""
    if code:
        raise InputError(f"kernel: {what}", found=FAILURES.get(code, f"failure {code}"))


def check_cpu(tensor: torch.Tensor) -> None:
    """Raises InputError for a tensor elsewhere: its address would mean nothing to the library."""
    if not tensor.is_cpu:
        raise InputError("kernel: tokens", found=f"on {tensor.device}", expected="on the CPU")


def address(tensor: Optional[torch.Tensor]) -> Optional[int]:
    """Where a contiguous CPU tensor's data begin; None for None."""
    return None if tensor is None else tensor.data_ptr()
