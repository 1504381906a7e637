"""Bit packing: bytes written out by hand, round trips at any width."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_mpq.errors import FormatError, InputError
from espnet_mpq.packed.bits import pack_codes, unpack_codes


def _codes(rows):
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize(
    "bits, codes, packed",
    [
        (1, [[1, 0, 0, 0, 0, 0, 0, 0, 1, 1]], [[0b00000001, 0b00000011]]),
        (1, [[0, 1, 1, 0, 1, 0, 0, 1]], [[0b10010110]]),
        (2, [[1, 2, 3, 0, 2], [0, 0, 0, 3, 1]], [[0b00111001, 0b10], [0b11000000, 0b01]]),
        (4, [[1, 15, 7]], [[0xF1, 0x07]]),
        (8, [[0, 255, 128]], [[0, 255, 128]]),
    ],
)
def test_golden_bytes(bits, codes, packed):
    assert pack_codes(_codes(codes), bits).tolist() == packed
    assert unpack_codes(_codes(packed), bits, len(codes[0])).tolist() == codes


@settings(deadline=None)
@given(
    st.sampled_from((1, 2, 3, 4, 8)),
    st.integers(1, 4),
    st.integers(1, 67),
    st.integers(0, 2**31 - 1),
)
def test_round_trip(bits, rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-cols * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, cols), codes)
    # The bits of a row as one integer, lowest byte first: code j stands at bit j * bits.
    for row, row_codes in zip(packed.tolist(), codes.tolist()):
        value = sum(code << (bits * j) for j, code in enumerate(row_codes))
        assert int.from_bytes(bytes(row), "little") == value


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8))
@pytest.mark.parametrize("cols", (1, 3, 7, 650, 8 * 9 + 2))
def test_odd_widths(bits, cols):
    codes = torch.full((3, cols), 2**bits - 1, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed, bits, cols), codes)
    n_used = cols * bits % 8
    if n_used:
        assert (packed[:, -1] == 2**n_used - 1).all()  # padding bits are 0


def test_result_does_not_share_memory():
    codes = _codes([[1, 2]])
    packed = pack_codes(codes, 8)
    codes[0, 0] = 9
    assert packed.tolist() == [[1, 2]]


def test_refuses():
    with pytest.raises(InputError, match="1, 2, 3, 4 or 8"):
        pack_codes(_codes([[1]]), 5)
    with pytest.raises(InputError, match="too large for 2 bits"):
        pack_codes(_codes([[1, 4]]), 2)
    with pytest.raises(InputError, match="torch.uint8"):
        pack_codes(torch.ones(1, 2), 2)
    with pytest.raises(InputError, match="rows, cols"):
        pack_codes(torch.ones(2, dtype=torch.uint8), 2)
    with pytest.raises(FormatError, match="5 codes of 2 bits"):
        unpack_codes(_codes([[1]]), 2, 5)
    with pytest.raises(FormatError):
        unpack_codes(torch.ones(1, 1, dtype=torch.int32), 2, 4)
