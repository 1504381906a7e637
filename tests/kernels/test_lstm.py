"""The fused LSTM: each layer against the int8 reference, equal on all paths and batch splits."""

from __future__ import annotations

import gc

import pytest
import torch

from espnet_mpq.errors import InputError
from espnet_mpq.kernels import reference
from espnet_mpq.packed.tensors import codes_name, scales_name, weight_name
from espnet_mpq.quant.grid import make_grid
from espnet_mpq.runtime.kernel_forms import make_lstm, make_matrix

from packed_models import architecture, mixed, packed_model  # isort: skip

# vocab_size, unit, nhid, nlayers, tied
SIZES = [(13, 7, 7, 1, True), (40, 7, 19, 2, False)]
SIZES += [(33, 130, 130, 3, True), (150, 16, 140, 2, False)]
# Against torch's own exp, tanh and sums, for values of magnitude 1; 40 times the float32 step.
TOLERANCE = 5e-6


def built(sizes, seed, **more):
    """``more``: tensors in place of the random ones, by name."""
    arch = architecture("lstm", *sizes)
    plan = mixed(arch, seed)
    packed = packed_model(arch, plan, seed)
    packed.tensors.update(more)
    tensor = packed.tensors.__getitem__

    def matrix(cluster, parts):
        return make_matrix(tensor, cluster, parts, plan.clusters[cluster.name])

    return arch, packed, make_lstm(arch, matrix, tensor)


def arguments(arch, packed) -> dict:
    """Every part as reference.add_linear takes it, by cluster."""

    def of(cluster, part, spec):
        if spec.bits >= 16:
            return (packed.tensors[weight_name(cluster, part)],)
        return (
            packed.tensors[codes_name(cluster, part)],
            packed.tensors[scales_name(cluster, part, spec)],
            make_grid(spec.grid, spec.bits).levels_tensor(),
            spec.bits,
            part.cols,
            spec.group_size,
        )

    return {
        cluster.name: [of(cluster, part, spec) for part in cluster.parts]
        for cluster in arch.clusters()
        for spec in [packed.plan.clusters[cluster.name]]
    }


