"""One writer at a time: a lock on an output folder or file, for commands and for recipes.

    python -m espnet_mpq.lock OUTPUT COMMAND ...

becomes COMMAND with the lock of OUTPUT, or says in one sentence who has it (status 1).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Dict, Iterator, Optional, Sequence, Union

from espnet_mpq.errors import BusyError, MpqError
from espnet_mpq.io import write_error

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

LOG = logging.getLogger("espnet_mpq")
INSIDE = "MPQ_LOCKED"  # paths that a parent process has locked for its children
_held: Dict[str, int] = {}  # lock file -> descriptor
_guard = threading.Lock()


def lock_file(output: Union[str, Path]) -> Path:
    """The file that is locked: beside the output, which may not be there yet."""
    output = Path(output).resolve()
    if output.is_dir() and not os.access(output.parent, os.W_OK):
        return output / ".mpq-lock"  # a disk of its own, for example
    return output.parent / f".{output.name}.mpq-lock"


@contextlib.contextmanager
def locked(output: Union[str, Path]) -> Iterator[None]:
    """Hold the lock of ``output``; within the same process, and its children, it may be held again.

    The lock is the kernel's (flock): it ends with the process, however that ends. Where the file
    system has no locks, a warning is all.

    Raises:
        BusyError: another process has it.
        WriteError: the folder of ``output`` cannot be written.
    """
    path = lock_file(output)
    key = str(path)
    with _guard:
        again = key in _held or key in os.environ.get(INSIDE, "").split(os.pathsep)
        descriptor = None if again else _acquire(path, output)
        if descriptor is not None:
            _held[key] = descriptor
    try:
        yield
    finally:
        if descriptor is not None:
            with _guard:
                del _held[key]
                _release(path, descriptor)


def _acquire(path: Path, output: Union[str, Path]) -> Optional[int]:
    """A descriptor with the lock; None where there are no locks."""
    if fcntl is None:
        return None
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise write_error(output, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise BusyError(
                f"another process is writing {output}",
                found=owner or "its lock",
                todo="wait until it has ended, or give another output",
            ) from error
        except OSError as error:  # some network file systems
            os.close(descriptor)
            LOG.warning("%s: no locks on this file system (%s)", path, error.strerror)
            return None
        # The holder before may have removed the file between our open and our lock.
        if _is_same(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        path.unlink()  # while the lock is held: the next one makes a new file
    os.close(descriptor)


def _forget_in_child() -> None:
    """A forked worker must not keep the lock of a parent that was killed."""
    for descriptor in _held.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    os.environ[INSIDE] = os.pathsep.join([*filter(None, [os.environ.get(INSIDE)]), *_held])
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Become a command that holds the lock; returns 1 where another process has it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) < 2 or argv[0].startswith("-"):
        print("usage: python -m espnet_mpq.lock OUTPUT COMMAND ...", file=sys.stderr)
        return 2
    output, command = argv[0], argv[1:]
    try:
        with locked(output):
            for descriptor in _held.values():
                os.set_inheritable(descriptor, True)  # the lock lives as long as the command
            inside = [*filter(None, [os.environ.get(INSIDE)]), *_held]
            os.environ[INSIDE] = os.pathsep.join(inside)
            os.execvp(command[0], command)
    except OSError as error:
        print(f"lock: error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    except MpqError as error:
        print(f"lock: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
