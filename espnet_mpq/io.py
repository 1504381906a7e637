"""Files: atomic writes, lines of text, JSON and SHA-256, with errors that name the file."""

from __future__ import annotations

import codecs
import errno
import gzip
import hashlib
import json
import lzma
import math
import os
import tempfile
import zlib
from pathlib import Path
from typing import BinaryIO, Iterator, List, Union

from espnet_mpq import strict_json
from espnet_mpq.errors import InputError, WriteError
from espnet_mpq.file_kind import refuse_unfetched

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk


def atomic_write(path: Union[str, Path], content: Union[bytes, str]) -> None:
    """Write a whole file or nothing: temporary file in the same folder, then rename.

    Raises:
        WriteError: the folder cannot be written or the disk is full; an older
            file at ``path`` is untouched and no temporary file stays behind.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; artefacts get the permissions of the user's umask.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        made = write_error(f"{path} ({len(data)} bytes)", error)
        if made.is_full:  # other files of the same command may be there already
            todo = "free disk space or choose another folder; this file is as it was"
            made = made.advising(todo)
        raise made from error


def write_error(what: object, error: OSError, unchanged: bool = True) -> WriteError:
    """The error for a failed write of ``what``; disk space is advised for a full disk only.

    ``unchanged``: whether everything is as it was before.
    """
    todo = None
    if is_full := error.errno in FULL:
        after = "nothing was changed" if unchanged else "then run the command again"
        todo = f"free disk space or choose another folder; {after}"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        todo = "choose another folder"
    made = WriteError(f"cannot write {what}", found=error.strerror or str(error), todo=todo)
    made.is_full = is_full
    return made


_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"


def read_lines(path: Union[str, Path]) -> List[str]:
    """All `stream_lines` of a file: line n is item n - 1."""
    return list(stream_lines(path))


def stream_lines(path: Union[str, Path]) -> Iterator[str]:
    """The lines of a UTF-8 text file, gzip and xz too, without their ends, one at a time.

    A line ends where a file opened as text ends it (so hosts written in Python see the same
    lines): at LF, CR LF, or CR in a file that has no LF. Other separators of Unicode (vertical
    tab, form feed, U+0085, U+2028 ...) are white space within a line, for `str.split` as for the
    host. A byte order mark at the start of a line, as concatenated files have it, is dropped.

    Raises:
        InputError: unreadable or damaged file; not UTF-8, a NUL byte, or a CR inside a line of a
            file with LF (a reader that ends the line there would cut it), with its line.
    """
    path = Path(path)
    refuse_unfetched(path)
    try:
        with _open_unpacked(path) as file:
            for number, line in enumerate(file, 1):
                content = _decoded(line, number, path)
                if "\r" not in content:
                    lines = [content[:-1] if content.endswith("\n") else content]
                elif number == 1 and not content.endswith("\n"):  # no LF in the whole file
                    lines = content.removesuffix("\r").split("\r")
                else:
                    lines = [content.rstrip("\r\n")]
                    if "\r" in lines[0]:
                        raise _inner_cr(path, number)
                for one in lines:
                    yield one[1:] if one.startswith("\ufeff") else one
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        found = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the text {path}", found=found) from error


def _open_unpacked(path: Path) -> BinaryIO:
    """A file opened for reading bytes; what is packed is unpacked, by its name or first bytes."""
    with open(path, "rb") as file:
        head = file.read(len(_XZ))
    if path.suffix == ".gz" or head.startswith(_GZIP):
        return gzip.open(path)
    if path.suffix == ".xz" or head == _XZ:
        return lzma.open(path)
    return open(path, "rb")


def _decoded(line: bytes, number: int, path: Path) -> str:
    try:
        content = line.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = number == 1 and line.startswith(_UTF16)
        raise InputError(
            f"{path} is not UTF-8 text",
            found=f"byte 0x{line[error.start]:02x} in line {number}"
            + (" (it begins like UTF-16)" if utf16 else ""),
            todo="convert it: iconv -f ENCODING -t UTF-8",
        ) from error
    if "\0" in content:
        raise InputError(
            f"{path} is not UTF-8 text",
            found=f"byte 0x00 in line {number}",
            todo="if it is UTF-16, convert it: iconv -f UTF-16 -t UTF-8",
        )
    return content


def _inner_cr(path: Path, number: int) -> InputError:
    return InputError(
        f"{path}, line {number}",
        found="a carriage return inside the line, where the host would cut it",
        expected="lines that end in LF or CR LF",
        todo="make it a blank or a line end: tr '\\r' ' ' or tr '\\r' '\\n'",
    )


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Union[str, Path]) -> str:
    """SHA-256 of a file as 64 hexadecimal digits (read in 1 MiB pieces)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def token_list_sha256(token_list) -> str:
    """The identity of a vocabulary: SHA-256 of its tokens joined by newlines (UTF-8)."""
    return sha256_bytes("\n".join(token_list).encode("utf-8"))


def to_json(value) -> str:
    """JSON, indented, keys in the given order; nan and infinity, which JSON has not, are null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _no_constant(name: str):
    raise ValueError(f"{name}, which is no JSON")


def write_json(path: Union[str, Path], value) -> None:
    """Write `to_json` of a value atomically, with a newline at the end."""
    atomic_write(path, to_json(value) + "\n")


def read_json(path: Union[str, Path]):
    """Read JSON, as strict_json reads it.

    Raises:
        InputError: missing, unreadable or damaged file.
    """
    refuse_unfetched(path)
    try:
        with open(path, "rb") as file:
            return strict_json.parse(file.read(strict_json.MOST_N_BYTES + 1))
    except OSError as error:
        raise InputError(f"cannot read {path}", found=error.strerror) from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(
            f"{path} is not JSON",
            found=error,
            todo="remove it, then make it again with the command that wrote it",
        ) from error
