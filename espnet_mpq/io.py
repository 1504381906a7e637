"""Files: atomic writes, JSON and SHA-256, with errors that name the file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Union

from espnet_mpq.errors import InputError, WriteError

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
        raise write_error(f"{path} ({len(data)} bytes)", error) from error


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


def write_json(path: Union[str, Path], value) -> None:
    """Write JSON atomically, indented, keys in the given order, newline at the end."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Union[str, Path]):
    """Read JSON.

    Raises:
        InputError: missing, unreadable or damaged file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"cannot read {path}", found=error.strerror) from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(
            f"{path} is not JSON",
            found=error,
            todo="remove it, then make it again with the command that wrote it",
        ) from error
