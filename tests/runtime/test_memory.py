"""Memory holds the codes once: in the kernel form, from which the tensors of the file come back."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from espnet_mpq.packed.format import PackedModel, save_packed, to_bytes
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.runtime.rnn_lm import PackedRnn

from packed_models import architecture, mixed, packed_model, uniform  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[1, 4, 10]])


def runtimes():
    for seed, tied in enumerate((False, True, False)):
        arch = architecture("lstm", 20, 12, 12 if tied else 17, 2, tied)
        packed = packed_model(arch, mixed(arch, seed), seed)
        runtime = PackedRnn(arch, packed.plan)
        runtime.load(packed)
        yield packed, runtime


def n_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16, 32))
@pytest.mark.parametrize("tied", (False, True))
def test_after_the_first_step_the_kernel_form_alone_has_the_codes(kernels, bits, tied):
    arch = architecture("lstm", 320, 160, 160, 2, tied)
    runtime = PackedRnn(arch, uniform(arch, ClusterSpec(bits)))
    runtime.load(packed_model(arch, runtime.plan))
    before = n_bytes(runtime.buffers())
    runtime.step(IDS[0])
    left = [b for name, b in runtime.named_buffers() if name.endswith((":codes", ":weight"))]
    assert left == [] and runtime._lstm.n_bytes > 0.8 * before
    # Scales of codes are float32 there beside the file's halves, biases are summed and padded.
    assert n_bytes(runtime.buffers()) + runtime._lstm.n_bytes < 1.25 * before + 20000


def test_the_tensors_of_the_file_come_back(kernels):
    for packed, runtime in runtimes():
        want, _ = runtime.logits(IDS)
        assert any(b is None for b in runtime._buffers.values())
        tensors = {name: runtime.tensor(name) for name in packed.tensors}
        assert to_bytes(PackedModel(packed.metadata, tensors)) == to_bytes(packed)
        state = runtime.state_dict()
        assert len(state) == len(packed.tensors)
        for name, tensor in packed.tensors.items():
            assert torch.equal(state[name.replace(".", ":")], tensor)
        for twin in (copy.deepcopy(runtime), pickle.loads(pickle.dumps(runtime))):
            assert n_bytes(twin.buffers()) == n_bytes(packed.tensors.values())
            assert torch.equal(twin.logits(IDS)[0], want)
        assert torch.equal(runtime.logits(IDS)[0], want)


def test_moves_casts_and_the_reference_after_the_kernels(kernels, monkeypatch):
    for packed, runtime in runtimes():
        fresh = PackedRnn(runtime.architecture, runtime.plan)
        fresh.load(packed)
        want, _ = runtime.logits(IDS)
        monkeypatch.setenv("MPQ_KERNEL", "reference")
        assert torch.equal(runtime.logits(IDS)[0], fresh.logits(IDS)[0])
        monkeypatch.delenv("MPQ_KERNEL")
        assert torch.equal(runtime.logits(IDS)[0], want)
        assert torch.equal(runtime.double().logits(IDS)[0], fresh.double().logits(IDS)[0])
        codes = [n for n, t in packed.tensors.items() if t.dtype == torch.uint8]
        assert all(torch.equal(runtime.tensor(n), packed.tensors[n]) for n in codes)
        # Halves became doubles by the cast, as before any kernel; back in float32 they still score.
        assert torch.allclose(runtime.float().logits(IDS)[0], want, atol=0.05)


RESIDENT = """
import gc, os, sys, torch
sys.path.insert(0, "tests")
from packed_models import architecture, packed_model, uniform
from espnet_mpq.runtime.rnn_lm import PackedRnn
from espnet_mpq.packed.format import save_packed
from espnet_mpq.packed.load import load_into
from espnet_mpq.plan import ClusterSpec

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def first_step(arch, plan, path):
    lm = PackedRnn(arch, plan)
    load_into(lm, path)
    assert not lm.kernel().startswith("reference")
    lm.step(torch.tensor([1]))
    return lm

bits, path = int(sys.argv[1]), sys.argv[2]
arch = architecture("lstm", 20, 8)
plan = uniform(arch, ClusterSpec(bits))
save_packed(path + ".small", packed_model(arch, plan))
first_step(arch, plan, path + ".small")
before = resident()
arch = architecture("lstm", 1000, 768, 768, 2)
lm = first_step(arch, uniform(arch, ClusterSpec(bits)), path)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_resident_memory_is_about_one_copy(kernels, kernel_library, tmp_path):
    bits = 2
    arch = architecture("lstm", 1000, 768, 768, 2)
    path = tmp_path / "packed.safetensors"
    n_file = save_packed(path, packed_model(arch, uniform(arch, ClusterSpec(bits))))
    environment = {**os.environ, "MPQ_KERNEL_LIBRARY": str(kernel_library)}
    command = [sys.executable, "-c", RESIDENT, str(bits), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert 0.7 * n_file < int(done.stdout) < 1.25 * n_file + 1e6
