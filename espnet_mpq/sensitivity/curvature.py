"""Curvature: samples of the trace of each cluster's Hessian block, and the harms they stand for."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Dict, Iterable, List, Mapping, Tuple

from espnet_mpq.errors import MismatchError
from espnet_mpq.fields import AGAIN, is_count, is_integer, is_list, is_number, need

if TYPE_CHECKING:  # clusters needs torch, which reading a table does not
    from espnet_mpq.clusters import ClusterWeights

MIN_PROBES = 4  # fewer do not tell their own spread
# A cluster with less than this share of all harm needs no relative precision of its own.
SMALL_SHARE = 0.01


@dataclasses.dataclass
class Curvature:
    """What Hutchinson probes have found so far.

    Attributes:
        n_weights: cluster -> number of weights d.
        squared_norm: cluster -> ||W||^2 of the fp weights.
        samples: probe number -> cluster -> one unbiased sample of Tr(H_cluster), nats/token.

    The standard errors are those over probes. They do not cover the choice of the text: the
    trace is that of the loss on the sentences given.
    """

    n_weights: Dict[str, int]
    squared_norm: Dict[str, float]
    samples: Dict[int, Dict[str, float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, weights: "ClusterWeights") -> "Curvature":
        """Of all clusters of a model, without samples yet."""

        def squared_norm(name: str) -> float:
            return sum(float(m.double().square().sum()) for m in weights.mats(name))

        return cls(
            {name: cluster.n_weights for name, cluster in weights.clusters.items()},
            {name: squared_norm(name) for name in weights.clusters},
        )

    def trace(self, cluster: str) -> Tuple[float, float]:
        """(mean, standard error over probes); the error is nan for a single probe.

        Source: Hutchinson 1990; Xu et al. 2021 (TASLP, arXiv 2112.11438), section V.
        """
        values = [self.samples[probe][cluster] for probe in sorted(self.samples)]
        if not values:
            return math.nan, math.nan
        mean = math.fsum(values) / len(values)
        if len(values) < 2:
            return mean, math.nan
        variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
        return mean, math.sqrt(variance / len(values))

    def harm(self, cluster: str, relative_mse: float, average: bool = True) -> Tuple[float, float]:
        """(harm, standard error) of a cluster whose weights move by ||Q - W||^2 =
        ``relative_mse`` ||W||^2.

        average: 1/2 (Tr H / d) ||Q - W||^2, the second-order change of the loss for a move in a
        random direction, in nats/token (HAWQ-V2, Dong et al. 2020, without the 1/2; the
        average trace also in Xu et al., ICASSP 2021, arXiv 2112.11540). Otherwise the plain form
        as printed in Xu et al. 2021 (arXiv 2112.11438), Tr(H) ||Q - W||^2: no unit, and it weighs
        clusters by their size. A negative trace gives harm 0.
        """
        trace, stderr = self.trace(cluster)
        square = relative_mse * self.squared_norm[cluster]
        factor = 0.5 * square / self.n_weights[cluster] if average else square
        return max(0.0, factor * trace), factor * stderr

    def is_precise(self, precision: float, min_probes: int = MIN_PROBES) -> bool:
        """Whether the relative standard error of every trace that matters is ``precision`` or less.

        Judged by what removing each cluster would cost, (Tr H / d) ||W||^2, so that bits play no
        part; clusters with less than 1 % of the sum of all need 1 % of it times ``precision``.
        """
        if len(self.samples) < max(2, min_probes):
            return False
        rows = []
        for name, d in self.n_weights.items():
            factor = self.squared_norm[name] / d
            rows.append([abs(factor * value) for value in self.trace(name)])
        least = SMALL_SHARE * sum(harm for harm, _ in rows)
        return all(stderr <= precision * max(harm, least) for harm, stderr in rows)

    def negative(self) -> List[Tuple[str, float, float]]:
        """(cluster, trace, standard error) where the trace is below zero."""
        found = [(name, *self.trace(name)) for name in self.n_weights]
        return [row for row in found if row[1] < 0]

    def check_same_model(self, other: "Curvature", what: str) -> None:
        """Raise MismatchError unless sizes and norms of all clusters are those of ``other``."""
        for name in {**self.n_weights, **other.n_weights}:
            mine, theirs = (
                (c.n_weights.get(name, 0), c.squared_norm.get(name, 0.0)) for c in (self, other)
            )
            # The same weights; the order of a sum may differ.
            if mine[0] != theirs[0] or not math.isclose(mine[1], theirs[1], rel_tol=1e-6):
                raise MismatchError(
                    f"traces of different LMs, {what}: cluster {name}",
                    found="%d weights, squared norm %g" % mine,
                    expected="%d, %g" % theirs,
                    todo=AGAIN,
                )

    def to_dict(self) -> dict:
        """JSON form; the traces are there for readers and computed again when it is read."""
        probes = sorted(self.samples)
        clusters = {}
        for name, d in self.n_weights.items():
            trace, stderr = self.trace(name)
            clusters[name] = {
                "n_weights": d,
                "squared_norm": self.squared_norm[name],
                "trace": trace if math.isfinite(trace) else None,
                "stderr": stderr if math.isfinite(stderr) else None,
                "samples": [self.samples[probe][name] for probe in probes],
            }
        return {"probes": probes, "clusters": clusters}

    @classmethod
    def from_dict(cls, value: Mapping, where: str) -> "Curvature":
        """Read the JSON form; raises FormatError, which names the file ``where``."""
        is_right = isinstance(value, Mapping) and {"probes", "clusters"} <= set(value)
        need(is_right, where, "curvature", value, "probes and clusters")
        probes, rows = value["probes"], value["clusters"]
        is_right = is_list(is_count)(probes) and len(set(probes)) == len(probes)
        need(is_right, where, "list of probes", probes, "the numbers of probes, each once")
        need(isinstance(rows, Mapping), where, "curvature of clusters", rows, "an object")
        for name, row in rows.items():
            keys = ("n_weights", "squared_norm", "samples")
            is_right = isinstance(row, Mapping) and all(key in row for key in keys)
            need(is_right, where, f"curvature of {name}", row, ", ".join(keys))
            n_weights, square, samples = (row[key] for key in keys)
            is_right = is_integer(n_weights) and 1 <= n_weights < 2**63
            need(is_right, where, f"n_weights of {name}", n_weights, "an integer, at least 1")
            is_right = is_number(square) and square >= 0
            need(is_right, where, f"squared_norm of {name}", square, "a number of at least 0")
            is_right = is_list(is_number)(samples) and len(samples) == len(probes)
            need(is_right, where, f"list of samples of {name}", samples, f"{len(probes)} numbers")
        return cls(
            {name: row["n_weights"] for name, row in rows.items()},
            {name: float(row["squared_norm"]) for name, row in rows.items()},
            {
                probe: {name: float(row["samples"][k]) for name, row in rows.items()}
                for k, probe in enumerate(probes)
            },
        )

    @classmethod
    def pool(cls, parts: Iterable["Curvature"]) -> "Curvature":
        """The samples of several jobs together; a probe that two of them have counts once."""
        parts = list(parts)
        pooled = cls(dict(parts[0].n_weights), dict(parts[0].squared_norm))
        for part in parts:
            part.check_same_model(pooled, "a shard and the first one")
            pooled.samples.update(part.samples)
        return pooled
