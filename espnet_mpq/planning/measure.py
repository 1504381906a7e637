"""Fills a sensitivity table: KL entry by entry, Hessian and Fisher probe by probe."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Dict, Sequence, Tuple

from espnet_mpq.bin.options import progress
from espnet_mpq.errors import InputError

LOG = logging.getLogger("espnet_mpq")
KL_TOKENS = 4096  # of a batch
PROBE_TOKENS = 1024  # of a batch; each has a random vector of its own, so not too many
Pairs = Sequence[Tuple[str, int]]


def fill_kl(args, exp, clusters, text, table, output, specs: Dict[int, object], wanted: Pairs):
    """Measure the KL of the ``wanted`` (cluster, bits) that ``table`` lacks; kept one by one."""
    todo = [pair for pair in wanted if not table.has(*pair)]
    if len(todo) < len(wanted):
        LOG.info("%s: %d of %d entries are there", output, len(wanted) - len(todo), len(wanted))
    if not todo:
        table.write(output)
        return
    meter = make_meter(exp, clusters, text, args.method == "kl_printed", args.ngpu)
    LOG.info(
        "measuring on %d tokens of %d sentences, fp perplexity %.2f",
        *(meter.n_tokens, len(text), perplexity(meter.fp_nll_nats)),
    )
    for name, bits in progress(todo, len(todo), "sensitivity"):
        table.add(name, bits, meter.entry(name, specs[bits], table.provenance["scale_dtype"]))
        table.write(output)


def fill_curvature(
    args, exp, clusters, text, table, output, specs: Dict[int, object], wanted: Pairs
):
    """Probe until the traces are precise, kept probe by probe; then the ``wanted`` entries.

    With --n_jobs N, job J makes the probes J - 1, J - 1 + N, ... and stops when its own standard
    errors are sqrt(N) times what is asked: those of all jobs together are then as asked.
    """
    import torch

    from espnet_mpq.clusters import get_mats
    from espnet_mpq.quant.fake_quant import project_cluster
    from espnet_mpq.sensitivity.curvature import Curvature
    from espnet_mpq.sensitivity.hessian import METERS
    from espnet_mpq.sensitivity.kl import relative_mse

    n_jobs, job = args.n_jobs or 1, args.job or 1
    fresh = Curvature.of(exp.lm, clusters)
    if table.curvature is None:
        table.curvature = fresh
    table.curvature.check_same_lm(fresh, f"{output} and {exp.checkpoint}")
    curvature, precision = table.curvature, args.precision * math.sqrt(n_jobs)
    own = range(job - 1, args.max_probes, n_jobs)
    todo = [] if curvature.is_precise(precision) else [k for k in own if k not in curvature.samples]
    if todo:
        _use_gpu(exp, args.ngpu)
        meter = METERS[args.method](
            lambda inputs: exp.lm(inputs, None)[0],
            exp.lm,
            clusters,
            _batches(exp, text, PROBE_TOKENS),
            probe=args.probe,
            seed=args.seed,
        )
        LOG.info(
            "at most %d probes on %d tokens of %d sentences, %d are there",
            *(len(own), meter.n_tokens, len(text), len(curvature.samples)),
        )
        for probe in progress(todo, len(todo), "probes"):
            curvature.samples[probe] = meter.sample(probe)
            table.refresh()
            table.write(output)
            if curvature.is_precise(precision):
                break
    mats = {c.name: [m.float().cpu() for m in get_mats(exp.lm, c)] for c in clusters}
    dtype = getattr(torch, table.provenance["scale_dtype"])
    for name, bits in wanted:
        if not table.has(name, bits):
            values = project_cluster(mats[name], specs[bits], scale_dtype=dtype).values
            table.add_curvature_entry(name, bits, relative_mse(mats[name], values))
    table.write(output)
    report_curvature(table, args.precision if n_jobs == 1 else None)


def report_curvature(table, precision=None) -> None:
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
                f"{name} ({trace:.3g} +- {stderr:.2g}, "
                + _against_zero(trace, stderr)
                for name, trace, stderr in negative
            ),
        )


def _against_zero(trace: float, stderr: float) -> str:
    if stderr != stderr:
        return "one probe has no standard error)"
    return f"{'beyond' if trace < -2 * stderr else 'within'} twice its standard error)"


def make_meter(exp, clusters, text, printed_form: bool = False, ngpu: int = 0):
    """A KlMeter for the LM of ``exp`` on ``text``."""
    from espnet_mpq.hosts.espnet.lm.stages import find_stages
    from espnet_mpq.sensitivity.kl import KlMeter

    _use_gpu(exp, ngpu)
    return KlMeter(
        find_stages(exp.lm, clusters),
        exp.lm,
        clusters,
        _batches(exp, text, KL_TOKENS),
        printed_form=printed_form,
    )


def _batches(exp, text, max_batch_tokens: int):
    """Batches of like lengths: little padding."""
    from espnet_mpq.text import batches

    order = sorted(range(len(text)), key=lambda i: len(text.ids[i]))
    text = dataclasses.replace(text, ids=[text.ids[i] for i in order])
    return batches(text, exp.special_ids, batch_size=128, max_batch_tokens=max_batch_tokens)


def _use_gpu(exp, ngpu: int) -> None:
    import torch

    if ngpu:
        if not torch.cuda.is_available():
            raise InputError("--ngpu 1", found="no usable GPU", expected="--ngpu 0")
        exp.lm.to("cuda")


def perplexity(nll_nats: float) -> float:
    """exp, without overflow."""
    return math.exp(min(nll_nats, 700.0))
