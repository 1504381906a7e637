"""Activations quantized and products scaled: equal on all paths, and what the reference gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espnet_mpq.kernels import reference
from espnet_mpq.kernels.linear import KernelMatrix, quantize_rows
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


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_linear_is_the_reference_on_every_path(kernels, data):
    bits = data.draw(st.sampled_from((1, 2, 4, 8)))
    cols = data.draw(st.sampled_from(WIDTHS) | st.integers(1, 100))
    rows, batch = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 125))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    levels = make_grid(data.draw(st.sampled_from(("paper", "uniform"))), bits).levels_tensor()
    codes = torch.randint(0, len(levels), (rows, cols), dtype=torch.uint8, generator=generator)
    scales = torch.rand(data.draw(st.sampled_from((1, rows))), 1, generator=generator)
    scales = scales.to(data.draw(st.sampled_from((torch.float16, torch.float32))))
    x = torch.randn(batch, cols, generator=generator)
    x[batch // 2] = 0
    bias = torch.randn(rows, generator=generator) if data.draw(st.booleans()) else None
    packed = pack_codes(codes, bits)
    matrix = KernelMatrix(packed, scales, levels, bits, cols)
    q, q_scale = same_quantization(x, kernels)
    want = reference.packed_linear_int8(q, q_scale, packed, scales, levels, bits, cols)
    want = want if bias is None else want + bias
    first = None
    for path in kernels:
        y = matrix.linear(x, bias, path)
        # The same operations in the same order; torch may fuse the last two.
        assert torch.allclose(y, want, rtol=1e-6, atol=1e-6 * float(want.abs().max() + 1e-6))
        first = y if first is None else first
        assert torch.equal(y, first), path
        assert torch.equal(matrix.linear(x[-1:], bias, path), y[-1:])
