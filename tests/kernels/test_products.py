"""Integer products: equal to int64 arithmetic on every path, shape, alignment and batch split."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espnet_mpq.errors import InputError
from espnet_mpq.kernels.matrix import KernelMatrix
from espnet_mpq.kernels.reference import packed_product_int8
from espnet_mpq.packed.bits import pack_codes
from espnet_mpq.quant.grid import make_grid

WIDTHS = (1, 3, 7, 64, 650, 1031)
N_EXAMPLES = int(os.environ.get("MPQ_N_EXAMPLES", "150"))
GRIDS = [make_grid(name, bits).levels for bits in (1, 2, 4, 8) for name in ("paper", "uniform")]
# Any 16 levels: the extremes, neighbours, one sign only.
GRIDS += [(-128, 127), (-128, 0, 1, 127), (100, 127), tuple(range(-128, 128, 17))]
# Ranges around 128, where pairs of products begin to leave int16.
GRIDS += [(-64, 64), (-64, 65), (-72, 68)]
GRIDS += [(-128, -127, -3, -1, 0, 1, 5, 8, 13, 21, 34, 55, 89, 100, 126, 127)]


def bits_of(levels) -> int:
    return next(bits for bits in (1, 2, 4, 8) if len(levels) <= 2**bits)


def matrix(codes, levels, scales=None):
    """The kernels' matrix of uint8 codes (rows, cols), and the reference's arguments for it."""
    bits, levels = bits_of(levels), torch.tensor(levels, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    scales = torch.ones(1, 1) if scales is None else scales
    return KernelMatrix(packed, scales, levels, bits, codes.shape[1]), (
        packed,
        levels,
        bits,
        codes.shape[1],
    )


def unaligned(x: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values at an address ``offset`` bytes behind an aligned one."""
    memory = torch.empty(x.numel() + 64 + offset, dtype=torch.int8)
    first = -memory.data_ptr() % 64 + offset
    view = memory[first : first + x.numel()].view(x.shape)
    return view.copy_(x)


def test_known_answer(kernels):
    # codes 3 0 2 1 1 / 0 0 0 0 3 stand for 3 -3 1 -1 -1 / -3 -3 -3 -3 3.
    codes = torch.tensor([[3, 0, 2, 1, 1], [0, 0, 0, 0, 3]], dtype=torch.uint8)
    product, _ = matrix(codes, (-3, -1, 1, 3))
    x = torch.tensor([[1, 2, 3, 4, 5], [-128, 127, 0, 0, 0]], dtype=torch.int8)
    assert kernels[0] == "scalar"
    for path in kernels:
        want = [[3 - 6 + 3 - 4 - 5, -30 + 15], [-765, 3]]
        assert product.product(x, path).tolist() == want


