"""Reads what torch.save wrote: checked whole, and without running what a pickle may hold."""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, Iterator, Optional, Union

from espnet_mpq.errors import CheckpointError
from espnet_mpq.file_kind import HEAD_N_BYTES, absence, kind

EXPECTED = "a file of weights that lm_train or asr_train saved (valid.loss.best.pth, 5epoch.pth)"
AGAIN = "copy or download it again"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6
PIECE_N_BYTES = 1 << 20
# What zipfile raises for broken archives: wrong sums, odd flags, offsets outside the file.
_BROKEN = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error)
# What only the state of an interrupted training holds beside the weights.
TRAINER_KEYS = {"model", "optimizers", "reporter"}
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)")  # torch 2, torch 1.13


def check_file(path: Union[str, Path]) -> None:
    """Raise CheckpointError unless ``path`` is a whole file of torch.save.

    Every record of its zip must have its checksum, so that one flipped bit is found; files from
    before torch 1.6 have no checksums, and only their beginning is looked at.
    """
    path = Path(path)
    found = absence(path)
    if found:
        raise _error(path, *found)
    try:
        with open(path, "rb") as file:
            _check(path, file)
    except OSError as error:
        raise _error(path, error.strerror or str(error)) from error


def read_file(path: Union[str, Path]) -> object:
    """What a file of torch.save holds: tensors (on the CPU), numbers, text, dicts and lists.

    Raises:
        CheckpointError: no such file, another kind of file, a damaged one, or one with Python
            objects, which would have to be run to be read.
    """
    import torch

    check_file(path)
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and EOF errors, by torch version
            raise _not_weights(Path(path), file, error) from error


def is_whole(path: Union[str, Path]) -> bool:
    """Whether ``path`` is a complete file of torch.save."""
    try:
        check_file(path)
    except CheckpointError:
        return False
    return True


def _check(path: Path, file: BinaryIO) -> None:
    head = file.read(HEAD_N_BYTES)
    n_bytes = file.seek(0, 2)
    if head.startswith(LEGACY):
        return
    if not head.startswith(b"PK"):
        raise _error(path, *_kind(path, head, n_bytes))
    try:
        with zipfile.ZipFile(file) as archive:
            _check_records(path, archive, n_bytes)
    except _BROKEN as error:
        raise _error(path, f"a truncated or damaged file ({error})", AGAIN) from error


def _check_records(path: Path, archive: zipfile.ZipFile, n_bytes: int) -> None:
    records = archive.infolist()
    names = [record.filename for record in records]
    if not any(name.endswith("/data.pkl") for name in names):
        listed = ", ".join(names[:4]) or "nothing"
        what = f"a zip archive of other things ({listed})"
        raise _error(path, what, "unpack it and give the checkpoint inside" if names else AGAIN)
    if any(name.endswith("/constants.pkl") for name in names):
        raise _error(path, "a TorchScript program", "save its state_dict() with torch.save")
    # torch.save never compresses: a small file that claims more would fill the memory.
    is_stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    n_claimed = sum(record.file_size for record in records)
    if not is_stored or n_claimed > n_bytes or len(set(names)) < len(names):
        raise _error(path, "a zip archive that torch.save did not write", AGAIN)
    for record in records:
        with archive.open(record) as content:
            while content.read(PIECE_N_BYTES):  # raises BadZipFile for a wrong checksum
                pass


def _kind(path: Path, head: bytes, n_bytes: int):
    found = kind(head, path, n_bytes)
    if found:
        return found
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle that torch.save did not write", "save the weights with torch.save"
    return f"bytes of another kind, which begin with {head[:8].hex(' ')}", None


def _not_weights(path: Path, file: BinaryIO, error: Exception) -> CheckpointError:
    """The error for a file that torch cannot read as weights."""
    if TRAINER_KEYS <= set(_words(file)):
        return trainer_error(path)
    refused = _REFUSED.search(str(error))
    if refused:
        name = refused.group(1) or refused.group(2)
        todo = "where you trust it, load it and save its state_dict() alone with torch.save"
        return _error(path, f"Python objects among the weights ({name})", todo)
    while error.__context__ is not None:  # torch wraps it in advice to load without a check
        error = error.__context__
    first = str(error).splitlines()[0] if str(error) else ""
    reason = "" if "weights_only" in first else f" ({type(error).__name__}: {first[:120]})"
    return _error(path, f"a damaged file{reason}", AGAIN)


def trainer_error(path: Union[str, Path]) -> CheckpointError:
    """The error for checkpoint.pth, the state of a training, in place of weights."""
    return _error(
        Path(path),
        "the state of a training (model, optimizers, reporter, ...), not weights alone",
        "give the weights beside it: valid.loss.best.pth or {n}epoch.pth",
    )


def _words(file: BinaryIO) -> Iterator[str]:
    """The texts inside the pickle of a torch file, read without running it."""
    try:
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            for _, argument, _ in pickletools.genops(archive.read(name)):
                if isinstance(argument, str):
                    yield argument
    except (zipfile.BadZipFile, StopIteration, ValueError, OSError):
        return


def _error(path: Path, found: str, todo: Optional[str] = None) -> CheckpointError:
    what = f"{path} cannot be read as a checkpoint"
    return CheckpointError(what, found=found, expected=EXPECTED, todo=todo)
