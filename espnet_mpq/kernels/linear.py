"""A packed matrix in the kernels' layout: exact int8 products, and a linear layer on floats."""

from __future__ import annotations

import weakref
from typing import Optional, Tuple

import torch

from espnet_mpq.errors import InputError
from espnet_mpq.kernels import dispatch


class KernelMatrix:
    """A matrix repacked once from the codes of a packed file; its own memory, never written again.

    Args:
        codes: uint8 (rows, ceil(cols * bits / 8)), CPU.
        scales: float (1, 1) or (rows, 1). Groups along a row have no kernel yet.
        levels: the grid, int8 (n_levels,); consecutive whole numbers at 8 bits.
        bits: 1, 2, 4 or 8.
        cols: width, at most 65536.

    Raises:
        InputError: no library, or a matrix that the kernels cannot take.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        levels: torch.Tensor,
        bits: int,
        cols: int,
    ):
        library = dispatch.library()
        if library is None:
            raise InputError("no kernels", found=dispatch.why_no_library())
        self.rows, self.cols, self.bits = codes.shape[0], cols, bits
        codes, levels = codes.contiguous(), levels.to(torch.int8).contiguous()
        scales = scales.to(torch.float32).contiguous()
        # Only the shape tells a short tensor from a whole one behind a pointer.
        handle = None
        if codes.shape == (self.rows, -(-cols * bits // 8)) and scales.dim() == 2:
            if codes.dtype == torch.uint8 and scales.shape[1] == 1:
                handle = library.mpq_matrix_new(
                    *(codes.data_ptr(), self.rows, cols, bits),
                    *(levels.data_ptr(), levels.numel(), scales.data_ptr(), scales.shape[0]),
                )
        if not handle:
            raise InputError(
                "the kernels cannot take this matrix",
                found=f"codes {codes.dtype} {tuple(codes.shape)}, {bits} bits, {cols} columns, "
                f"{levels.numel()} levels, scales {tuple(scales.shape)}",
                expected="1, 2, 4 or 8 bits, at most 65536 columns, one scale or one a row",
            )
        self.library, self.handle = library, handle
        weakref.finalize(self, library.mpq_matrix_free, handle)

    @property
    def n_bytes(self) -> int:
        """Bytes that the repacked matrix takes in memory, scales and padding included."""
        return int(self.library.mpq_matrix_n_bytes(self.handle))

    def product(self, x: torch.Tensor, path: Optional[str] = None) -> torch.Tensor:
        """Levels times int8 activations: int8 (batch, cols) -> exact int32 (batch, rows)."""
        x = _checked(x, torch.int8, self.cols)
        y = torch.empty(x.shape[0], self.rows, dtype=torch.int32)
        code = self.library.mpq_product(
            self.handle, x.data_ptr(), x.shape[0], y.data_ptr(), _path_number(path)
        )
        dispatch.check(code, "product")
        return y

    def linear(
        self, x: torch.Tensor, bias: Optional[torch.Tensor] = None, path: Optional[str] = None
    ) -> torch.Tensor:
        """x W^T + bias with x quantized per row: float32 (batch, cols) -> float32 (batch, rows)."""
        x = _checked(x, torch.float32, self.cols)
        if bias is not None:
            bias = _checked(bias.reshape(1, -1), torch.float32, self.rows)
        y = torch.empty(x.shape[0], self.rows)
        code = self.library.mpq_linear(
            *(self.handle, x.data_ptr(), x.shape[0], dispatch.address(bias), y.data_ptr()),
            _path_number(path),
        )
        dispatch.check(code, "linear")
        return y


def quantize_rows(x: torch.Tensor, path: Optional[str] = None) -> Tuple[torch.Tensor, torch.Tensor]:
    """float32 (batch, cols) -> int8 (batch, cols) and scales (batch, 1); see reference.py.

    Raises:
        InputError: no library, or the path cannot run here.
    """
    library = dispatch.library()
    if library is None:
        raise InputError("no kernels", found=dispatch.why_no_library())
    x = _checked(x, torch.float32, x.shape[-1])
    q = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(x.shape[0], 1)
    code = library.mpq_quantize(
        *(x.data_ptr(), *x.shape, q.data_ptr(), scales.data_ptr(), _path_number(path))
    )
    dispatch.check(code, "quantize")
    return q, scales


def _path_number(path: Optional[str]) -> int:
    name = dispatch.choose(path)
    if name == dispatch.REFERENCE:
        raise InputError(
            "kernels called while the reference is forced (MPQ_KERNEL)",
            todo="use kernels/reference.py",
        )
    return dispatch.number(name)


def _checked(x: torch.Tensor, dtype: torch.dtype, cols: int) -> torch.Tensor:
    if x.dtype != dtype or x.dim() != 2 or x.shape[1] != cols or x.device.type != "cpu":
        raise InputError(
            "kernel: wrong input",
            found=f"{x.dtype} {tuple(x.shape)} on {x.device}",
            expected=f"{dtype} (batch, {cols}) on the CPU",
        )
    return x.contiguous()
