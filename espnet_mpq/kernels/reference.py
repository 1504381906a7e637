"""The slow, obvious definition of every packed operation; every fast path is tested against it."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

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


def quantize_rows(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 activations, each row with its own scale: x ~ scale * q.

    scale = max|x| / 127 and q = x / scale rounded half to even, both in float32. A row of zeros
    has scale 0; a row with a NaN or infinity has that as scale, so what follows is NaN.

    Args:
        x: float32 (batch, cols).

    Returns:
        q int8 (batch, cols) in -127 .. 127, and scale float32 (batch, 1).
    """
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    usable = (scale > 0) & torch.isfinite(scale)
    q = (x / torch.where(usable, scale, torch.ones_like(scale))).round().clamp(-127, 127)
    return torch.where(usable, q, torch.zeros_like(q)).to(torch.int8), scale


def packed_product_int8(
    q: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor, bits: int, cols: int
) -> torch.Tensor:
    """sum over c of levels[code[r, c]] * q[b, c], exact: int8 (batch, cols) -> int64 (batch, rows).

    Source: own.
    """
    level = levels.to(torch.int64)[unpack(codes, bits, cols)]
    return q.to(torch.int64) @ level.t()


def packed_linear_int8(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    bits: int,
    cols: int,
) -> torch.Tensor:
    """(q_scale q) W^T for int8 activations, one scale for all or one a row of W.

    Returns:
        float32 (batch, rows): the exact product times (q_scale * scale).
    """
    product = packed_product_int8(q, codes, levels, bits, cols).to(torch.float32)
    return product * (q_scale * scales.to(torch.float32).reshape(1, -1))


def packed_embedding_int8(
    tokens: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    bits: int,
    cols: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Rows of W for token ids (batch,) as int8 activations; exact, for levels are int8 already.

    Returns:
        int8 (batch, cols) and scale float32 (batch, 1).
    """
    level = levels.to(torch.int8)[unpack(codes[tokens], bits, cols)]
    return level, scales.to(torch.float32).expand(codes.shape[0], 1)[tokens]


def lstm_cell_int8(
    x: Tuple[torch.Tensor, torch.Tensor],
    h: torch.Tensor,
    c: torch.Tensor,
    matrices: Sequence[tuple],
    biases: Sequence[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """One LSTM layer for one token with int8 input and hidden state.

    Args:
        x: int8 (batch, width) and its scale (batch, 1).
        h, c: float32 (batch, nhid); h is quantized here.
        matrices: (codes, scales, levels, bits, cols) of the input products of gates i, f, g, o,
            then of the hidden ones.
        biases: float32 (nhid,) of the four gates.

    Returns:
        The new h and c, float32 (batch, nhid).
    """
    hidden = quantize_rows(h)
    i, f, g, o = (
        packed_linear_int8(*x, *matrices[k])
        + packed_linear_int8(*hidden, *matrices[4 + k])
        + biases[k]
        for k in range(4)
    )
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c
