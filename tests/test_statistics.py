"""A ratio of sums and its standard error, by hand."""

import math

import pytest

from espnet_mpq.statistics import ratio_of_sums


def test_ratio_of_sums():
    mean, stderr = ratio_of_sums([2.0, 4.0, 9.0], [1, 2, 3])
    assert mean == 2.5
    # residuals -0.5, -1, 1.5
    assert stderr == pytest.approx(math.sqrt(3.5 * 3 / 2) / 6)
    assert math.isnan(ratio_of_sums([1.0], [4])[1])