def random_state(arch, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (arch.nlayers, batch, arch.nhid)
    h = torch.rand(shape, generator=generator) * 2 - 1
    h[:, 0] = 0  # a hypothesis at its start
    return h, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_step_is_the_reference_layer_by_layer(kernels, sizes, seed):
    """Each layer of the reference reads what the kernel wrote below it: a last-digit difference
    cannot turn a rounding, so the tolerance is that of the floats alone."""
    arch, packed, lstm = built(sizes, seed)
    parts, batch = arguments(arch, packed), 5
    tokens = torch.randint(0, arch.vocab_size, (batch, 1))
    h, c = random_state(arch, batch, seed)
    for path in kernels:
        logits, (new_h, new_c) = lstm.run(tokens, (h, c), False, path)
        x = reference.embedding_activations(tokens[:, 0], parts["embedding"][0])
        for layer in range(arch.nlayers):
            gates = [parts[f"rnn.l{layer}.{gate}"] for gate in "ifgo"]
            matrices = [gate[0] for gate in gates] + [gate[1] for gate in gates]
            bias = packed.tensors[f"rnn.bias_ih_l{layer}"] + packed.tensors[f"rnn.bias_hh_l{layer}"]
            biases = bias.split(arch.nhid)
            want_h, want_c = reference.lstm_cell(x, h[layer], c[layer], matrices, biases)
            assert torch.allclose(new_h[layer], want_h, rtol=TOLERANCE, atol=TOLERANCE)
            assert torch.allclose(new_c[layer], want_c, rtol=TOLERANCE, atol=TOLERANCE)
            x = reference.activations(new_h[layer])
        output = parts.get("output", parts["embedding"])[0]
        want = reference.add_linear(None, x, output) + packed.tensors["decoder.bias"]
        assert torch.allclose(logits[:, 0], want, rtol=TOLERANCE, atol=TOLERANCE)
        log_probs, _ = lstm.run(tokens, (h, c), True, path)
        want = logits.log_softmax(-1)
        assert torch.allclose(log_probs, want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("batch", (1, 2, 13, 61, 131))
def test_paths_splits_and_steps_give_the_same_floats(kernels, sizes, batch):
    arch, _, lstm = built(sizes, batch)
    tokens, state = torch.randint(0, arch.vocab_size, (batch, 3)), random_state(arch, batch)
    want, (want_h, want_c) = lstm.run(tokens, state, True, "scalar")
    assert want.shape == (batch, 3, arch.vocab_size)
    assert torch.allclose(want.exp().sum(-1), torch.ones(batch, 3), atol=1e-5)
    for path in kernels:
        got, (h, c) = lstm.run(tokens, state, True, path)
        assert torch.equal(got, want) and torch.equal(h, want_h) and torch.equal(c, want_c)
        # Token by token, and the two halves of the batch apart.
        half, out = batch // 2, []
        for rows in (slice(0, half), slice(half, batch)):
            piece, steps = tuple(x[:, rows] for x in state), []
            for t in range(3):
                one, piece = lstm.run(tokens[rows, t : t + 1], piece, True, path)
                steps.append(one)
            out.append((torch.cat(steps, 1), *piece))
        assert torch.equal(torch.cat([o[0] for o in out]), want)
        assert torch.equal(torch.cat([o[1] for o in out], 1), want_h)
        assert torch.equal(torch.cat([o[2] for o in out], 1), want_c)


def test_no_state_is_zeros_and_inputs_are_left_alone(kernels):
    arch, packed, lstm = built(SIZES[1], 3)
    tokens = torch.tensor([[1, 5], [2, 30]])
    zeros = torch.zeros(2, 2, 19)
    for path in kernels:
        a, (h, c) = lstm.run(tokens, None, False, path)
        b, (h_2, c_2) = lstm.run(tokens, (zeros, zeros), False, path)
        assert torch.equal(a, b) and torch.equal(h, h_2) and torch.equal(c, c_2)
        assert not zeros.any()
        state = (h.clone(), c.clone())
        lstm.run(tokens, (h, c), False, path)
        assert torch.equal(h, state[0]) and torch.equal(c, state[1])


def test_gates_at_every_combination_of_extremes(kernels):
    """Units whose gates i, f, g, o are off, nearly off, in between or on; tanh's too."""
    extremes = torch.tensor([-1e4, -45.0, 0.0, 45.0, 90.0])
    bias = torch.cartesian_prod(*[extremes] * 4).t()
    more = {"rnn.bias_ih_l0": bias.flatten(), "rnn.bias_hh_l0": torch.zeros(bias.numel())}
    arch, packed, lstm = built((3, 4, bias.shape[1], 1), 0, **more)
    parts, (h, c) = arguments(arch, packed), random_state(arch, 2)
    tokens = torch.tensor([[0], [2]])
    gates = [parts[f"rnn.l0.{gate}"] for gate in "ifgo"]
    matrices = [gate[0] for gate in gates] + [gate[1] for gate in gates]
    x = reference.embedding_activations(tokens[:, 0], parts["embedding"][0])
    want = reference.lstm_cell(x, h[0], c[0], matrices, list(bias))
    for path in kernels:
        _, got = lstm.run(tokens, (h, c), False, path)
        for mine, theirs in zip(got, want):
            assert torch.allclose(mine[0], theirs, rtol=0, atol=TOLERANCE), path


def test_saturated_gates_and_huge_cells(kernels):
    arch, packed, lstm = built(SIZES[1], 3)
    h, c = random_state(arch, 3)
    for path in kernels:
        out, (new_h, new_c) = lstm.run(torch.zeros(3, 1).long(), (h, c * 1e4), True, path)
        assert out.isfinite().all() and new_h.abs().max() <= 1 and new_c.isfinite().all()
        out, _ = lstm.run(torch.zeros(3, 1).long(), (h, c * float("nan")), True, path)
        assert out.isnan().all()


def test_wrong_calls_are_refused(kernels):
    arch, packed, lstm = built(SIZES[1], 3)
    state = random_state(arch, 2)
    for token in (-1, 40, 2**40):
        with pytest.raises(InputError, match="outside the vocabulary"):
            lstm.run(torch.tensor([[0], [token]]), state, True, "scalar")
    with pytest.raises(InputError, match=r"expected torch.float32 \(2, 3, 19\)"):
        lstm.run(torch.zeros(3, 1).long(), state, True, "scalar")
    with pytest.raises(InputError, match="torch.float64"):
        lstm.run(torch.zeros(2, 1).long(), tuple(x.double() for x in state), True, "scalar")


def test_the_library_reads_nothing_that_was_freed(kernels):
    """Tensors and matrices that only the LSTM holds stay alive with it."""
    arch, packed, lstm = built(SIZES[3], 1)
    tokens = torch.randint(0, 150, (4, 2))
    want, _ = lstm.run(tokens, None, True, kernels[-1])
    del packed
    gc.collect()
    noise = [torch.full((150, 140), 255, dtype=torch.uint8) for _ in range(50)]
    assert torch.equal(lstm.run(tokens, None, True, kernels[-1])[0], want) and noise
