"""The packed runtime with float activations against torch's own modules; test_kernels.py: int8."""

from __future__ import annotations

import copy
import os
import pickle
from multiprocessing import context, reduction

import pytest
import torch

from espnet_mpq.errors import InputError, MismatchError, MpqError
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.runtime.rnn_lm import PackedRnn

from packed_models import FloatRnn, architecture, mixed, packed_model, uniform  # isort: skip

ARCHITECTURES = [
    architecture(rnn_type, 13, unit, nhid, nlayers, tied)
    for rnn_type in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for unit, nhid, nlayers, tied in [(7, 7, 1, True), (7, 9, 2, False), (5, 5, 3, True)]
]


@pytest.fixture(autouse=True)
def float_activations(monkeypatch):
    monkeypatch.setenv("MPQ_KERNEL", "reference")


def filled(arch, plan, seed=0):
    packed = packed_model(arch, plan, seed)
    runtime = PackedRnn(arch, plan)
    runtime.load(packed)
    return runtime, packed


def flat(state):
    return torch.cat(list(state)) if isinstance(state, tuple) else state


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("scale_dtype", ("float16", "float32"))
def test_equals_float_modules_with_dequantized_weights(arch, scale_dtype):
    runtime, packed = filled(arch, mixed(arch, arch.nlayers, scale_dtype))
    double = FloatRnn(arch, float_state(packed))
    ids = torch.randint(0, 13, (3, 8), generator=torch.Generator().manual_seed(0))
    logits, state = runtime.logits(ids)
    want, want_state = double(ids)
    assert logits.shape == (3, 8, 13) and logits.dtype == torch.float32
    assert torch.allclose(logits, want, atol=1e-5)
    assert torch.allclose(flat(state), flat(want_state), atol=1e-5)
    # One token at a time gives what the whole sequence gives.
    step_state = None
    for t in range(8):
        log_probs, step_state = runtime.step(ids[:, t], step_state)
        assert torch.allclose(log_probs, want[:, t].log_softmax(-1), atol=1e-5)
    assert torch.allclose(flat(step_state), flat(want_state), atol=1e-5)
    # From zero_state as from None.
    again, _ = runtime.logits(ids, runtime.zero_state(3))
    assert torch.allclose(again, want, atol=1e-5)


def test_casts_and_moves_never_touch_codes():
    arch = architecture(nhid=9)
    runtime, packed = filled(arch, mixed(arch, 2))
    ids = torch.tensor([[1, 4, 10]])
    want, _ = runtime.logits(ids)
    codes = {n: t for n, t in packed.tensors.items() if t.dtype == torch.uint8}
    assert codes
    for cast in (
        lambda m: m.to(torch.float64),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float64),
        lambda m: m.type(torch.float64),
        lambda m: m.to(dtype=torch.float32),
        lambda m: m.float(),
    ):
        cast(runtime)
        for name, code in codes.items():
            assert runtime.tensor(name).dtype == torch.uint8
            assert torch.equal(runtime.tensor(name), code)
        logits, state = runtime.logits(ids)
        assert logits.dtype == state[0].dtype == runtime.dtype
        assert torch.allclose(logits.float(), want, atol=1e-5)
        assert runtime.zero_state()[0].dtype == runtime.dtype
    runtime.to(torch.bfloat16)
    assert all(torch.equal(runtime.tensor(n), c) for n, c in codes.items())
    assert torch.allclose(runtime.logits(ids)[0].float(), want, atol=0.2)


def test_empty_runtime_refuses_to_score():
    arch = architecture()
    with pytest.raises(InputError, match="packed.safetensors"):
        PackedRnn(arch, uniform(arch, ClusterSpec(2))).step(torch.tensor([1]))


def test_state_dicts_are_refused_by_an_error_that_is_no_runtime_error():
    arch = architecture()
    runtime, packed = filled(arch, uniform(arch, ClusterSpec(2)))
    for strict in (True, False):
        for state in ({}, {"unrelated": torch.ones(1)}, float_state(packed), runtime.state_dict()):
            with pytest.raises(MismatchError, match="packed.safetensors") as info:
                runtime.load_state_dict(state, strict=strict)
            assert not isinstance(info.value, RuntimeError) and isinstance(info.value, MpqError)


def test_foreign_packed_model_is_refused():
    arch = architecture()
    runtime, _ = filled(arch, uniform(arch, ClusterSpec(2)))
    before = runtime.logits(torch.tensor([[1, 2]]))[0]
    with pytest.raises(MismatchError, match="output|embedding"):
        runtime.load(packed_model(arch, uniform(arch, ClusterSpec(4))))
    assert torch.equal(runtime.logits(torch.tensor([[1, 2]]))[0], before)


def test_loading_again_replaces_the_weights():
    arch = architecture()
    plan = uniform(arch, ClusterSpec(4))
    runtime, _ = filled(arch, plan)
    first = runtime.logits(torch.tensor([[1, 2]]))[0]
    runtime.load(packed_model(arch, plan, seed=5))
    second = runtime.logits(torch.tensor([[1, 2]]))[0]
    assert not torch.allclose(first, second)
    assert torch.equal(second, filled(arch, plan, seed=5)[0].logits(torch.tensor([[1, 2]]))[0])


def test_stays_in_eval_mode_without_parameters_or_gradients():
    arch = architecture()
    runtime, _ = filled(arch, uniform(arch, ClusterSpec(2)))
    assert not runtime.train().training and not any(m.training for m in runtime.modules())
    assert list(runtime.parameters()) == []
    assert not runtime.logits(torch.tensor([[1, 2]]))[0].requires_grad


def test_copies_and_random_numbers():
    arch = architecture()
    runtime, _ = filled(arch, uniform(arch, ClusterSpec(2)))
    state = torch.random.get_rng_state()
    want = runtime.logits(torch.tensor([[1, 2]]))[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    for twin in (copy.deepcopy(runtime), pickle.loads(pickle.dumps(runtime))):
        assert twin._dense is None
        assert torch.equal(twin.logits(torch.tensor([[1, 2]]))[0], want)


def test_resident_bytes_are_those_of_the_file():
    arch = architecture(unit=40, vocab_size=30)
    runtime, packed = filled(arch, uniform(arch, ClusterSpec(2)))
    resident = sum(t.numel() * t.element_size() for t in runtime.buffers())
    assert resident == sum(spec.n_bytes for spec in packed.specs)


def test_a_used_lm_can_be_given_to_a_spawned_process(kernels):
    """torch sends memory as file descriptors: all must be open still when the process starts."""
    arch = architecture(unit=40, vocab_size=30)
    runtime, _ = filled(arch, mixed(arch, 1))
    tokens = torch.tensor([[1, 2]])
    want = runtime.logits(tokens)[0]
    runtime.step(tokens[0], runtime.zero_state(2))
    assert runtime._held

    class Popen:
        fds = []
        DupFd = int

        def duplicate_for_child(self, fd):
            self.fds.append(fd)
            return fd

    popen = Popen()
    context.set_spawning_popen(popen)
    try:
        reduction.ForkingPickler.dumps(runtime)
    finally:
        context.set_spawning_popen(None)
    assert popen.fds and len(set(popen.fds)) == len(popen.fds)
    for fd in popen.fds:
        os.fstat(fd)
    assert runtime._held  # the original is as it was
    for twin in (copy.deepcopy(runtime), pickle.loads(pickle.dumps(runtime))):
        assert torch.equal(twin.logits(tokens)[0], want)
        assert torch.equal(twin.tensor("decoder.bias"), runtime.tensor("decoder.bias"))
