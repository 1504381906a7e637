"""Grids: the integer levels that a weight may take at a bit-width, before the scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Optional, Tuple

import torch

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.quant import spec

GRIDS = (*spec.GRIDS, "codebook")
MAX_CODEBOOK_LEVELS = 16


@dataclass(frozen=True)
class Grid:
    """Ascending int8 levels; the code of a level is its index (uint8).

    Raises:
        InputError: bits outside 1..8, or levels that are not ascending, not int8, or
            more than the bits (for a codebook: more than 16) can name.
    """

    name: str
    bits: int
    levels: Tuple[int, ...]

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise InputError(
                f"grid {self.name}: bad bits", found=self.bits, expected="1 to 8 bits per code"
            )
        object.__setattr__(self, "levels", tuple(int(level) for level in self.levels))
        ascending = all(a < b for a, b in zip(self.levels, self.levels[1:]))
        if len(self.levels) < 2 or not ascending or min(self.levels) < -128:
            raise InputError(
                f"grid {self.name}: bad levels",
                found=self.levels,
                expected="at least two ascending integers from -128 to 127",
            )
        most = 2**self.bits
        if self.name == "codebook":
            most = min(most, MAX_CODEBOOK_LEVELS)
        if len(self.levels) > most or max(self.levels) > 127:
            raise InputError(
                f"grid {self.name}: levels do not fit",
                found=f"{len(self.levels)} levels up to {max(self.levels)}",
                expected=f"at most {most} levels up to 127 at {self.bits} bits",
            )

    @cached_property
    def step(self) -> Optional[int]:
        """Distance between neighbours when it is the same everywhere, else None."""
        steps = {b - a for a, b in zip(self.levels, self.levels[1:])}
        return steps.pop() if len(steps) == 1 else None

    @cached_property
    def is_symmetric(self) -> bool:
        """True when -l is a level for every level l."""
        return self.levels == tuple(-level for level in reversed(self.levels))

    @cached_property
    def max_level(self) -> int:
        """The largest magnitude of a level."""
        return max(abs(self.levels[0]), abs(self.levels[-1]))

    def levels_tensor(self, device=None, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        """The levels as a tensor (n_levels,)."""
        return torch.tensor(self.levels, device=device, dtype=dtype)

    def codes_of(self, ratio: torch.Tensor) -> torch.Tensor:
        """Code of the level nearest to ``ratio`` = weight / scale; a tie takes the upper level.

        Args:
            ratio: float32 or float64, any shape; overwritten when the levels are equidistant.

        Returns:
            The codes as whole numbers, in the dtype of ``ratio``.
        """
        if self.step is None:
            levels = self.levels_tensor(ratio.device, torch.float64)
            middles = ((levels[1:] + levels[:-1]) / 2).to(ratio.dtype)
            return torch.bucketize(ratio, middles, right=True).to(ratio.dtype)
        if self.step != 1:
            ratio.div_(self.step)
        # floor(x + 0.5), not round(), which sends ties to the even code. Whole numbers are
        # added after floor() so that a tiny negative weight keeps its side of 0.
        half_up = 0.5 - self.levels[0] / self.step
        if half_up % 1:
            ratio.add_(half_up % 1)
        return ratio.floor_().add_(half_up // 1).clamp_(0, len(self.levels) - 1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Float32 levels of uint8 codes, same shape."""
        return self.levels_tensor(codes.device, torch.float32)[codes.long()]

    def levels_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Levels of codes, in the dtype and shape of the (float) codes; may overwrite them."""
        if self.step is None:
            return self.levels_tensor(codes.device, codes.dtype)[codes.long()]
        if self.step != 1:
            codes.mul_(self.step)
        return codes.add_(self.levels[0])


@lru_cache(maxsize=None)
def make_grid(name: str, bits: int) -> Grid:
    """The grid of a name and a bit-width (1 to 8).

    paper: {0, ±1, ..., ±(2^(n-1) - 1)}, at 1 bit {-1, +1}, where the printed formula
        would leave only 0 (Xu et al. 2021, arXiv 2112.11438, section II).
    uniform: all 2^n levels, the odd integers ±1, ±3, ..., ±(2^n - 1); at 8 bits
        -128..127, because odd levels would not fit int8 (own).

    Raises:
        InputError: unknown name, bits outside 1..8, or "codebook", whose levels are learned.
    """
    if name not in GRIDS:
        raise InputError("unknown grid", found=repr(name), todo=near_matches(name, GRIDS))
    if name == "codebook":
        raise InputError(
            "grid codebook has no levels of its own",
            todo="give them: Grid('codebook', bits, levels)",
        )
    if not 1 <= bits <= 8:
        raise InputError(f"grid {name}: bad bits", found=bits, expected="1 to 8")
    top = 2 ** (bits - 1) - 1
    if bits == 1:
        levels = (-1, 1)
    elif name == "paper":
        levels = tuple(range(-top, top + 1))
    elif bits == 8:
        levels = tuple(range(-128, 128))
    else:
        levels = tuple(range(1 - 2**bits, 2**bits, 2))
    return Grid(name, bits, levels)
