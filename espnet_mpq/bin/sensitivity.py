"""mpq sensitivity: the harm of every cluster at every bit-width, kept after each measurement."""

from __future__ import annotations

import argparse

from espnet_mpq.bin.material import (
    add_exp_arguments,
    add_material_arguments,
    check_amounts,
    open_material,
)
from espnet_mpq.bin.options import check_group, provenance
from espnet_mpq.bin.rounding import (
    add_rounding_arguments,
    check_rounding_tokens,
    make_rounder,
)
from espnet_mpq.errors import InputError

METHODS = ("kl", "kl_printed", "hessian", "fisher")
EXAMPLE = """example:
  mpq sensitivity --lm_exp exp/lm_train_lstm --text data/lm_train.txt --output sensitivity.json
  mpq sensitivity --asr_exp exp/asr_train --data dump/raw/dev --output sensitivity.json
as jobs of a recipe (JOB from 1 to 8, then once with --merge):
  mpq sensitivity --lm_exp exp/lm --text dump/raw/lm_train.txt --output s.json --job JOB --n_jobs 8
  mpq sensitivity --output s.json --merge 8
An interrupted run goes on where it stopped when it is started again. Jobs share the entries (kl) or
the probes (hessian, fisher).
methods:
  kl          KL(fp || quantized) per token, one cluster quantized: the measured harm itself; of
              a recogniser per frame, its CTC and its decoder weighed as its own loss weighs them
  kl_printed  the paper's printed sum over observed words only (noisy, may be negative)
  hessian     1/2 (trace / weights) ||Q - W||^2 with the trace of the Hessian of the loss
  fisher      the same with the Fisher (Gauss-Newton) matrix, whose trace is never negative; faster
"""
CHOSEN_BITS = (1, 2, 3, 4, 8, 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mpq sensitivity`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add_exp_arguments(parser)
    add_material_arguments(parser)
    add("--output", required=True, metavar="FILE.json", help="the sensitivity table")
    add("--bits", type=int, nargs="+", choices=CHOSEN_BITS, default=[1, 2, 4, 8])
    add_grid_arguments(parser)
    add_rounding_arguments(parser, "nearest")
    add("--method", choices=METHODS, default="kl", help="measure of harm, see below")
    add("--seed", type=int, default=0, help="of the sample of sentences and of the probes")
    add(
        "--probe",
        choices=("rademacher", "gaussian"),
        default="rademacher",
        help="random vectors (hessian, fisher)",
    )
    add(
        "--trace",
        choices=("average", "plain"),
        default="average",
        help="average: per weight; plain: as printed in the paper (hessian, fisher)",
    )
    add(
        "--precision",
        type=float,
        default=0.1,
        help="stop probing when the relative standard error of every trace that matters is this"
        " (default: %(default)s; it covers the probes, not the choice of the text)",
    )
    add("--max_probes", type=int, default=50, help="at most so many (default: %(default)s)")
    add("--ngpu", type=int, choices=(0, 1), default=0, help="1: measure on the GPU")
    add("--job", type=int, help="number of this job, from 1: writes FILE.JOB.json")
    add("--n_jobs", type=int, help="number of jobs")
    add("--merge", type=int, metavar="N", help="only gather FILE.1.json .. FILE.N.json")
    add("--printed_form", action="store_true", help="another name of --method kl_printed")


def add_grid_arguments(parser: argparse.ArgumentParser, default: bool = True) -> None:
    """--grid, --tying, --group_size; ``default=False`` leaves None for "as the table"."""
    add = parser.add_argument
    add("--grid", choices=("uniform", "paper"), default="uniform" if default else None)
    add(
        "--tying",
        choices=("row", "group", "cluster", "model"),
        default="row" if default else None,
        help="what shares one scale",
    )
    add("--group_size", type=int, help="columns per scale, for --tying group")


def main(args: argparse.Namespace) -> int:
    """Measure what is missing, or merge shards; prints where the table is."""
    from espnet_mpq.lock import locked
    from espnet_mpq.sensitivity import table as tables

    if args.merge is not None:
        from espnet_mpq.planning.measure import report_curvature

        merged = tables.merge(args.output, args.merge)
        merged.write(args.output)
        if merged.curvature is not None:
            report_curvature(merged)
        print(f"{args.output}: {sum(map(len, merged.entries.values()))} entries")
        return 0
    if args.exp is None:
        raise InputError("--lm_exp is missing", todo="or --asr_exp; see mpq sensitivity --help")
    if args.text is None and args.data is None:
        raise InputError("--text is missing", todo="or --data for a recogniser; see --help")
    output = args.output
    tables.select_shard([], args.job, args.n_jobs)
    if args.job is not None:
        output = tables.shard_path(args.output, args.job)
    with locked(output):
        table = measure_table(args, output)
    print(f"{output}: {sum(map(len, table.entries.values()))} entries")
    return 0


def measure_table(args: argparse.Namespace, output):
    """Fill the table at ``output`` (only what is missing) and return it.

    Raises:
        InputError, MismatchError: as the readers, or the file is of another measurement.
    """
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp
    from espnet_mpq.planning.measure import Probing, Wanted, fill_curvature, fill_kl
    from espnet_mpq.planning.storage import Storage
    from espnet_mpq.sensitivity import table as tables

    if args.printed_form:
        if args.method not in ("kl", "kl_printed"):
            raise InputError("--printed_form is a form of the KL", found=f"--method {args.method}")
        args.method = "kl_printed"
    check_amounts(args)
    if args.max_probes < 1:
        raise InputError("--max_probes", found=args.max_probes, expected="at least 1")
    if not args.precision >= 0:
        raise InputError("--precision", found=args.precision, expected="at least 0")
    if args.rounding == "second_order" and args.method in tables.CURVATURE:
        raise InputError(
            "second_order rounding is judged by what it does to the outputs",
            found=f"--method {args.method}",
            expected="--method kl",
        )
    check_rounding_tokens(args.rounding_tokens)
    check_group(args)
    bits = sorted(set(args.bits))
    storage = Storage(args.grid, args.tying, args.group_size)
    specs = {b: storage.spec(b) for b in bits}
    for spec in specs.values():
        spec.check("(all)")
    exp = load_fp(args.exp, args.file)
    material = open_material(exp, args, args.seed)
    weights = exp.weights
    files = {"config": exp.config, "checkpoint": exp.checkpoint, "text": args.text}
    record = provenance(args, files)
    record.update(
        exp.identity,
        **material.record(),
        seed=args.seed,
        grid=args.grid,
        tying=args.tying,
        group_size=args.group_size,
        scale_dtype=storage.scale_dtype,
        clusters=list(weights.clusters),
        bits=bits,
    )
    record["inputs"].update(material.inputs())
    if args.rounding != "nearest":
        record.update(rounding=args.rounding, rounding_tokens=args.rounding_tokens)
    if args.method in tables.CURVATURE:
        record.update(probe=args.probe, trace=args.trace)
    table = tables.open_table(output, record, args.method)
    pairs = [(name, b) for name in weights.clusters for b in bits]
    wanted = Wanted(specs, tables.select_shard(pairs, args.job, args.n_jobs))

    def judge(max_batch_rows: int):
        exp.use_gpu(args.ngpu)
        return material.judge(max_batch_rows)

    if args.method in tables.CURVATURE:
        jobs = args.job or 1, args.n_jobs or 1
        probing = Probing(args.probe, args.seed, args.precision, args.max_probes, *jobs)
        fill_curvature(table, output, judge, weights, wanted, probing)
    else:
        source = args.text, args.text_format, args.seed
        rounding = exp, args.rounding, args.rounding_tokens, source, args.ngpu
        fill_kl(table, output, judge, weights, wanted, lambda: make_rounder(*rounding))
    return table
