"""What a plan costs and how much harm it does, as JSON: the chosen plan, and the whole front."""

from __future__ import annotations

import math
from typing import Optional

from espnet_mpq.packed.size import packed_size
from espnet_mpq.plan import Plan
from espnet_mpq.planning.planner import Measured, Planner
from espnet_mpq.planning.refine import Refined
from espnet_mpq.search.allocate import pareto_front
from espnet_mpq.sensitivity.provenance import UNITS


def summarize(
    planner: Planner,
    plan: Plan,
    joint: Optional[Measured] = None,
    refined: Optional[Refined] = None,
    unit: str = UNITS[0],
) -> dict:
    """Rows per cluster and totals, JSON-ready (no nan).

    Args:
        refined: how the plan was found.
        unit: of the joint KL; harms have that of the table.
    """
    architecture, table = planner.architecture, planner.table
    size = packed_size(architecture, plan)
    rows = []
    for name, entry in planner.entries(plan).items():
        rows.append(
            {
                "cluster": name,
                "bits": plan.clusters[name].bits,
                "n_weights": planner.clusters[name].n_weights,
                "n_bytes": size.clusters[name],
                "harm": entry.harm if entry else None,
                "stderr": _finite(entry.stderr) if entry else None,
            }
        )
    stderrs = [row["stderr"] for row in rows]
    return {
        "rows": rows,
        "n_bytes": size.n_bytes,
        "n_weights": size.n_weights,
        "effective_bits": size.effective_bits,
        "fp_n_bytes": 4 * size.n_weights,
        "ratio": 4 * size.n_weights / size.n_bytes,
        "header_n_bytes": size.header_n_bytes,
        "float_n_bytes": 4 * sum(math.prod(shape) for _, shape in architecture.rest()),
        "method": table.method if table is not None else None,
        "unit": table.unit if table is not None else unit,
        "predicted": planner.predicted(plan),
        # Upper bound: the entries share their sentences, so their errors are not independent.
        "predicted_stderr": None if None in stderrs else sum(stderrs),
        "joint_kl": joint[0] if joint else None,
        "joint_kl_stderr": _finite(joint[1]) if joint else None,
        "allocated_joint_kl": refined.allocated[0] if refined else None,
        "uniform_joint_kl": refined.uniform[0] if refined and refined.uniform else None,
        "uniform_bits": refined.uniform_bits if refined else None,
    }


def front(planner: Planner, summary: dict, provenance: dict) -> dict:
    """The whole exact Pareto front as JSON; sizes with the header of the plan summarized."""
    chosen = {row["cluster"]: row["bits"] for row in summary["rows"]}
    fixed = summary["n_bytes"] - sum(row["n_bytes"] for row in summary["rows"])
    points = pareto_front(planner.harm, planner.n_bytes, fixed)
    return {
        "format": "espnet_mpq.pareto",
        "version": 1,
        "unit": summary["unit"],
        "clusters": list(points[0].choice),
        "points": [
            {
                "n_bytes": p.n_bytes,
                "effective_bits": 8 * p.n_bytes / summary["n_weights"],
                "harm": p.harm,
                "bits": list(p.choice.values()),
            }
            for p in points
        ],
        "chosen": {
            "n_bytes": summary["n_bytes"],
            "effective_bits": summary["effective_bits"],
            "harm": summary["predicted"],
            "joint_kl": summary["joint_kl"],
            "joint_kl_stderr": summary["joint_kl_stderr"],
            "bits": [chosen[name] for name in points[0].choice],
        },
        "provenance": provenance,
    }


def _finite(value: float) -> Optional[float]:
    return value if math.isfinite(value) else None