@pytest.mark.parametrize("levels", GRIDS, ids=str)
@pytest.mark.parametrize("cols", WIDTHS)
def test_extreme_values_do_not_saturate(kernels, levels, cols):
    """Every combination of one level and one activation, all over the matrix."""
    n = len(levels)
    codes = torch.tensor([0, n - 1, n // 2], dtype=torch.uint8)[:, None].expand(3, cols)
    alternating = torch.arange(cols) % 2 * (n - 1)
    codes = torch.cat([codes, alternating[None].to(torch.uint8)])
    product, arguments = matrix(codes, levels)
    signs = torch.ones(cols).masked_fill(torch.arange(cols) % 2 == 1, -1)
    x = torch.stack([torch.full((cols,), v) for v in (127, -127, -128, 0, 1)])
    x = torch.cat([x.float(), 127 * signs[None], -127 * signs[None]]).to(torch.int8)
    want = packed_product_int8(x, *arguments)
    assert want.abs().max() < 2**31
    for path in kernels:
        assert torch.equal(product.product(x, path).long(), want), path


@pytest.mark.parametrize("levels", GRIDS, ids=str)
@pytest.mark.parametrize("rows, cols", [(147, 67), *((40, cols) for cols in WIDTHS)])
def test_every_batch_from_1_to_61(kernels, levels, rows, cols):
    """Every tile of every path: 147 rows leave blocks over for tiles of 8, 4, 2 and 1 blocks."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, len(levels), (rows, cols), dtype=torch.uint8, generator=generator)
    product, arguments = matrix(codes, levels)
    x = torch.randint(-128, 128, (61, cols), generator=generator).to(torch.int8)
    want = packed_product_int8(x, *arguments).to(torch.int32)
    for path in kernels:
        for batch in range(1, 62):
            assert torch.equal(product.product(x[:batch], path), want[:batch]), (path, batch)


@pytest.mark.parametrize("levels", GRIDS, ids=str)
def test_the_widest_matrix_stays_inside_32_bits(kernels, levels):
    """65536 columns of the extreme levels by the extreme activations."""
    cols = 65536
    codes = torch.zeros(3, cols, dtype=torch.uint8)
    codes[0], codes[2, ::2] = len(levels) - 1, len(levels) - 1
    product, arguments = matrix(codes, levels)
    x = torch.stack([torch.full((cols,), v) for v in (-128, 127, 1)]).to(torch.int8)
    want = packed_product_int8(x, *arguments)
    assert want.abs().max() == max(abs(levels[0]), abs(levels[-1])) * 128 * cols
    for path in kernels:
        for batch in (1, 2, 3):
            assert torch.equal(product.product(x[:batch], path).long(), want[:batch]), path


@pytest.mark.parametrize("levels", [levels for levels in GRIDS if len(levels) == 2], ids=str)
@pytest.mark.parametrize("cols", (*WIDTHS, 65536))
def test_many_rows_of_one_bit(kernels, levels, cols):
    """Rows enough for tables of partial sums, where a path has them; extremes among them."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 2, (5, cols), dtype=torch.uint8, generator=generator)
    codes[0], codes[1] = 0, 1
    x = torch.randint(-128, 128, (11, cols), generator=generator).to(torch.int8)
    x[0], x[1] = -128, 127
    _, arguments = matrix(codes, levels)
    product, _ = matrix(codes.repeat(81, 1), levels)
    want = packed_product_int8(x, *arguments).to(torch.int32).repeat(1, 81)
    for path in kernels:
        for batch in (1, 2, 3, 4, 5, 6, 7, 8, 11) if cols < 65536 else (11,):
            assert torch.equal(product.product(x[:batch], path), want[:batch]), (path, batch)


@settings(max_examples=N_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_shapes_and_contents(kernels, data):
    levels = data.draw(
        st.sampled_from(GRIDS)
        | st.lists(st.integers(-128, 127), min_size=2, max_size=16, unique=True).map(sorted)
    )
    cols = data.draw(st.sampled_from(WIDTHS) | st.integers(1, 200))
    rows = data.draw(st.integers(1, 150) | st.just(400))
    batch = data.draw(st.integers(1, 130))
    offset, split = data.draw(st.integers(0, 63)), data.draw(st.integers(0, batch))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    codes = torch.randint(0, len(levels), (rows, cols), dtype=torch.uint8, generator=generator)
    product, arguments = matrix(codes, levels)
    x = torch.randint(-128, 128, (batch, cols), generator=generator).to(torch.int8)
    want = packed_product_int8(x, *arguments).to(torch.int32)
    for path in kernels:
        assert torch.equal(product.product(unaligned(x, offset), path), want)
        parts = [product.product(part, path) for part in (x[:split], x[split:])]
        assert torch.equal(torch.cat(parts), want)


@pytest.mark.parametrize("group_size", (1, 5, 32, 40, 64, 100, 1000))
def test_sums_of_groups_are_exact(kernels, group_size):
    generator = torch.Generator().manual_seed(group_size)
    for bits in (1, 2, 4, 8):
        levels = torch.tensor(make_grid("uniform", bits).levels, dtype=torch.int8)
        codes = torch.randint(0, len(levels), (40, 133), dtype=torch.uint8, generator=generator)
        packed, n_groups = pack_codes(codes, bits), -(-133 // group_size)
        product = KernelMatrix(packed, torch.ones(40, n_groups), levels, bits, 133, group_size)
        x = torch.randint(-128, 128, (9, 133), generator=generator).to(torch.int8)
        want = packed_product_int8(x, packed, levels, bits, 133, group_size).to(torch.int32)
        for path in kernels:
            assert torch.equal(product.product(x, path).view(n_groups, 9, 40), want)


def test_strided_inputs_and_empty_batches(kernels):
    codes = torch.randint(0, 4, (20, 9), dtype=torch.uint8)
    product, arguments = matrix(codes, (-3, -1, 1, 3))
    x = torch.randint(-127, 128, (9, 5)).to(torch.int8).t()
    for path in kernels:
        assert torch.equal(product.product(x, path).long(), packed_product_int8(x, *arguments))
        assert product.product(x[:0], path).shape == (0, 20)


def test_resident_bytes_are_near_those_of_the_codes(kernels):
    for bits in (1, 2, 4, 8):
        codes = torch.zeros(650, 650, dtype=torch.uint8)
        product, (packed, *_) = matrix(codes, make_grid("uniform", bits).levels)
        assert packed.numel() < product.n_bytes < 1.08 * packed.numel() + 4 * 656


def test_what_the_kernels_cannot_take_is_refused(kernels):
    codes, levels = torch.zeros(4, 2, dtype=torch.uint8), torch.tensor([-1, 1], dtype=torch.int8)
    KernelMatrix(codes, torch.ones(4, 1), levels, 1, 9)
    for wrong in (
        (codes, torch.ones(4, 2), levels, 1, 9),  # scales of groups, and none
        (codes, torch.ones(4, 3), levels, 1, 9, 5),
        (codes, torch.ones(3, 1), levels, 1, 9),
        (codes, torch.ones(4, 1), levels, 1, 17),  # too few bytes a row
        (codes, torch.ones(4, 1), levels, 3, 5),
        (codes, torch.ones(4, 1), torch.tensor([-2, 0, 1], dtype=torch.int8), 1, 9),
        (codes, torch.ones(4, 1), levels * 2, 8, 2),  # 8 bits: no table
        (codes.float(), torch.ones(4, 1), levels, 1, 9),
    ):
        with pytest.raises(InputError, match="cannot take"):
            KernelMatrix(*wrong)
    product = KernelMatrix(codes, torch.ones(4, 1), levels, 1, 9)
    for x in (torch.zeros(2, 9), torch.zeros(2, 8, dtype=torch.int8)):
        with pytest.raises(InputError, match="expected torch.int8"):
            product.product(x)
