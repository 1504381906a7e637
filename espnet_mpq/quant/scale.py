"""Scale tying: which weights share one scale, as blocks with one row per scale."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.quant.spec import TYINGS

SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}  # as plans name them


@dataclass(frozen=True)
class Blocks:
    """The weights of some matrices arranged as one row per scale.

    Attributes:
        values: float32 (n_scales, width); padding is 0.
        mask: bool (n_scales, width), False on padding; None when there is no padding.
        shapes: (rows, cols) of every matrix.
    """

    values: torch.Tensor
    mask: Optional[torch.Tensor]
    shapes: Tuple[Tuple[int, int], ...]
    tying: str
    group_size: Optional[int] = None

    def split(self, blocks: torch.Tensor) -> List[torch.Tensor]:
        """(n_scales, width) of any dtype -> one contiguous (rows, cols) per matrix."""
        mats, start = [], 0
        if self.tying in ("model", "cluster"):
            flat = blocks.reshape(-1)
            for rows, cols in self.shapes:
                mats.append(flat[start : start + rows * cols].reshape(rows, cols))
                start += rows * cols
            return mats
        for (rows, cols), (_, n_groups) in zip(self.shapes, self._scale_shapes()):
            stop = start + rows * n_groups
            size = cols if self.group_size is None else min(self.group_size, cols)
            mat = blocks[start:stop, :size].reshape(rows, n_groups * size)[:, :cols]
            mats.append(mat.contiguous())
            start = stop
        return mats

    def split_scales(self, scales: torch.Tensor) -> List[torch.Tensor]:
        """(n_scales, 1) -> one scale tensor per matrix, shapes as scale_shapes.

        With tying "model" and "cluster" every entry is the same tensor (1, 1).
        """
        if self.tying in ("model", "cluster"):
            return [scales.reshape(1, 1)] * len(self.shapes)
        mats, start = [], 0
        for rows, n_groups in self._scale_shapes():
            stop = start + rows * n_groups
            mats.append(scales[start:stop].reshape(rows, n_groups))
            start = stop
        return mats

    def join_scales(self, scales: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of split_scales: (n_scales, 1)."""
        if self.tying in ("model", "cluster"):
            return scales[0].reshape(1, 1)
        for scale, shape in zip(scales, self._scale_shapes()):
            if tuple(scale.shape) != shape:
                raise InputError("scale of a wrong shape", found=tuple(scale.shape), expected=shape)
        return torch.cat([scale.reshape(-1, 1) for scale in scales])

    def _scale_shapes(self) -> List[Tuple[int, int]]:
        return scale_shapes(self.shapes, self.tying, self.group_size)


def check_tying(tying: str, group_size: Optional[int]) -> None:
    """Raise InputError unless the tying is known and group_size goes with "group" alone."""
    if tying not in TYINGS:
        raise InputError("unknown scale tying", found=repr(tying), todo=near_matches(tying, TYINGS))
    if (tying == "group") != (group_size is not None) or (
        group_size is not None and group_size < 1
    ):
        raise InputError(
            "group_size goes with tying 'group' and with no other",
            found=f"tying {tying!r}, group_size {group_size!r}",
            expected="a number of columns of at least 1 with 'group', else None",
        )


def scale_shapes(
    shapes: Sequence[Tuple[int, int]], tying: str, group_size: Optional[int] = None
) -> List[Tuple[int, int]]:
    """Shape of the scale tensor of every (rows, cols) matrix.

    row: (rows, 1); group: (rows, ceil(cols / group_size)), the last group of a row may be
    short; cluster and model: (1, 1), the one scalar that all matrices share.
    """
    check_tying(tying, group_size)
    if tying == "row":
        return [(rows, 1) for rows, _ in shapes]
    if tying == "group":
        return [(rows, ceil(cols / group_size)) for rows, cols in shapes]
    return [(1, 1) for _ in shapes]


def spread(scales: torch.Tensor, cols: int, group_size: Optional[int] = None) -> torch.Tensor:
    """Scales of one matrix so that they multiply its (rows, cols) levels; no copy without groups.

    Args:
        scales: (1, 1), (rows, 1) or, with ``group_size``, (rows, ceil(cols / group_size)).
    """
    if group_size is None:
        return scales
    return scales.repeat_interleave(min(group_size, cols), dim=1)[:, :cols]


def to_blocks(
    mats: Sequence[torch.Tensor], tying: str, group_size: Optional[int] = None
) -> Blocks:
    """Arrange matrices (rows, cols) as blocks with one row per scale.

    Rows of each matrix have their own scales with "row" (the recurrent and the input part
    of an LSTM gate too: the papers' "node" would join them, own choice).

    Raises:
        InputError: unknown tying, group_size without "group" or the other way round,
            no matrix, or one that is not 2-D and non-empty.
    """
    check_tying(tying, group_size)
    for mat in mats:
        if mat.dim() != 2 or mat.numel() == 0:
            raise InputError(
                "not a weight matrix", found=tuple(mat.shape), expected="(rows, cols), not empty"
            )
    if not mats:
        raise InputError("no weight matrices to arrange", expected="at least one")
    shapes = tuple((int(mat.shape[0]), int(mat.shape[1])) for mat in mats)
    mats = [mat.detach().float() for mat in mats]
    if tying in ("model", "cluster"):
        flat = mats[0].reshape(1, -1)
        if len(mats) > 1:
            flat = torch.cat([mat.reshape(1, -1) for mat in mats], dim=1)
        return Blocks(flat, None, shapes, tying)
    pieces, masks = [], []
    width = max(cols if group_size is None else min(group_size, cols) for _, cols in shapes)
    for mat, (rows, cols) in zip(mats, shapes):
        size = cols if group_size is None else min(group_size, cols)
        n_groups = ceil(cols / size)
        used = torch.ones(1, cols, dtype=torch.bool, device=mat.device)
        padding = n_groups * size - cols
        # Pad the row to whole groups, then every group to the widest block.
        used = F.pad(F.pad(used, (0, padding)).reshape(n_groups, size), (0, width - size))
        masks.append(used.repeat(rows, 1))
        piece = mat if not padding else F.pad(mat, (0, padding))
        piece = piece.reshape(rows * n_groups, size)
        pieces.append(piece if size == width else F.pad(piece, (0, width - size)))
    values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    is_padded = any(not bool(mask.all()) for mask in masks)
    return Blocks(values, torch.cat(masks) if is_padded else None, shapes, tying, group_size)
