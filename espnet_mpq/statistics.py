"""Statistics of samples: a ratio of sums with its standard error."""

from __future__ import annotations

import math
from typing import Sequence, Tuple


def ratio_of_sums(sums: Sequence[float], counts: Sequence[int]) -> Tuple[float, float]:
    """sum(sums) / sum(counts) and its standard error over the pairs (nan for one pair).

    The linearised standard error of a ratio of sums over clusters, such as sentences, whose
    members are not independent: Cochran, Sampling Techniques, eq. 6.13, without the finite
    population factor.
    """
    n, total = len(sums), sum(counts)
    mean = math.fsum(sums) / total
    if n < 2:
        return mean, math.nan
    square = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts))
    return mean, math.sqrt(square * n / (n - 1)) / total
