"""Fills a sensitivity table: KL entry by entry, Hessian and Fisher probe by probe."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Mapping, Optional, Sequence, Tuple, Union

from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.progress import progress
from espnet_mpq.quant.distortion import relative_error
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.quant.scale import SCALE_DTYPES
from espnet_mpq.quant.spec import ClusterSpec
from espnet_mpq.rounding.model import Rounder
from espnet_mpq.sensitivity.curvature import Curvature
from espnet_mpq.sensitivity.hessian import METERS
from espnet_mpq.sensitivity.judged import Judged
from espnet_mpq.sensitivity.kl import KlMeter
from espnet_mpq.sensitivity.table import SensitivityTable

LOG = logging.getLogger("espnet_mpq")
KL_TOKENS = 4096  # of a batch
PROBE_TOKENS = 1024  # of a batch; each has a random vector of its own, so not too many
Judge = Callable[[int], Judged]  # tokens of a batch -> what is measured on; made when needed


@dataclass(frozen=True)
class Wanted:
    """What a table is to hold.

    Attributes:
        specs: bits -> how a cluster is stored at these bits.
        pairs: (cluster, bits), the share of this job.
    """

    specs: Mapping[int, ClusterSpec]
    pairs: Sequence[Tuple[str, int]]


@dataclass(frozen=True)
class Probing:
    """How curvature is probed.

    Attributes:
        probe, seed: as sensitivity.hessian.TraceMeter.
        precision: relative standard error to stop at.
        max_probes: of all jobs together.
        job, n_jobs: job J of N makes the probes J - 1, J - 1 + N, ... and stops when its own
            standard errors are sqrt(N) times what is asked: those of all jobs together are then
            as asked.
    """

    probe: str
    seed: int
    precision: float
    max_probes: int
    job: int = 1
    n_jobs: int = 1


def fill_kl(
    table: SensitivityTable,
    output: Union[str, Path],
    judge: Judge,
    weights: ClusterWeights,
    wanted: Wanted,
    make_rounder: Callable[[], Optional[Rounder]] = lambda: None,
) -> None:
    """Measure the KL of the wanted entries that ``table`` lacks; kept one by one.

    ``make_rounder``: called when there is something to measure; see KlMeter.
    """
    todo = [pair for pair in wanted.pairs if not table.has(*pair)]
    if len(todo) < len(wanted.pairs):
        n_there = len(wanted.pairs) - len(todo)
        LOG.info("%s: %d of %d entries are there", output, n_there, len(wanted.pairs))
    if not todo:
        table.write(output)
        return
    judged = judge(KL_TOKENS)
    is_printed = table.method == "kl_printed"
    meter = KlMeter(judged, weights, printed_form=is_printed, rounder=make_rounder())
    what = f"measuring on {_amount(judged)}"
    if judged.has_targets:
        what += f", fp perplexity {math.exp(min(meter.fp_nll_nats, 700.0)):.2f}"
    LOG.info("%s", what)
    for name, bits in progress(todo, len(todo), "sensitivity"):
        scale_dtype = table.provenance["scale_dtype"]
        table.add(name, bits, meter.entry(name, wanted.specs[bits], scale_dtype))
        table.write(output)


def fill_curvature(
    table: SensitivityTable,
    output: Union[str, Path],
    judge: Judge,
    weights: ClusterWeights,
    wanted: Wanted,
    probing: Probing,
) -> None:
    """Probe until the traces are precise, kept probe by probe; then the wanted entries.

    Raises:
        MismatchError: the table has traces of another model.
    """
    fresh = Curvature.of(weights)
    if table.curvature is None:
        table.curvature = fresh
    table.curvature.check_same_model(fresh, f"{output} and the checkpoint")
    curvature, precision = table.curvature, probing.precision * math.sqrt(probing.n_jobs)
    own = range(probing.job - 1, probing.max_probes, probing.n_jobs)
    todo = [] if curvature.is_precise(precision) else [k for k in own if k not in curvature.samples]
    if todo:
        judged = judge(PROBE_TOKENS)
        meter = METERS[table.method](judged, weights, probe=probing.probe, seed=probing.seed)
        LOG.info(
            "at most %d probes on %s, %d are there",
            *(len(own), _amount(judged), len(curvature.samples)),
        )
        for probe in progress(todo, len(todo), "probes"):
            curvature.samples[probe] = meter.sample(probe)
            table.refresh()
            table.write(output)
            if curvature.is_precise(precision):
                break
    dtype = SCALE_DTYPES[table.provenance["scale_dtype"]]
    for name, bits in wanted.pairs:
        if not table.has(name, bits):
            mats = [m.float().cpu() for m in weights.mats(name)]
            values = project_cluster(mats, wanted.specs[bits], scale_dtype=dtype).values
            table.add_curvature_entry(name, bits, relative_error(mats, values))
    table.write(output)
    report_curvature(table, probing.precision if probing.n_jobs == 1 else None)


def _amount(judged: Judged) -> str:
    """ "9876 tokens of 543 sentences"."""
    return f"{judged.n_rows:.0f} {judged.unit.split('/')[-1]}s of {judged.n_sentences} sentences"


def report_curvature(table: SensitivityTable, precision: Optional[float] = None) -> None:
    """Log the traces; warn about negative ones, and where --max_probes ended the search."""
    curvature = table.curvature
    for name in curvature.n_weights:
        trace, stderr = curvature.trace(name)
        LOG.info("%s: trace %.4g +- %.2g (%d probes)", name, trace, stderr, len(curvature.samples))
    if precision is not None and not curvature.is_precise(precision):
        LOG.warning(
            "%d probes did not reach a relative standard error of %g for every cluster that "
            "matters: raise --max_probes (the probes made are kept)",
            *(len(curvature.samples), precision),
        )
    negative = curvature.negative()
    if negative:
        LOG.warning(
            "the trace is negative for %s: harm 0 there, so these clusters get the fewest bits; "
            "use --method fisher, whose trace is never negative",
            ", ".join(
                f"{name} ({trace:.3g} +- {stderr:.2g}, " + _against_zero(trace, stderr)
                for name, trace, stderr in negative
            ),
        )


def _against_zero(trace: float, stderr: float) -> str:
    if stderr != stderr:
        return "one probe has no standard error)"
    return f"{'beyond' if trace < -2 * stderr else 'within'} twice its standard error)"
