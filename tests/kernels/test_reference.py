"""The reference kernels: worked values, with packed.bits and packed.dequantize beside them."""

from __future__ import annotations

import pytest
import torch

from espnet_mpq.kernels.reference import (
    dequantize_linear,
    packed_embedding,
    packed_linear,
    unpack,
)
from espnet_mpq.packed.bits import pack_codes
from espnet_mpq.packed.dequantize import dequantize_part
from espnet_mpq.packed.tensors import codes_name, scales_name
from espnet_mpq.quant.grid import make_grid

from packed_models import SPECS, architecture, packed_model, uniform  # isort: skip

WIDTHS = (1, 3, 7, 8, 9, 33, 650)


def test_unpack_known_bytes():
    # 0x63 = 0b01100011: 2-bit codes 3, 0, 2, 1 from the lowest bits up; 1-bit 1,1,0,0,0,1,1,0.
    row = torch.tensor([[0x63, 0x01]], dtype=torch.uint8)
    assert unpack(row, 2, 5).tolist() == [[3, 0, 2, 1, 1]]
    assert unpack(row, 1, 9).tolist() == [[1, 1, 0, 0, 0, 1, 1, 0, 1]]
    assert unpack(row, 4, 3).tolist() == [[3, 6, 1]]
    assert unpack(row, 8, 2).tolist() == [[0x63, 1]]


def test_dequantize_known_values():
    codes = torch.tensor([[0x63, 0x01], [0x00, 0x02]], dtype=torch.uint8)
    levels = torch.tensor([-3, -1, 1, 3], dtype=torch.int8)
    by_row = dequantize_linear(codes, torch.tensor([[0.5], [2.0]]), levels, 2, 5)
    assert by_row.tolist() == [[1.5, -1.5, 0.5, -0.5, -0.5], [-6, -6, -6, -6, 2]]
    scales = torch.tensor([[1.0, 10.0, 100.0], [0.0, 1.0, 2.0]], dtype=torch.float16)
    by_group = dequantize_linear(codes, scales, levels, 2, 5, group_size=2)
    assert by_group.tolist() == [[3, -3, 10, -10, -100], [0, 0, -3, -3, 2]]


@pytest.mark.parametrize("bits", (1, 2, 4, 8))
@pytest.mark.parametrize("cols", WIDTHS)
def test_unpack_is_the_inverse_of_pack(bits, cols):
    codes = torch.randint(0, 2**bits, (5, cols), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-cols * bits // 8))
    assert torch.equal(unpack(packed, bits, cols), codes.long())


@pytest.mark.parametrize("spec", SPECS[:-2], ids=str)
def test_equals_the_dequantizer_of_packed_bit_for_bit(spec):
    arch = architecture(unit=13, nhid=9)
    packed = packed_model(arch, uniform(arch, spec))
    levels = make_grid(spec.grid, spec.bits).levels_tensor(torch.device("cpu"), torch.float32)
    for cluster in arch.clusters():
        for part in cluster.parts:
            codes = packed.tensors[codes_name(cluster, part)]
            scales = packed.tensors[scales_name(cluster, part, spec)]
            mine = dequantize_linear(codes, scales, levels, spec.bits, part.cols, spec.group_size)
            other = dequantize_part(packed.tensors.__getitem__, cluster, part, spec)
            assert mine.shape == part.shape and torch.equal(mine, other)


@pytest.mark.parametrize("batch", (1, 2, 3, 10))
def test_linear_and_embedding(batch):
    generator = torch.Generator().manual_seed(batch)
    codes = torch.randint(0, 4, (6, 7), generator=generator, dtype=torch.uint8)
    scales = torch.rand(6, 1, generator=generator)
    scales[2] = 0  # an all-zero row
    levels = torch.tensor([-3, -1, 1, 3])
    weight = levels[codes.long()] * scales
    x, bias = torch.randn(batch, 7, generator=generator), torch.randn(6, generator=generator)
    args = (pack_codes(codes, 2), scales, levels, 2, 7)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert torch.allclose(packed_linear(x, *args, bias).double(), want, atol=1e-5)
    assert packed_linear(x, *args)[:, 2].eq(0).all()
    ids = torch.randint(0, 6, (batch, 3), generator=generator)
    assert torch.equal(packed_embedding(ids, *args), weight[ids])
