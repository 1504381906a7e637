"""Bit packing: codes of 1, 2, 3, 4 or 8 bits in bytes, for rows of any width."""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F

from espnet_mpq.errors import FormatError, InputError

PACKED_BITS = (1, 2, 3, 4, 8)


def row_n_bytes(cols: int, bits: int) -> int:
    """Bytes of one packed row: whole bytes, so that every row starts at one."""
    return ceil(cols * bits / 8)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each row of codes: code j has the bits j * bits and on, from a byte's lowest bit up.

    Args:
        codes: uint8 (rows, cols), values 0 .. 2^bits - 1.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        uint8 (rows, ceil(cols * bits / 8)); the unused high bits of a row's last byte are 0.

    Raises:
        InputError: other bits, dtype or shape, or a code that does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise InputError(
            "cannot pack codes",
            found=f"{codes.dtype} of shape {tuple(codes.shape)}",
            expected="torch.uint8 (rows, cols)",
        )
    if bits == 8:
        return codes.clone()
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise InputError(
            f"code too large for {bits} bits", found=int(codes.max()), expected=f"< {2**bits}"
        )
    rows, cols = codes.shape
    n_bytes = row_n_bytes(cols, bits)
    if bits == 3:
        eights = F.pad(codes, (0, -cols % 8)).reshape(rows, -1, 8).to(torch.int32)
        words = sum(eights[:, :, k] << (3 * k) for k in range(8))
        split = torch.stack([(words >> shift) & 255 for shift in (0, 8, 16)], dim=2)
        return split.to(torch.uint8).reshape(rows, -1)[:, :n_bytes].contiguous()
    per_byte = 8 // bits
    grouped = F.pad(codes, (0, n_bytes * per_byte - cols)).reshape(rows, n_bytes, per_byte)
    packed = grouped[:, :, 0].clone()
    for k in range(1, per_byte):
        packed |= grouped[:, :, k] << (k * bits)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """The inverse of pack_codes: uint8 (rows, cols).

    Raises:
        InputError: other bits.
        FormatError: dtype or shape cannot hold ``cols`` codes per row.
    """
    _check_bits(bits)
    expected = row_n_bytes(cols, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != expected:
        raise FormatError(
            "cannot unpack codes",
            found=f"{packed.dtype} of shape {tuple(packed.shape)}",
            expected=f"torch.uint8 (rows, {expected}) for {cols} codes of {bits} bits a row",
        )
    if bits == 8:
        return packed.clone()
    rows = packed.shape[0]
    if bits == 3:
        threes = F.pad(packed, (0, -expected % 3)).reshape(rows, -1, 3).to(torch.int32)
        words = threes[:, :, 0] | threes[:, :, 1] << 8 | threes[:, :, 2] << 16
        codes = torch.stack([(words >> (3 * k)) & 7 for k in range(8)], dim=2)
        return codes.to(torch.uint8).reshape(rows, -1)[:, :cols].contiguous()
    mask = 2**bits - 1
    codes = torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=2)
    return codes.reshape(rows, -1)[:, :cols].contiguous()


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        expected = "1, 2, 3, 4 or 8 bits"
        raise InputError("cannot pack codes of this size", found=bits, expected=expected)
