"""Runs mpq in forked processes that are killed, or whose disk is full, at a chosen moment."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, Optional, Sequence

# What changes names or begins a file; the hook is called before it happens.
EVENTS = {
    *("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"),
    *("os.chmod", "shutil.copyfile", "shutil.rmtree", "shutil.move"),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LAST_LINE = "end of the drill: "


def is_long() -> bool:
    """Whether this is `make drills`."""
    return any(os.environ.get(f"MPQ_DRILL_{name}") for name in ("SECONDS", "N", "SEED"))


@dataclass(frozen=True)
class End:
    """When a process is stopped: one of these, or none.

    Attributes:
        event: kill -9 before this file event (1, 2, ...).
        seconds: kill -9 after this time.
        file_n_bytes: kill in the middle of a write, when a file would get longer than this.
        full_n_bytes: no kill: writing more into one file fails, as on a full disk.
    """

    event: Optional[int] = None
    seconds: Optional[float] = None
    file_n_bytes: Optional[int] = None
    full_n_bytes: Optional[int] = None


@dataclass(frozen=True)
class Done:
    """How a process ended: exit status (negative: the signal), output, file events, seconds."""

    status: int
    output: str
    n_events: int
    seconds: float

    @property
    def was_killed(self) -> bool:
        return self.status < 0

    def is_clear_error(self) -> bool:
        """One sentence, no traceback, and no guess."""
        errors = [line for line in self.output.splitlines() if "error:" in line]
        wrong = ("Traceback", "internal error", "inline_container", "terminate called")
        return self.status > 0 and len(errors) == 1 and not any(w in self.output for w in wrong)


def run(arguments: Sequence[str], folder: Path, end: End = End(), timeout_s: float = 300) -> Done:
    """`mpq ARGUMENTS` in ``folder``, in a fork of this process: the host is imported already."""
    reader, writer = os.pipe()
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(arguments, folder, end, writer)
    os.close(writer)
    output = bytearray()
    limit = timeout_s if end.seconds is None else end.seconds
    with open(reader, "rb", buffering=0) as pipe:
        while True:
            left = limit - (time.monotonic() - begin)
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                os.kill(pid, signal.SIGKILL)
                break
            piece = pipe.read(1 << 16)
            if not piece:
                break
            output += piece
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - begin
    assert seconds < timeout_s, f"mpq {' '.join(arguments)} hangs:\n{output.decode()}"
    text, _, last = output.decode("utf-8", "replace").partition(LAST_LINE)
    found = json.loads(last) if last else {"n_events": 0, "modules": []}
    for name in found["modules"]:  # the next fork need not import them
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return Done(status, text, found["n_events"], seconds)


def _child(arguments: Sequence[str], folder: Path, end: End, writer: int) -> None:
    """Body of the fork; never returns."""
    status = 70
    try:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        os.chdir(folder)
        n_events = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal n_events
            if event in EVENTS or (
                event == "open" and isinstance(args[2], int) and args[2] & WRITING
            ):
                n_events += 1
                if n_events == end.event:
                    os.kill(os.getpid(), signal.SIGKILL)

        most = end.file_n_bytes if end.full_n_bytes is None else end.full_n_bytes
        if most is not None:
            # the signal kills; Python ignores it and gets EFBIG
            kills = end.full_n_bytes is None
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        sys.argv = ["mpq", *arguments]
        from espnet_mpq.bin.mpq import main

        sys.addaudithook(hook)
        status = main(list(arguments))
        print(LAST_LINE + json.dumps({"n_events": n_events, "modules": list(sys.modules)}))
    except BaseException as error:  # as the interpreter would show it
        print(f"Traceback of the drill: {type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        os._exit(status)


def hashes(folder: Path, *patterns: str) -> Dict[str, str]:
    """Path below the folder -> SHA-256 of the files that match one of the patterns."""
    found = {p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(found)
    }


@contextlib.contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[bool]:
    """A file system of this size at ``folder``; False where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        is_mounted = False
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def enlarge(folder: Path, n_bytes: int) -> None:
    """Give a mounted small disk more room."""
    subprocess.run(["mount", "-o", f"remount,size={n_bytes}", str(folder)], check=True)
