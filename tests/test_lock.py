"""One writer at a time: within a process, between processes, after a kill, in recipes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from espnet_mpq import lock
from espnet_mpq.errors import BusyError, WriteError
from espnet_mpq.lock import lock_file, locked

HOLD = """
import os, sys, time
from espnet_mpq.lock import locked
with locked(sys.argv[1]):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(output, how="alone"):
    words = [sys.executable, "-c", HOLD, str(output), how]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.fixture
def kill():
    started = []
    yield started.append
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_another_process_is_refused_until_the_first_is_killed(tmp_path, kill, how):
    output = tmp_path / "new" / "lm"
    process = holder(output, how)
    kill(process)
    with pytest.raises(BusyError) as caught:
        with locked(output):
            pass
    message = f"another process is writing {output}: found process {process.pid} on "
    assert str(caught.value).startswith(message) and "wait until it has ended" in str(caught.value)
    with locked(tmp_path / "new" / "other"):
        pass
    os.kill(process.pid, signal.SIGKILL)  # a worker that it forked may live on
    process.wait()
    with locked(output):
        assert lock_file(output).exists()
    assert list(output.parent.iterdir()) == []


def test_the_same_process_may_lock_again(tmp_path):
    with locked(tmp_path / "a"), locked(tmp_path / "." / "a"):
        with pytest.raises(ZeroDivisionError):
            with locked(tmp_path / "b"):
                raise ZeroDivisionError
        assert [path.name for path in tmp_path.iterdir()] == [".a.mpq-lock"]
    assert lock._held == {} and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write .*/file/lm"):
        with locked(tmp_path / "file" / "lm"):
            pass


def test_a_command_of_a_recipe_holds_the_lock_as_long_as_it_runs(tmp_path):
    def run(output, *command):
        words = [sys.executable, "-m", "espnet_mpq.lock", str(output), *command]
        return subprocess.run(words, capture_output=True, text=True)

    output = tmp_path / "exp"
    inner = f"{sys.executable} -m espnet_mpq.lock {output} echo inner"
    done = run(output, "sh", "-c", f"{inner}; exit 3")
    assert (done.returncode, done.stdout) == (3, "inner\n")
    with locked(output):
        done = run(output, "echo", "never")
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"lock: error: another process is writing {output}: found")
    assert run(output, "no-such-command").returncode == 127
    assert run("--help").returncode == 2
    start = time.monotonic()
    assert run(output, "true").returncode == 0 and time.monotonic() - start < 30
