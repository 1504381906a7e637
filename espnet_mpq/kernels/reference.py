"""The slow, obvious definition of every packed operation; every fast path is tested against it."""

from __future__ import annotations

from typing import Optional

import torch


def unpack(codes: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """Codes out of bytes: column j of a row sits at bit (j * bits) of that row, lowest bit first.

    Args:
        codes: uint8 (rows, ceil(cols * bits / 8)).
        bits: 1, 2, 4 or 8.

    Returns:
        int64 (rows, cols), values 0 .. 2^bits - 1.

    Source: own (packed/FORMAT.md).
    """
    first_bit = torch.arange(cols, device=codes.device) * bits
    byte = codes.to(torch.int64)[:, torch.div(first_bit, 8, rounding_mode="floor")]
    return (byte >> (first_bit % 8)) & (2**bits - 1)


def dequantize_linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    bits: int,
    cols: int,
    group_size: Optional[int] = None,
) -> torch.Tensor:
    """The matrix that codes and scales stand for: scale * levels[code], in float32.

    Args:
        codes: uint8 (rows, ceil(cols * bits / 8)).
        scales: float (1, 1), (rows, 1), or (rows, ceil(cols / group_size)) with group_size.
        levels: the grid, (n_levels,), ascending.

    Returns:
        float32 (rows, cols); each value is one float32 product, so it is the same everywhere.
    """
    level = levels.to(codes.device, torch.float32)[unpack(codes, bits, cols)]
    scale = scales.to(torch.float32)
    if group_size is not None:
        column = torch.arange(cols, device=codes.device)
        scale = scale[:, torch.div(column, group_size, rounding_mode="floor")]
    return scale * level


def packed_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    bits: int,
    cols: int,
    bias: Optional[torch.Tensor] = None,
    group_size: Optional[int] = None,
) -> torch.Tensor:
    """x W^T + bias with W = dequantize_linear(...).

    Args:
        x: float (..., cols).
        bias: float (rows,) or None.

    Returns:
        (..., rows), dtype of ``x``.
    """
    weight = dequantize_linear(codes, scales, levels, bits, cols, group_size).to(x.dtype)
    y = x @ weight.t()
    return y if bias is None else y + bias


def packed_embedding(
    tokens: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    bits: int,
    cols: int,
    group_size: Optional[int] = None,
) -> torch.Tensor:
    """Rows of W for token ids: int64 (...) -> float32 (..., cols)."""
    return dequantize_linear(codes, scales, levels, bits, cols, group_size)[tokens]
