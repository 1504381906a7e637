"""Refines a plan by what is measured: never worse than uniform bits, and swaps that help."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Optional

from espnet_mpq.packed.size import packed_size
from espnet_mpq.plan import Plan
from espnet_mpq.planning.planner import Measured, Planner, joint_kl
from espnet_mpq.sensitivity.kl import KlMeter

LOG = logging.getLogger("espnet_mpq")


@dataclass(frozen=True)
class Refined:
    """What refining found.

    Attributes:
        plan, joint: the plan, and its joint KL (with its standard error).
        allocated: joint KL of the plan that the table's sums had preferred.
        uniform: joint KL of the most uniform bits that fit the budget, None if none do.
        uniform_bits: these bits.
    """

    plan: Plan
    joint: Measured
    allocated: Measured
    uniform: Optional[Measured] = None
    uniform_bits: Optional[int] = None


def refine(
    planner: Planner, meter: KlMeter, plan: Plan, budget_n_bytes: int, n_measurements: int
) -> Refined:
    """The best of the allocated plan, the largest uniform one that fits, and swaps of the better.

    Sums of clusters' harms say little where harms do not add up: then a uniform plan may be
    better than the sums' optimum. What is returned is no worse than either, as measured.

    Args:
        plan: of planner.allocate.
        n_measurements: of swaps, at most; 0: no swaps.

    Source: own.
    """
    allocated = joint = joint_kl(meter, plan)
    bits = largest_uniform(planner, budget_n_bytes)
    uniform = None
    if bits is not None:
        candidate = planner.uniform(bits)
        uniform = joint if candidate == plan else joint_kl(meter, candidate)
        if uniform[0] < joint[0]:
            LOG.info(
                "uniform %d bits: joint KL %.3g, below %.3g of the predicted optimum",
                *(bits, uniform[0], joint[0]),
            )
            plan, joint = candidate, uniform
    if n_measurements:
        plan, joint = planner.repair(meter, plan, joint, budget_n_bytes, n_measurements)
    return Refined(plan, joint, allocated, uniform, bits)


def largest_uniform(planner: Planner, budget_n_bytes: int) -> Optional[int]:
    """The most bits of the table that every cluster can have within the budget; None: none."""
    rows = planner.table.entries.values()
    shared = sorted(set.intersection(*(set(row) for row in rows)), reverse=True)
    for bits in shared:
        if packed_size(planner.architecture, planner.uniform(bits)).n_bytes <= budget_n_bytes:
            return bits
    return None
