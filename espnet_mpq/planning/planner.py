"""Planner: one LM and its sensitivity table -> choices of bits, their sizes and harms."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

import torch

from espnet_mpq.clusters import find_clusters, get_mats, rest_parameters
from espnet_mpq.errors import InputError, MismatchError, PlanError, near_matches
from espnet_mpq.io import sha256_file, token_list_sha256
from espnet_mpq.packed.architecture import Architecture
from espnet_mpq.packed.metadata import header_n_bytes, least_header_n_bytes
from espnet_mpq.plan import ClusterSpec, Plan, PlanSize, cluster_n_bytes, plan_size
from espnet_mpq.search import allocate as search
from espnet_mpq.sensitivity.table import SensitivityTable
from espnet_mpq.training.on_grid import project, stored_mats

Choice = Mapping[str, int]


class Planner:
    """What can be planned for the LM of an experiment.

    Args:
        exp: an opened fp experiment.
        table: its sensitivity table, or None (uniform plans only); ``table_path`` names it.
        grid, tying, group_size: of the plan; None: as the table, else uniform and row.

    Raises:
        InputError: an LM that packed files cannot hold, MismatchError: a table of another LM.
    """

    def __init__(
        self,
        exp,
        table: Optional[SensitivityTable],
        table_path: Optional[str] = None,
        grid: Optional[str] = None,
        tying: Optional[str] = None,
        group_size: Optional[int] = None,
    ):
        self.exp, self.table = exp, table
        self.clusters = find_clusters(exp.lm)
        self.rest = rest_parameters(exp.lm, self.clusters)
        self.architecture = Architecture.from_lm_conf(
            exp.args.lm_conf, len(exp.token_list), exp.args.lm
        )
        fixed = {"grid": grid, "tying": tying, "group_size": group_size}
        self.scale_dtype = Plan.scale_dtype
        if table is not None:
            fixed = self._of_table(fixed, table_path or "the sensitivity table")
            self.scale_dtype = table.provenance.get("scale_dtype") or self.scale_dtype
        self.grid, self.tying = fixed["grid"] or "uniform", fixed["tying"] or "row"
        self.group_size = fixed["group_size"]
        self.n_weights = plan_size(self.plan(self.uniform(32)), self.clusters, self.rest).n_weights

    def _of_table(self, fixed: dict, path: str) -> dict:
        record = self.table.provenance
        exp = self.exp
        pairs = [
            ("token_list_sha256", token_list_sha256(exp.token_list)),
            ("checkpoint_sha256", sha256_file(exp.checkpoint)),
        ]
        pairs += [(k, v) for k, v in fixed.items() if v is not None]
        again = f"mpq sensitivity --lm_exp {Path(exp.config).parent} ... --output {path}"
        for key, here in pairs:
            if record.get(key) != here:
                raise MismatchError(
                    f"{path} and {exp.checkpoint} do not belong together: {key}",
                    found=repr(record.get(key)),
                    expected=repr(here),
                    todo=f"make the table of this LM: {again}",
                )
        known = [cluster.name for cluster in self.clusters]
        for name in self.table.entries:
            if name not in known:
                raise PlanError(
                    f"{path}: unknown cluster", found=repr(name), todo=near_matches(name, known)
                )
        missing = [name for name in known if name not in self.table.entries]
        missing += [f"{c} at {b} bits" for c, b in self.table.missing(known, self._bits(record))]
        if missing:
            raise InputError(
                f"{path} is not complete",
                found="no " + ", ".join(missing[:4]),
                todo="run mpq sensitivity again, it goes on where it stopped (or --merge the jobs)",
            )
        for name, row in self.table.entries.items():
            for bits in row:
                ClusterSpec(bits).check(f"{name} of {path}")
        return {k: record.get(k) for k in fixed}

    def _bits(self, record: dict) -> List[int]:
        return record.get("bits") or sorted({b for row in self.table.entries.values() for b in row})

    def _spec(self, bits: int) -> ClusterSpec:
        return ClusterSpec(bits, self.grid, self.tying, self.group_size)

    def plan(self, choice: Choice, provenance: Optional[dict] = None) -> Plan:
        clusters = {name: self._spec(bits) for name, bits in choice.items()}
        return Plan(clusters, self.scale_dtype, provenance or {})

    def uniform(self, bits: int) -> Dict[str, int]:
        return {cluster.name: bits for cluster in self.clusters}

    def header_n_bytes(self, choice: Choice) -> int:
        return header_n_bytes(self.architecture, self.plan(choice))

    def size(self, choice: Choice) -> PlanSize:
        """Of the whole packed file."""
        header = self.header_n_bytes(choice)
        return plan_size(self.plan(choice), self.clusters, self.rest, header)

    def cluster_n_bytes(self) -> Dict[str, Dict[int, int]]:
        """Cluster -> bits -> bytes of its tensors, for the bits of the table."""
        return {
            cluster.name: {
                bits: cluster_n_bytes(cluster, self._spec(bits), self.scale_dtype)
                for bits in self.table.entries[cluster.name]
            }
            for cluster in self.clusters
        }

    def _harm(self) -> Dict[str, Dict[int, float]]:
        harm = self.table.harm()
        return {cluster.name: harm[cluster.name] for cluster in self.clusters}

    def fixed_n_bytes(self, choice: Choice) -> int:
        """What is stored besides the clusters' own tensors: header, float rest, a shared scale."""
        own = sum(
            cluster_n_bytes(c, self._spec(choice[c.name]), self.scale_dtype) for c in self.clusters
        )
        return self.size(choice).n_bytes - own

    def allocate(self, budget_n_bytes: int) -> search.Point:
        """The exact optimum whose whole file fits the budget.

        The header is no exact sum over clusters (decimal places of offsets, padding), so choices
        are tried by rising harm under a lower bound of their size until one really fits.

        Raises:
            InputError: nothing fits; says the smallest possible budget.
        """
        n_bytes, fixed = self.least_n_bytes()
        harm = self._harm()
        for point in search.by_harm(harm, n_bytes, fixed, budget_n_bytes):
            true = self.size(point.choice).n_bytes
            if true <= budget_n_bytes:
                return dataclasses.replace(point, n_bytes=true)
        smallest = {name: min(row, key=row.get) for name, row in n_bytes.items()}
        least = self.size(smallest)
        raise InputError(
            "the budget is too small for any plan",
            found=f"{budget_n_bytes} bytes = {8 * budget_n_bytes / self.n_weights:.4f}"
            " effective bits (whole file: header, float parameters and scales too)",
            expected=f"at least {least.n_bytes} bytes = {least.effective_bits:.4f}",
        )

    def least_n_bytes(self) -> Tuple[Dict[str, Dict[int, int]], int]:
        """(cluster -> bits -> bytes, fixed bytes); their sum is at most the true size of a file."""
        own = self.cluster_n_bytes()
        spec_of = {bits: self._spec(bits) for row in own.values() for bits in row}
        fixed, header = least_header_n_bytes(self.architecture, spec_of, self.scale_dtype)
        rest = 4 * sum(math.prod(shape) for _, shape in self.rest)
        least = {
            name: {bits: n + header[name][bits] for bits, n in row.items()}
            for name, row in own.items()
        }
        return least, fixed + rest

    def predicted(self, choice: Choice) -> Optional[float]:
        """Sum of the clusters' harms, None where the table has no entry."""
        harms = [self._entry(name, bits) for name, bits in choice.items()]
        return None if None in harms else math.fsum(e.harm for e in harms)

    def _entry(self, name: str, bits: int):
        return self.table.entries[name].get(bits) if self.table is not None else None

    @torch.no_grad()
    def joint(self, meter, choice: Choice) -> Tuple[float, float]:
        """(KL, standard error) with all clusters quantized at once, as a packed file holds them."""
        plan = self.plan(choice)
        mats = {c.name: [m.float().cpu() for m in get_mats(self.exp.lm, c)] for c in self.clusters}
        return meter.measure(stored_mats(mats, project(mats, plan)))

    def repair(self, meter, choice: Choice, joint, budget_n_bytes: int, n_measurements: int):
        """Swaps that lower the measured joint KL; (choice, (KL, standard error))."""
        measured = {}

        def measure(candidate):
            if self.size(candidate).n_bytes > budget_n_bytes:
                return math.inf
            key = tuple(sorted(candidate.items()))
            measured[key] = self.joint(meter, candidate)
            return measured[key][0]

        best, value = search.repair(
            choice,
            joint[0],
            self._harm(),
            self.cluster_n_bytes(),
            budget_n_bytes - self.fixed_n_bytes(choice),
            measure,
            n_measurements,
        )
        return best, measured.get(tuple(sorted(best.items())), joint)

    def summary(self, choice: Choice, joint=None) -> dict:
        """Rows per cluster and totals, JSON-ready (no nan)."""
        size = self.size(choice)
        rows = []
        for cluster in self.clusters:
            bits = choice[cluster.name]
            entry = self._entry(cluster.name, bits)
            rows.append(
                {
                    "cluster": cluster.name,
                    "bits": bits,
                    "n_weights": cluster.n_weights,
                    "n_bytes": cluster_n_bytes(cluster, self._spec(bits), self.scale_dtype),
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
            "header_n_bytes": self.header_n_bytes(choice),
            "float_n_bytes": 4 * sum(math.prod(shape) for _, shape in self.rest),
            "method": self.table.method if self.table is not None else None,
            "unit": self.table.unit if self.table is not None else "nats/token",
            "predicted": self.predicted(choice),
            # Upper bound: the entries share their sentences, so their errors are not independent.
            "predicted_stderr": None if None in stderrs else sum(stderrs),
            "joint_kl": joint[0] if joint else None,
            "joint_kl_stderr": _finite(joint[1]) if joint else None,
        }

    def pareto(self, summary: dict, provenance: dict) -> dict:
        """The whole exact front as JSON; sizes with the header of the chosen plan."""
        chosen = {row["cluster"]: row["bits"] for row in summary["rows"]}
        points = search.pareto_front(
            self._harm(), self.cluster_n_bytes(), self.fixed_n_bytes(chosen)
        )
        return {
            "format": "espnet_mpq.pareto",
            "version": 1,
            "unit": "nats/token",
            "clusters": list(points[0].choice),
            "points": [
                {
                    "n_bytes": p.n_bytes,
                    "effective_bits": 8 * p.n_bytes / self.n_weights,
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
                "bits": list(chosen.values()),
            },
            "provenance": provenance,
        }


def _finite(value: float) -> Optional[float]:
    return value if math.isfinite(value) else None
