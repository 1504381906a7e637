"""Planner: from a model's harms to the Plan that fits a budget, and its measured joint harm."""

from __future__ import annotations

import math
from typing import Dict, Optional, Tuple

import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import InputError
from espnet_mpq.packed.size import least_header_n_bytes, packed_size
from espnet_mpq.plan import Plan, cluster_n_bytes
from espnet_mpq.planning.storage import Storage
from espnet_mpq.search import allocate
from espnet_mpq.sensitivity.kl import KlMeter
from espnet_mpq.sensitivity.table import Entry, SensitivityTable
from espnet_mpq.training.on_grid import project, stored_mats

Measured = Tuple[float, float]  # joint KL in nats per row, standard error


class Planner:
    """What can be planned for one model.

    Args:
        architecture: of the model.
        storage: of every plan made here.
        table: its sensitivity table, for this storage; None: uniform plans only.

    Attributes:
        table, storage, architecture: as given.
        harm: cluster -> bits -> predicted harm; None without a table.
        n_bytes: cluster -> bits -> bytes of its own tensors, for the bits of the table.
    """

    def __init__(
        self, architecture: Architecture, storage: Storage, table: Optional[SensitivityTable] = None
    ):
        self.architecture, self.storage, self.table = architecture, storage, table
        self.clusters = {cluster.name: cluster for cluster in architecture.clusters()}
        self.harm: Optional[Dict[str, Dict[int, float]]] = None
        self.n_bytes: Dict[str, Dict[int, int]] = {}
        if table is not None:
            harm = table.harm()
            self.harm = {name: harm[name] for name in self.clusters}
            self.n_bytes = {
                name: {
                    bits: cluster_n_bytes(cluster, storage.spec(bits), storage.scale_dtype)
                    for bits in table.entries[name]
                }
                for name, cluster in self.clusters.items()
            }

    def plan(self, bits: Dict[str, int]) -> Plan:
        """The plan that gives every cluster these bits."""
        specs = {name: self.storage.spec(b) for name, b in bits.items()}
        return Plan(specs, self.storage.scale_dtype)

    def uniform(self, bits: int) -> Plan:
        """The plan with the same bits everywhere."""
        return self.plan(dict.fromkeys(self.clusters, bits))

    def allocate(self, budget_n_bytes: int) -> Plan:
        """The exact optimum whose whole file fits the budget.

        The header is no exact sum over clusters (decimal places of offsets, padding), so choices
        are tried by rising harm under a lower bound of their size until one really fits.

        Raises:
            InputError: nothing fits; says the smallest possible budget.
        """
        n_bytes, fixed = self.least_n_bytes()
        for point in allocate.by_harm(self.harm, n_bytes, fixed, budget_n_bytes):
            plan = self.plan(point.choice)
            if packed_size(self.architecture, plan).n_bytes <= budget_n_bytes:
                return plan
        smallest = self.plan({name: min(row, key=row.get) for name, row in n_bytes.items()})
        least = packed_size(self.architecture, smallest)
        raise InputError(
            "the budget is too small for any plan",
            found=f"{budget_n_bytes} bytes = {8 * budget_n_bytes / least.n_weights:.4f}"
            " effective bits (whole file: header, float parameters and scales too)",
            expected=f"at least {least.n_bytes} bytes = {least.effective_bits:.4f}",
        )

    def least_n_bytes(self) -> Tuple[Dict[str, Dict[int, int]], int]:
        """(cluster -> bits -> bytes, fixed bytes); their sum is at most the true size of a file."""
        specs = {b: self.storage.spec(b) for row in self.n_bytes.values() for b in row}
        fixed, header = least_header_n_bytes(self.architecture, specs, self.storage.scale_dtype)
        rest = 4 * sum(math.prod(shape) for _, shape in self.architecture.rest())
        least = {
            name: {bits: n + header[name][bits] for bits, n in row.items()}
            for name, row in self.n_bytes.items()
        }
        return least, fixed + rest

    def predicted(self, plan: Plan) -> Optional[float]:
        """Sum of the clusters' harms, None where the table has no entry."""
        entries = self.entries(plan).values()
        return None if None in entries else math.fsum(entry.harm for entry in entries)

    def entries(self, plan: Plan) -> Dict[str, Optional[Entry]]:
        """Cluster -> entry of the table for its bits, None where there is none."""
        rows = {} if self.table is None else self.table.entries
        return {name: rows.get(name, {}).get(spec.bits) for name, spec in plan.clusters.items()}

    def repair(
        self,
        meter: KlMeter,
        plan: Plan,
        joint: Measured,
        budget_n_bytes: int,
        n_measurements: int,
    ) -> Tuple[Plan, Measured]:
        """Swaps of bits that lower the measured joint KL: the plan found, and its joint KL."""
        measured = {}

        def measure(bits: Dict[str, int]) -> float:
            candidate = self.plan(bits)
            if packed_size(self.architecture, candidate).n_bytes > budget_n_bytes:
                return math.inf
            key = tuple(sorted(bits.items()))
            measured[key] = joint_kl(meter, candidate)
            return measured[key][0]

        best, _ = allocate.repair(
            {name: spec.bits for name, spec in plan.clusters.items()},
            joint[0],
            self.harm,
            self.n_bytes,
            budget_n_bytes - packed_size(self.architecture, plan).fixed_n_bytes,
            measure,
            n_measurements,
        )
        return self.plan(best), measured.get(tuple(sorted(best.items())), joint)


@torch.no_grad()
def joint_kl(meter: KlMeter, plan: Plan) -> Measured:
    """With all clusters quantized at once, as a packed file holds them."""
    if meter.rounder is not None:
        rounded = meter.rounder.round_all(plan)
        return meter.measure(rounded.mats, rounded.biases)
    weights: ClusterWeights = meter.weights
    mats = {name: [m.float().cpu() for m in weights.mats(name)] for name in weights.clusters}
    return meter.measure(stored_mats(mats, project(mats, plan)))
