"""The slow, obvious definition of every packed operation; every fast path is tested against it."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence, Tuple

import torch


def unpack(codes: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """Codes out of bytes: column j of a row sits at bit (j * bits) of that row, lowest bit first.

    Args:
        codes: uint8 (rows, ceil(cols * bits / 8)).
        bits: 1, 2, 3, 4 or 8; a code of 3 bits may reach into the next byte.

    Returns:
        int64 (rows, cols), values 0 .. 2^bits - 1.

    Source: own (packed/FORMAT.md).
    """
    first_bit = torch.arange(cols, device=codes.device) * bits
    first = torch.div(first_bit, 8, rounding_mode="floor")
    data = torch.nn.functional.pad(codes.to(torch.int64), (0, 1))
    two_bytes = data[:, first] | data[:, first + 1] << 8
    return (two_bytes >> (first_bit % 8)) & (2**bits - 1)


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
    q: torch.Tensor,
    codes: torch.Tensor,
    levels: torch.Tensor,
    bits: int,
    cols: int,
    group_size: Optional[int] = None,
) -> torch.Tensor:
    """sum over c of levels[code[r, c]] * q[b, c], exact: int8 (batch, cols) -> int64 (batch, rows).

    With group_size the sums of each group of columns apart: (n_groups, batch, rows).

    Source: own.
    """
    level, q = levels.to(torch.int64)[unpack(codes, bits, cols)], q.to(torch.int64)
    if group_size is None:
        return q @ level.t()
    groups = zip(q.split(group_size, dim=1), level.split(group_size, dim=1))
    return torch.stack([x @ w.t() for x, w in groups])


def packed_linear_int8(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    bits: int,
    cols: int,
    group_size: Optional[int] = None,
    total: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """total + (q_scale q) W^T for int8 activations; scales as dequantize_linear takes them.

    Returns:
        float32 (batch, rows): the exact product of each group of columns times (q_scale * scale),
        added to ``total`` (batch, rows) one after the other, first columns first.
    """
    products = packed_product_int8(q, codes, levels, bits, cols, group_size or cols)
    for product, scale in zip(products.to(torch.float32), scales.to(torch.float32).t()):
        part = product * (q_scale * scale)
        total = part if total is None else total + part
    return total


class Activations(NamedTuple):
    """The input of a layer: rows float32 (batch, cols), and what stands for them as int8."""

    rows: torch.Tensor
    q: torch.Tensor
    q_scale: torch.Tensor


def activations(rows: torch.Tensor) -> Activations:
    """Rows of floats quantized by quantize_rows."""
    return Activations(rows, *quantize_rows(rows))


def add_linear(total: Optional[torch.Tensor], x: Activations, matrix: Sequence) -> torch.Tensor:
    """total + x W^T, float32 (batch, rows); None for no total.

    Args:
        matrix: (codes, scales, levels, bits, cols, group_size) for the int8 form of x, or (weight,)
            float16 or float32 (rows, cols) for its floats.
    """
    if len(matrix) > 1:
        return packed_linear_int8(x.q, x.q_scale, *matrix, total=total)
    product = x.rows @ matrix[0].to(torch.float32).t()
    return product if total is None else total + product


def embedding_activations(tokens: torch.Tensor, matrix: Sequence) -> Activations:
    """Rows of a matrix, as add_linear takes it, for token ids (batch,).

    Codes with one scale a row, or one for all, are int8 activations as they are: exact.
    """
    if len(matrix) == 1:
        return activations(matrix[0][tokens].to(torch.float32))
    codes, scales, levels, bits, cols, group_size = matrix
    rows = packed_embedding(tokens, *matrix)
    if group_size is not None and group_size < cols:
        return activations(rows)
    level = levels.to(torch.int8)[unpack(codes[tokens], bits, cols)]
    return Activations(rows, level, scales.to(torch.float32).expand(codes.shape[0], 1)[tokens])


def lstm_cell(
    x: Activations,
    h: torch.Tensor,
    c: torch.Tensor,
    matrices: Sequence[Sequence],
    biases: Sequence[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """One LSTM layer for one token with int8 input and hidden state.

    Args:
        x: of (batch, width).
        h, c: float32 (batch, nhid); h is quantized here.
        matrices: as add_linear takes them, those of the input for gates i, f, g, o, then those of
            the hidden state.
        biases: float32 (nhid,) of the four gates.

    Returns:
        The new h and c, float32 (batch, nhid).
    """
    hidden = activations(h)
    i, f, g, o = (
        add_linear(add_linear(None, x, matrices[k]), hidden, matrices[4 + k]) + biases[k]
        for k in range(4)
    )
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c
