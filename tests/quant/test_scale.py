"""Scale tying: which weights land in which block, and the way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_mpq.errors import InputError
from espnet_mpq.quant.scale import TYINGS, scale_shapes, spread, to_blocks

shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 13)), min_size=1, max_size=3)


def _mats(sizes):
    start, mats = 1, []
    for rows, cols in sizes:
        mats.append(torch.arange(start, start + rows * cols).float().reshape(rows, cols))
        start += rows * cols
    return mats


def test_group_of_columns_worked_out():
    blocks = to_blocks(_mats([(2, 5)]), "group", 2)
    assert blocks.values.tolist() == [[1, 2], [3, 4], [5, 0], [6, 7], [8, 9], [10, 0]]
    assert blocks.mask.tolist() == [[True, True], [True, True], [True, False]] * 2
    assert scale_shapes([(2, 5)], "group", 2) == [(2, 3)]
    assert blocks.split_scales(torch.arange(6.0)[:, None])[0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_rows_of_two_widths_are_padded():
    blocks = to_blocks(_mats([(1, 2), (2, 3)]), "row")
    assert blocks.values.tolist() == [[1, 2, 0], [3, 4, 5], [6, 7, 8]]
    assert blocks.mask.tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert [s.tolist() for s in blocks.split_scales(torch.tensor([[1.0], [2.0], [3.0]]))] == [
        [[1.0]],
        [[2.0], [3.0]],
    ]


def test_cluster_shares_one_scale_tensor():
    blocks = to_blocks(_mats([(1, 2), (2, 3)]), "cluster")
    assert blocks.values.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] and blocks.mask is None
    first, second = blocks.split_scales(torch.tensor([[0.5]]))
    assert first is second and first.shape == (1, 1)


@settings(deadline=None)
@given(shapes, st.sampled_from(TYINGS), st.integers(1, 20))
def test_split_is_the_inverse(sizes, tying, group_size):
    group_size = group_size if tying == "group" else None
    mats = _mats(sizes)
    blocks = to_blocks(mats, tying, group_size)
    back = blocks.split(blocks.values)
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(mats, back))
    n_weights = sum(rows * cols for rows, cols in sizes)
    n_used = blocks.values.numel() if blocks.mask is None else int(blocks.mask.sum())
    assert n_used == n_weights
    if blocks.mask is not None:  # padding is 0, weights (all positive here) are not
        assert torch.equal(blocks.values > 0, blocks.mask)
    scale = torch.rand(len(blocks.values), 1)
    parts = blocks.split_scales(scale)
    assert [tuple(part.shape) for part in parts] == scale_shapes(sizes, tying, group_size)
    assert torch.equal(blocks.join_scales(parts), scale)


@settings(deadline=None)
@given(shapes, st.sampled_from(("row", "group")), st.integers(1, 20))
def test_scale_of_a_block_is_the_scale_of_its_weights(sizes, tying, group_size):
    group_size = group_size if tying == "group" else None
    blocks = to_blocks(_mats(sizes), tying, group_size)
    scale = torch.arange(len(blocks.values)).float()[:, None]
    spread = blocks.split(scale.expand_as(blocks.values))
    for mat, part in zip(spread, blocks.split_scales(scale)):
        for r in range(mat.shape[0]):
            for c in range(mat.shape[1]):
                assert mat[r, c] == part[r, c // group_size if group_size else 0]


def test_refuses():
    mat = torch.ones(2, 2)
    with pytest.raises(InputError, match="did you mean 'row'"):
        to_blocks([mat], "rows")
    for tying, group_size in (("group", None), ("row", 4), ("group", 0)):
        with pytest.raises(InputError, match="group_size goes with"):
            to_blocks([mat], tying, group_size)
    with pytest.raises(InputError, match="at least one"):
        to_blocks([], "row")
    with pytest.raises(InputError, match="not a weight matrix"):
        to_blocks([torch.ones(3)], "row")
    with pytest.raises(InputError, match="wrong shape"):
        to_blocks([mat], "row").join_scales([torch.ones(1, 2)])


def test_spread_gives_every_column_its_scale():
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert spread(scales, 5, 2).tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert spread(scales[:, :1], 5).shape == (2, 1)
    wide = spread(scales[:, :1], 5, 2**31 - 1)  # a group wider than the matrix: no more memory
    assert wide.tolist() == [[1] * 5, [4] * 5]
