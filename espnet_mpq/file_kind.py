"""Says what a file is that is not what its name promises, and which command mends that."""

from __future__ import annotations

import os
import re
import shlex
import stat
from pathlib import Path
from typing import Optional, Tuple, Union

from espnet_mpq.errors import InputError

Verdict = Tuple[str, Optional[str]]  # (what it is, what to do)
HEAD_N_BYTES = 1024
_ANNEX = re.compile(r"(^|/)\.?git/annex/objects/|^/annex/objects/")
# First bytes -> (what it is, what to do).
_UNPACK = "unpack it and give the file inside"
_MAGIC = (
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\x93NUMPY", "a NumPy array", None),
    (b"\x89HDF\r\n", "an HDF5 file", None),
    (b"GGUF", "a GGUF file", None),
    (b"%PDF", "a PDF document", None),
    (b"\x7fELF", "a program or library", None),
)


def absence(path: Union[str, Path]) -> Optional[Verdict]:
    """What is at ``path`` if no file can be read there; None if one can, or nothing is there."""
    path = Path(path)
    found = broken_link(path)
    if found:
        return found
    if path.is_dir():
        return "a folder", None
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        return "no regular file (a pipe, socket or device)", None
    return None


def broken_link(path: Union[str, Path]) -> Optional[Verdict]:
    """What a link to nothing is; None for everything else."""
    path = Path(path)
    if not path.is_symlink() or path.exists():
        return None
    target = os.readlink(path)
    if _ANNEX.search(target):
        return "a git-annex link whose content is not here", f"git annex get {_quoted(path)}"
    return f"a link to {target}, which is not there", "copy the file itself, or mend the link"


def refuse_unfetched(path: Union[str, Path]) -> None:
    """Raise InputError for a broken link, or for what stands in place of a file not fetched.

    Says nothing of a missing file: its reader does.
    """
    found = broken_link(path)
    if found is None and Path(path).is_file():
        with open(path, "rb") as file:
            found = pointer(file.read(HEAD_N_BYTES), path)
    if found:
        raise InputError(f"cannot use {path}", found=found[0], todo=found[1])


def pointer(head: bytes, path: Union[str, Path]) -> Optional[Verdict]:
    """What stands in place of a large file that was not fetched; None for anything else.

    ``head``: the first HEAD_N_BYTES bytes of the file.
    """
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        todo = f"fetch it: git lfs pull --include {_quoted(Path(path).name)}"
        return "a Git LFS pointer, not the file itself", todo
    if _ANNEX.search(head[:200].decode("latin-1").strip()):
        return "a git-annex pointer, not the file itself", f"git annex get {_quoted(path)}"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page", "download the file itself: this is the page of a link or a login"
    if start.startswith(b"<?xml"):
        return "an XML text (a server's error message?)", "download the file again"
    return None


def kind(head: bytes, path: Union[str, Path], n_bytes: int) -> Optional[Verdict]:
    """What a file is by its first bytes; None if it is none of the kinds known here."""
    if n_bytes == 0:
        return "an empty file", "copy or download it again"
    found = pointer(head, path)
    if found:
        return found
    for magic, what, todo in _MAGIC:
        if head.startswith(magic):
            return what, todo
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= n_bytes - 8:
        todo = "give it a name that ends with .safetensors if `mpq pack` wrote it"
        return "a safetensors file", todo
    if not head.strip(b"\x00"):
        return "zero bytes (an interrupted copy?)", "copy or download it again"
    text = _text(head)
    return None if text is None else (f"a text file that begins with {text[:40]!r}", None)


def _text(head: bytes) -> Optional[str]:
    """The head as text, or None if it is none."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(head) < HEAD_N_BYTES or error.start < len(head) - 3:  # not a character cut in two
            return None
        text = head[: error.start].decode("utf-8-sig")
    is_text = all(c.isprintable() or c in "\t\r\n" for c in text)
    return text if is_text else None


def _quoted(path: Union[str, Path]) -> str:
    return shlex.quote(str(path))
