"""Activations quantized and products scaled: equal on all paths, and what the reference gives."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espnet_mpq.errors import InputError
from espnet_mpq.kernels import reference
from espnet_mpq.kernels.matrix import KernelMatrix, quantize_rows
from espnet_mpq.packed.bits import pack_codes
from espnet_mpq.quant.grid import make_grid

WIDTHS = (1, 3, 7, 64, 650, 1031)


def same_quantization(x, kernels):
    want, want_scale = reference.quantize_rows(x)
    for path in kernels:
        q, scale = quantize_rows(x, path)
        assert torch.equal(q, want), path
        assert torch.equal(scale.view(torch.int32), want_scale.view(torch.int32)), path
    return want, want_scale


def test_known_values(kernels):
    # Halves go to the even neighbour: 254 makes the scale 2, so 1, 3, 5 are 0.5, 1.5, 2.5.
    x = torch.tensor([[254.0, 1, 3, 5, -1, -3, -5, 0], [0, 0, 0, 0, 0, 0, 0, -0.0]])
    q, scale = same_quantization(x, kernels)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 0], [0] * 8]
    assert scale.tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize("cols", WIDTHS)
def test_ties_and_tiny_and_huge_values(kernels, cols):
    generator = torch.Generator().manual_seed(cols)
    halves = torch.randint(-254, 255, (5, cols), generator=generator) / 2.0
    halves[:, 0] = 127
    normal = torch.randn(5, cols, generator=generator)
    rows = [halves, normal, normal * 1e-30, normal * 1e-38, normal * 1e-44, normal * 1e37]
    q, _ = same_quantization(torch.cat(rows), kernels)
    assert q[:10].abs().max() == 127 and q.min() >= -127


def test_what_is_not_finite_stays_visible(kernels):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1.0, nan, 2.0], [inf, 1, 2], [1.0, 2, 3], [-inf, nan, 0]])
    codes = torch.zeros(17, 1, dtype=torch.uint8)
    matrix = KernelMatrix(codes, torch.ones(1, 1), torch.tensor([-1, 1]), 1, 3)
    for path in kernels:
        y = matrix.linear(x, path=path)
        assert y[[0, 1, 3]].isnan().all() and torch.allclose(y[2], torch.tensor(-6.0), atol=0.05)
        q, scale = quantize_rows(x, path)
        want, want_scale = reference.quantize_rows(x)
        assert torch.equal(q, want)
        assert torch.equal(scale.isfinite(), want_scale.isfinite())


N_EXAMPLES = int(os.environ.get("MPQ_N_EXAMPLES", "80"))


@st.composite
def problems(draw):
    """(KernelMatrix, arguments of reference.add_linear, x, bias) of any kind and shape."""
    bits = draw(st.sampled_from((1, 2, 4, 8, 16, 32)))
    cols = draw(st.sampled_from(WIDTHS) | st.integers(1, 100))
    rows, batch = draw(st.integers(1, 140)), draw(st.integers(1, 125))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, cols, generator=generator)
    x[batch // 2] = 0
    bias = torch.randn(rows, generator=generator) if draw(st.booleans()) else None
    if bits >= 16:
        weight = torch.randn(rows, cols, generator=generator) * 10 ** draw(st.integers(-6, 1))
        weight = weight.to(torch.float16) if bits == 16 else weight
        return KernelMatrix(weight), (weight,), x, bias
    levels = make_grid(draw(st.sampled_from(("paper", "uniform"))), bits).levels_tensor()
    codes = torch.randint(0, len(levels), (rows, cols), dtype=torch.uint8, generator=generator)
    group_size = draw(st.none() | st.sampled_from((5, 16, 32, 64)) | st.integers(1, cols + 3))
    n_groups = 1 if group_size is None else -(-cols // group_size)
    scale_rows = draw(st.sampled_from((1, rows))) if n_groups == 1 else rows
    scales = torch.rand(scale_rows, n_groups, generator=generator)
    scales = scales.to(draw(st.sampled_from((torch.float16, torch.float32))))
    arguments = (pack_codes(codes, bits), scales, levels, bits, cols, group_size)
    return KernelMatrix(*arguments), arguments, x, bias


@settings(max_examples=N_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_linear_is_the_reference_on_every_path(kernels, data):
    matrix, arguments, x, bias = data.draw(problems())
    same_quantization(x, kernels)
    want = reference.add_linear(None, reference.activations(x), arguments)
    size = float(want.abs().max())
    want = want if bias is None else want + bias
    first, split = None, data.draw(st.integers(0, len(x)))
    for path in kernels:
        for n_threads in (1, 2, 3):
            y = matrix.linear(x, bias, path, n_threads)
            # The same operations in the same order; torch may fuse the last two. Float products
            # are sums in another order.
            tolerance = 1e-6 if matrix.n_groups else 1e-5
            assert torch.allclose(y, want, rtol=tolerance, atol=tolerance * (size + 1e-6))
            first = y if first is None else first
            assert torch.equal(y, first), (path, n_threads)
        parts = [matrix.linear(part, bias, path) for part in (x[:split], x[split:])]
        assert torch.equal(torch.cat(parts), first)


@settings(max_examples=N_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_what_was_stored_comes_back(kernels, problem):
    matrix, arguments, x, _ = problem
    stored = matrix.stored()
    assert torch.equal(stored, arguments[0]) and stored.dtype == arguments[0].dtype
    tokens = torch.arange(matrix.rows).flip(0)[:, None]
    want = arguments[0].float() if len(arguments) == 1 else reference.dequantize_linear(*arguments)
    assert torch.equal(matrix.embedding(tokens), want[tokens])


def test_every_half_is_converted_exactly(kernels):
    """All finite halves, subnormal ones and both zeros among them, times one."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()][:, None]
    matrix = KernelMatrix(halves)
    for path in kernels:
        assert torch.equal(matrix.linear(torch.ones(1, 1), path=path)[0], halves[:, 0].float())
    every = torch.arange(len(halves))
    assert torch.equal(matrix.embedding(every).view(torch.int32), halves.float().view(torch.int32))


@pytest.mark.parametrize("token", (-1, 4, 2**40))
def test_embedding_rows_that_do_not_exist_are_refused(kernels, token):
    for matrix in (KernelMatrix(torch.ones(4, 3)), KernelMatrix(torch.ones(4, 3).half())):
        with pytest.raises(InputError, match="outside the vocabulary"):
            matrix.embedding(torch.tensor([0, token]))


def test_kernel_matrices_refuse_copies_and_numbers_elsewhere():
    matrix = KernelMatrix(torch.randn(8, 5))
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(matrix)
    with pytest.raises(InputError, match="CPU"):
        matrix.embedding(torch.zeros(2, dtype=torch.int64, device="meta"))
