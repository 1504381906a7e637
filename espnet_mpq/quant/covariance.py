"""The covariance of a matrix's inputs, and what second-order rounding needs of it."""

from __future__ import annotations

from functools import cached_property
from typing import Tuple

import torch

from espnet_mpq.errors import InputError

DAMPING = 0.01  # of the mean diagonal
TILE = 1 << 22  # weights worked on at a time


class Covariance:
    """Second moments of the inputs of a matrix, and what rounding needs of them.

    Args:
        matrix: (C, C), symmetric, nonnegative definite; centred ones leave the mean of the
            outputs to a bias (``mean_shift``). Kept as float64.

    Raises:
        InputError: not square, NaN or infinity, or a negative diagonal.
    """

    def __init__(self, matrix: torch.Tensor):
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError("not a covariance", found=tuple(matrix.shape), expected="(C, C)")
        matrix = matrix.detach().double()
        diagonal = matrix.diagonal()
        if not bool(torch.isfinite(matrix).all()) or bool((diagonal < 0).any()):
            raise InputError(
                "not a covariance",
                found="NaN, infinity or a negative diagonal",
                todo="measure it with an LM whose activations are finite",
            )
        self.matrix = (matrix + matrix.T) / 2

    @property
    def n_cols(self) -> int:
        return self.matrix.shape[0]

    @cached_property
    def damped(self) -> torch.Tensor:
        """With DAMPING of its mean diagonal added; the identity where all inputs are zero."""
        mean = float(self.matrix.diagonal().mean())
        identity = torch.eye(self.n_cols, dtype=torch.float64, device=self.matrix.device)
        return self.matrix + DAMPING * mean * identity if mean > 0 else identity

    @cached_property
    def order(self) -> torch.Tensor:
        """Columns by falling diagonal: the largest inputs first, the others make up for them."""
        return torch.argsort(self.matrix.diagonal(), descending=True, stable=True)

    @cached_property
    def updates(self) -> torch.Tensor:
        """Upper Cholesky factor of the inverse of ``damped``, in ``order``: (C, C) float64.

        Row i / its diagonal is how the later columns best make up for an error of column i.
        """
        damped = self.damped[self.order][:, self.order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True)

    def error(self, difference: torch.Tensor) -> torch.Tensor:
        """d C d' of every row d: what the outputs change by, squared and averaged; float64 (R,)."""
        matrix = self.matrix.to(difference.dtype)
        return torch.cat(
            [(d @ matrix).mul_(d).sum(1, dtype=torch.float64) for d in _tiles(difference)]
        ).clamp_(min=0)


def _tiles(mat: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    return mat.split(max(1, TILE // max(1, mat.shape[1])))
