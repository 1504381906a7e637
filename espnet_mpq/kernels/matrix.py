"""A matrix in the kernels' layout, of codes or floats: exact int8 products, and a linear layer."""

from __future__ import annotations

import weakref
from math import ceil
from typing import Optional, Tuple

import torch

from espnet_mpq.errors import InputError
from espnet_mpq.kernels import dispatch

FLOAT_BITS = {torch.float16: 16, torch.float32: 32}


class KernelMatrix:
    """A matrix repacked once from the tensors of a packed file; its memory is never written again.

    Args:
        codes: uint8 (rows, ceil(cols * bits / 8)), CPU; or the weights themselves, float16 or
            float32 (rows, cols), finite, and then nothing else.
        scales: float (1, 1), (rows, 1), or (rows, ceil(cols / group_size)) with group_size.
        levels: the grid, int8 (n_levels,); consecutive whole numbers at 8 bits.
        bits: 1, 2, 4 or 8.
        cols: width, at most dispatch.max_cols().
        group_size: columns that share a scale; None: all of a row.

    Raises:
        InputError: no library, or a matrix that the kernels cannot take.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: Optional[torch.Tensor] = None,
        levels: Optional[torch.Tensor] = None,
        bits: Optional[int] = None,
        cols: Optional[int] = None,
        group_size: Optional[int] = None,
    ):
        self.library = dispatch.needed_library()
        self.rows, self.dtype = codes.shape[0], codes.dtype
        self.bits = FLOAT_BITS.get(codes.dtype, bits)
        self.cols = codes.shape[1] if codes.dtype in FLOAT_BITS else cols
        self.group_size = min(group_size or self.cols, self.cols)
        self.n_groups = 0 if codes.dtype in FLOAT_BITS else ceil(self.cols / self.group_size)
        handle = self._new(codes.contiguous(), scales, levels)
        if not handle:
            raise InputError(
                "the kernels cannot take this matrix",
                found=f"codes {codes.dtype} {tuple(codes.shape)}, {bits} bits, {cols} columns, "
                f"{None if levels is None else levels.numel()} levels, "
                f"scales {None if scales is None else tuple(scales.shape)}, groups of {group_size}",
                expected=f"1, 2, 4 or 8 bits or floats, at most {dispatch.max_cols()} columns, one "
                "scale, one a row or one for each group of a row",
            )
        self.handle = handle
        # Not at exit: another thread may still compute, and the memory ends with the process.
        weakref.finalize(self, self.library.mpq_matrix_free, handle).atexit = False

    def _new(self, codes, scales, levels) -> Optional[int]:
        """The library's handle, None for what it refuses: only shapes tell a short tensor."""
        if self.n_groups == 0:
            if scales is not None or self.cols < 1:
                return None
            return self.library.mpq_matrix_of_floats(
                codes.data_ptr(), self.rows, self.cols, self.bits
            )
        if codes.dtype != torch.uint8 or codes.shape[1] != ceil(self.cols * self.bits / 8):
            return None
        if scales.dim() != 2 or scales.shape[1] != self.n_groups:
            return None
        levels = levels.to(torch.int8).contiguous()
        scales = scales.to(torch.float32).contiguous()
        return self.library.mpq_matrix_of_codes(
            *(codes.data_ptr(), self.rows, self.cols, self.bits),
            *(levels.data_ptr(), levels.numel()),
            *(scales.data_ptr(), scales.shape[0], self.group_size),
        )

    def __reduce__(self):
        raise TypeError("a KernelMatrix cannot be copied: its memory has one owner")

    @property
    def n_bytes(self) -> int:
        """Bytes that the repacked matrix takes in memory, scales and padding included."""
        return int(self.library.mpq_matrix_n_bytes(self.handle))

    def stored(self) -> torch.Tensor:
        """The codes or weights as they were given, bit for bit; new memory."""
        width = ceil(self.cols * self.bits / 8) if self.n_groups else self.cols
        out = torch.empty(self.rows, width, dtype=self.dtype)
        code = self.library.mpq_matrix_stored(self.handle, out.data_ptr())
        dispatch.check(code, "stored codes")
        return out

    def embedding(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix: int64 (...) -> float32 (..., cols), as reference.packed_embedding.

        Raises:
            InputError: a number outside the rows, or numbers that are not on the CPU.
        """
        dispatch.check_cpu(rows)
        rows = rows.to(torch.int64).contiguous()
        out = torch.empty(*rows.shape, self.cols)
        code = self.library.mpq_matrix_rows(
            self.handle, rows.data_ptr(), rows.numel(), out.data_ptr()
        )
        dispatch.check(code, "embedding")
        return out

    def product(
        self, x: torch.Tensor, path: Optional[str] = None, n_threads: Optional[int] = None
    ) -> torch.Tensor:
        """Levels times int8 activations, exact: int8 (batch, cols) -> int32 (batch, rows).

        With several groups (n_groups, batch, rows), the sum of each group apart.

        Raises:
            InputError: a wrong input, a path that cannot run here, or a matrix of floats.
        """
        x = _checked(x, torch.int8, self.cols)
        y = torch.empty(self.n_groups, x.shape[0], self.rows, dtype=torch.int32)
        code = self.library.mpq_product(
            *(self.handle, x.data_ptr(), x.shape[0], y.data_ptr()),
            *(dispatch.path_number(path), n_threads or torch.get_num_threads()),
        )
        dispatch.check(code, "product")
        return y[0] if self.n_groups == 1 else y

    def linear(
        self,
        x: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        path: Optional[str] = None,
        n_threads: Optional[int] = None,
    ) -> torch.Tensor:
        """x W^T + bias: float32 (batch, cols) -> float32 (batch, rows).

        x is quantized per row for a matrix of codes and taken as it is for one of floats.

        Args:
            path: one of dispatch.PATHS; None: dispatch.choose().
            n_threads: threads at most, the caller's included; None: torch.get_num_threads().
                The result is the same for every number.

        Raises:
            InputError: a wrong input, or a path that cannot run here.
        """
        x = _checked(x, torch.float32, self.cols)
        if bias is not None:
            bias = _checked(bias.reshape(1, -1), torch.float32, self.rows)
        y = torch.empty(x.shape[0], self.rows)
        code = self.library.mpq_linear(
            *(self.handle, x.data_ptr(), x.shape[0], dispatch.address(bias), y.data_ptr()),
            *(dispatch.path_number(path), n_threads or torch.get_num_threads()),
        )
        dispatch.check(code, "linear")
        return y


def quantize_rows(x: torch.Tensor, path: Optional[str] = None) -> Tuple[torch.Tensor, torch.Tensor]:
    """float32 (batch, cols) -> int8 (batch, cols) and scales (batch, 1); see reference.py.

    Raises:
        InputError: no library, or the path cannot run here.
    """
    library = dispatch.needed_library()
    x = _checked(x, torch.float32, x.shape[-1])
    q = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(x.shape[0], 1)
    code = library.mpq_quantize(
        *(x.data_ptr(), *x.shape, q.data_ptr(), scales.data_ptr(), dispatch.path_number(path))
    )
    dispatch.check(code, "quantize")
    return q, scales


def _checked(x: torch.Tensor, dtype: torch.dtype, cols: int) -> torch.Tensor:
    if x.dtype != dtype or x.dim() != 2 or x.shape[1] != cols or x.device.type != "cpu":
        raise InputError(
            "kernel: wrong input",
            found=f"{x.dtype} {tuple(x.shape)} on {x.device}",
            expected=f"{dtype} (batch, {cols}) on the CPU",
        )
    return x.contiguous()
