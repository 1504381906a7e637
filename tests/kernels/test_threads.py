"""Threads: the same bits for every number, never more than asked for, idle ones asleep, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from espnet_mpq.kernels import dispatch
from espnet_mpq.kernels.matrix import KernelMatrix
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.runtime.rnn_lm import PackedRnn

from packed_models import architecture, mixed, packed_model, uniform  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not TASKS.is_dir(), reason="no /proc")


def large_matrix(spec_bits=2, group_size=None) -> KernelMatrix:
    """700 x 1000: at batch 60, 42 million multiply-adds, work for many threads."""
    generator = torch.Generator().manual_seed(spec_bits)
    if spec_bits >= 16:
        return KernelMatrix(torch.randn(700, 1000, generator=generator).to(torch.float16))
    codes = torch.randint(0, 256, (700, 1000 * spec_bits // 8), generator=generator)
    scales = torch.rand(700, 1 if group_size is None else -(-1000 // group_size))
    levels = torch.arange(-(2 ** (spec_bits - 1)), 2 ** (spec_bits - 1))
    return KernelMatrix(codes.to(torch.uint8), scales, levels, spec_bits, 1000, group_size)


def workers() -> list:
    """The library's threads of this process."""
    found = []
    for task in TASKS.iterdir():
        try:
            found += [task] * ((task / "comm").read_text().strip() == "mpq-worker")
        except OSError:  # it has just ended
            pass
    return found


def there_are(n_workers: int) -> bool:
    """A thread that was joined stays in /proc for a moment."""
    until = time.monotonic() + 2
    while len(workers()) != n_workers and time.monotonic() < until:
        time.sleep(0.001)
    return len(workers()) == n_workers == dispatch.library().mpq_n_workers()


@pytest.fixture(autouse=True)
def setting():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    if dispatch.library() is not None:
        large_matrix().linear(torch.zeros(1, 1000), n_threads=1)


@pytest.mark.parametrize("bits, group_size", [(1, None), (4, 100), (8, None), (16, None)])
def test_products_are_the_same_for_every_number_of_threads(kernels, bits, group_size):
    matrix = large_matrix(bits, group_size)
    x = torch.randn(130, 1000, generator=torch.Generator().manual_seed(1))
    q = torch.randint(-127, 128, (130, 1000)).to(torch.int8)
    for batch in (1, 20, 130):
        want = matrix.linear(x[:batch], n_threads=1)
        for path in kernels[-2:]:
            for n_threads in (2, 3, 8):
                assert torch.equal(matrix.linear(x[:batch], None, path, n_threads), want)
                if bits < 16:
                    got = matrix.product(q[:batch], path, n_threads)
                    assert torch.equal(got, matrix.product(q[:batch], path, 1))


@pytest.mark.parametrize("sizes", [(23, 9, 12, 2), (700, 100, 260, 2)], ids=("small", "large"))
@pytest.mark.parametrize("seed", (0, 1))
def test_lstm_is_the_same_for_every_number_of_threads(kernels, sizes, seed):
    arch = architecture("lstm", *sizes)
    runtime = PackedRnn(arch, mixed(arch, seed))
    runtime.load(packed_model(arch, runtime.plan, seed))
    tokens = torch.randint(0, sizes[0], (61, 3), generator=torch.Generator().manual_seed(seed))
    torch.set_num_threads(1)
    want, (want_h, want_c) = runtime.logits(tokens)
    log_probs, _ = runtime.step(tokens[:, 0])
    for n_threads in (2, 3):
        torch.set_num_threads(n_threads)
        got, (h, c) = runtime.logits(tokens)
        assert torch.equal(got, want) and torch.equal(h, want_h) and torch.equal(c, want_c)
        assert torch.equal(runtime.step(tokens[:, 0])[0], log_probs)
    assert dispatch.library().mpq_n_workers() == (2 if sizes[0] == 700 else 0)


@needs_proc
def test_threads_follow_the_setting(kernels):
    matrix, x = large_matrix(), torch.randn(60, 1000)
    for n_threads in (1, 4, 2, 3, 1, 2):
        torch.set_num_threads(n_threads)
        for _ in range(3):
            matrix.linear(x)
            assert there_are(n_threads - 1)
    # Little work needs no thread; a low setting ends those that are there.
    torch.set_num_threads(3)
    matrix.linear(x[:1])
    assert there_are(1)
    torch.set_num_threads(1)
    matrix.linear(x[:1])
    assert there_are(0)


@needs_proc
def test_idle_threads_sleep(kernels):
    large_matrix().linear(torch.randn(60, 1000), n_threads=3)
    time.sleep(0.05)

    def run_ns() -> list:
        return [int((task / "schedstat").read_text().split()[0]) for task in workers()]

    before = run_ns()
    time.sleep(0.2)
    assert len(before) == 2 and all(b - a < 1e6 for a, b in zip(before, run_ns()))


def test_several_python_threads_at_once(kernels):
    """Their calls overlap: ctypes lets go of the interpreter's lock."""
    matrix, x = large_matrix(), torch.randn(60, 1000)
    arch = architecture("lstm", 300, 100, 160, 2)
    runtime = PackedRnn(arch, uniform(arch, ClusterSpec(2)))
    runtime.load(packed_model(arch, runtime.plan))
    other = PackedRnn(arch, runtime.plan)
    other.load(packed_model(arch, runtime.plan))
    tokens = torch.arange(60)
    want, (want_log_probs, _) = matrix.linear(x, n_threads=1), other.step(tokens)
    wrong, start = [], threading.Barrier(4)

    def work(n_threads):
        torch.set_num_threads(n_threads)
        start.wait()
        for _ in range(30):
            # The first step makes the kernel form: all threads find the runtime without.
            if not torch.equal(runtime.step(tokens)[0], want_log_probs):
                wrong.append("step")
            if not torch.equal(matrix.linear(x, n_threads=n_threads), want):
                wrong.append("linear")

    threads = [threading.Thread(target=work, args=(n,)) for n in (3, 2, 3, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_makes_its_own_threads(kernels):
    matrix, x = large_matrix(), torch.randn(60, 1000)
    want = matrix.linear(x, n_threads=3)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            before = dispatch.library().mpq_n_workers()
            right = torch.equal(matrix.linear(x, n_threads=3), want)
            os._exit(0 if right and before == 0 and dispatch.library().mpq_n_workers() == 2 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(matrix.linear(x, n_threads=3), want)


def test_the_interpreter_ends_while_threads_compute(kernels, kernel_library):
    """With no torch in the threads: its own calls may abort when their interpreter is gone."""
    script = (
        "import sys, threading, torch\n"
        f"sys.path.insert(0, {str(ROOT / 'tests' / 'kernels')!r})\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from test_threads import large_matrix\n"
        "matrix, x, y = large_matrix(), torch.randn(60, 1000), torch.empty(60, 700)\n"
        "arguments = (matrix.handle, x.data_ptr(), 60, None, y.data_ptr(), 0, 3)\n"
        "def work():\n"
        "    while True:\n"
        "        matrix.library.mpq_linear(*arguments)\n"
        "for _ in range(2):\n"
        "    threading.Thread(target=work, daemon=True).start()\n"
        "matrix.linear(x, n_threads=3)\n"
        "print('end')\n"
    )
    environment = {**os.environ, "MPQ_KERNEL_LIBRARY": str(kernel_library)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
