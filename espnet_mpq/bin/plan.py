"""mpq plan: the exact optimum of bits under a budget, its measured joint KL, files for training."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from shlex import quote
from typing import Dict, List, Optional

from espnet_mpq.bin.material import (
    add_exp_arguments,
    add_material_arguments,
    check_amounts,
    open_material_or_of_table,
)
from espnet_mpq.bin.options import check_group, provenance, read_yaml
from espnet_mpq.bin.rounding import (
    ROUNDING_TOKENS,
    add_rounding_arguments,
    check_rounding_tokens,
    make_rounder,
)
from espnet_mpq.bin.sensitivity import add_grid_arguments
from espnet_mpq.errors import InputError, MismatchError

LOG = logging.getLogger("espnet_mpq")
EXAMPLE = """example:
  mpq plan --lm_exp exp/lm --sensitivity sensitivity.json --budget 2.0 --output_dir plan
  mpq plan --lm_exp exp/lm --uniform 4 --output_dir plan_4bit       (the same bits everywhere)
  mpq plan --asr_exp exp/asr --sensitivity sensitivity.json --budget 4.0 --output_dir plan
writes plan.json, pareto.json, pareto.png, sensitivity.png and train_lm_mpq.yaml (for lm_train; not
for recognisers). The joint KL is measured on --text or --data, else on what the table names.
"""
SWAPS = {"nearest": 12, "second_order": 3}  # measured, by rounding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mpq plan`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add_exp_arguments(parser, required=True)
    add("--sensitivity", metavar="FILE.json", help="table of mpq sensitivity")
    add("--budget", type=float, help="effective bits: all bytes of the file x 8 / weights")
    add("--budget_bytes", type=int, help="the budget in bytes instead")
    add("--uniform", type=int, metavar="BITS", help="the same bits for all; no budget needed")
    add("--output_dir", required=True)
    add_material_arguments(parser, follows_table=True)
    add("--seed", type=int, help="of the sample of sentences (default: as the table, else 0)")
    add_grid_arguments(parser, default=False)
    add_rounding_arguments(parser, None)
    add("--train_config", metavar="FILE.yaml", help="host options merged into train_lm_mpq.yaml")
    add(
        "--repair",
        type=int,
        metavar="N",
        help="measure the largest uniform plan that fits and up to N swaps of bits, and keep what "
        f"is best (0: the optimum of the table's sums as it is; default: {SWAPS['nearest']}, of a "
        f"table of second-order rounding, where each rounds the whole LM, {SWAPS['second_order']})",
    )
    add("--ngpu", type=int, choices=(0, 1), default=0, help="1: measure on the GPU")


def main(args: argparse.Namespace) -> int:
    """Make the plan, print it, write all files; returns 0."""
    _check_options(args)
    user_options = read_yaml(args.train_config) if args.train_config else {}
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp
    from espnet_mpq.plan import budget_n_bytes, total_n_weights
    from espnet_mpq.planning.planner import joint_kl
    from espnet_mpq.planning.refine import refine
    from espnet_mpq.planning.summary import summarize

    exp = load_fp(args.exp, args.file)
    planner = _planner(args, exp)
    table, budget = planner.table, None
    if args.uniform is not None:
        plan = planner.uniform(args.uniform)
    else:
        architecture = planner.architecture
        n_weights = total_n_weights(architecture.clusters(), architecture.rest())
        budget = budget_n_bytes(n_weights, args.budget, args.budget_bytes)
        plan = planner.allocate(budget)
    settings = _train_settings(args, exp, plan, user_options)  # before minutes of work
    joint = refined = None
    meter = _make_meter(args, exp, table)
    # Harms of another unit (nas, plain traces) are no sums that swaps could go by.
    is_kl = meter is not None and budget and table.unit == meter.judged.unit
    n_swaps = args.repair
    if is_kl and n_swaps is None:
        n_swaps = SWAPS[table.provenance.get("rounding") or "nearest"]
    if is_kl and n_swaps:
        refined = refine(planner, meter, plan, budget, n_swaps)
        plan, joint = refined.plan, refined.joint
        if settings is not None:
            settings["lm_conf"]["plan"] = plan.inline()
    elif meter is not None:
        joint = joint_kl(meter, plan)
    unit = {} if meter is None else {"unit": meter.judged.unit}
    summary = summarize(planner, plan, joint, refined, **unit)
    record = _record(args, exp, table, summary)
    written = _write(args, planner, plan, settings, summary, record)
    print(format_summary(summary))
    print(f"\n{args.output_dir}: {', '.join(written)}")
    print(_next_step(Path(args.output_dir), exp))
    return 0


def _train_settings(args: argparse.Namespace, exp, plan, user_options: Dict) -> Optional[Dict]:
    """Options of the host's training with this plan; None for a recogniser."""
    if exp.kind != "lm":
        if args.train_config:
            raise InputError("--train_config is for LMs", found=f"{exp.config}, a recogniser")
        return None
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    return train_settings(exp, plan, user_options)


def _planner(args: argparse.Namespace, exp):
    """The Planner of an opened experiment, with the table once it is known to fit."""
    from espnet_mpq.planning.planner import Planner
    from espnet_mpq.planning.storage import Storage, storage_of
    from espnet_mpq.sensitivity.table import SensitivityTable

    asked = {"grid": args.grid, "tying": args.tying, "group_size": args.group_size}
    if not args.sensitivity:
        given = {key: value for key, value in asked.items() if value is not None}
        return Planner(exp.architecture, Storage(**given))
    table, path = SensitivityTable.read(args.sensitivity), args.sensitivity
    measured = table.provenance.get("rounding") or "nearest"
    if args.rounding not in (None, measured):
        raise MismatchError(
            f"{path} was measured with another rounding",
            found=measured,
            expected=args.rounding,
            todo=f"make the table again: mpq sensitivity --rounding {args.rounding}",
        )
    remake = f"mpq sensitivity --{exp.kind}_exp {exp.config.parent} ... --output {path}"
    clusters = exp.architecture.clusters()
    storage = storage_of(table, path, asked, exp.identity, clusters, remake)
    return Planner(exp.architecture, storage, table)


def _record(args: argparse.Namespace, exp, table, summary: Dict) -> Dict:
    """The provenance of the plan."""
    files = {
        "config": exp.config,
        "checkpoint": exp.checkpoint,
        "sensitivity": args.sensitivity,
        "train_config": args.train_config,
    }
    measured = table.provenance if table is not None else {}
    return {
        **provenance(args, files),
        "token_list_sha256": exp.vocabulary.sha256,
        "text_sha256": measured.get("text_sha256"),
        **({"data_sha256": measured["data_sha256"]} if "data_sha256" in measured else {}),
        "seed": measured.get("seed", 0) if args.seed is None else args.seed,
        "summary": {k: v for k, v in summary.items() if k != "rows"},
    }


def _write(
    args, planner, plan, settings: Optional[Dict], summary: Dict, record: Dict
) -> List[str]:
    """Write plan, training options, front and figures; returns the names of the files."""
    from espnet_mpq.hosts.espnet.lm.train_config import to_yaml
    from espnet_mpq.io import atomic_write, write_json
    from espnet_mpq.planning.summary import front
    from espnet_mpq.report.figures import pareto_figure, sensitivity_figure

    folder = Path(args.output_dir)
    dataclasses.replace(plan, provenance=record).write(folder / "plan.json")
    written = ["plan.json"]
    if settings is not None:
        atomic_write(folder / "train_lm_mpq.yaml", to_yaml(settings, _head(args, summary)))
        written.append("train_lm_mpq.yaml")
    if planner.table is not None:
        write_json(folder / "pareto.json", front(planner, summary, record))
        written.append("pareto.json")
        if pareto_figure(folder / "pareto.json", folder / "pareto.png"):
            sensitivity_figure(args.sensitivity, folder / "sensitivity.png")
            written += ["pareto.png", "sensitivity.png"]
    return written


def _check_options(args: argparse.Namespace) -> None:
    from espnet_mpq.plan import BITS

    check_group(args, may_follow_table=args.sensitivity is not None)
    budgets = [args.budget is not None, args.budget_bytes is not None, args.uniform is not None]
    if sum(budgets) != 1:
        raise InputError(
            "mpq plan needs one of --budget, --budget_bytes and --uniform",
            found=f"{sum(budgets)} of them",
        )
    if args.uniform is not None and args.uniform not in BITS:
        raise InputError(
            "--uniform", found=args.uniform, expected="one of " + ", ".join(map(str, BITS))
        )
    if args.uniform is None and not args.sensitivity:
        raise InputError(
            "a budget needs --sensitivity FILE.json", todo="make it with `mpq sensitivity`"
        )
    budget = args.budget if args.budget is not None else args.budget_bytes
    if budget is not None and not 0 < budget < float("inf"):
        raise InputError("the budget", found=budget, expected="above 0")
    if args.repair is not None and args.repair < 0:
        raise InputError("--repair", found=args.repair, expected="at least 0")
    check_amounts(args)
    check_rounding_tokens(args.rounding_tokens)


def _make_meter(args, exp, table):
    """A KlMeter on --text or --data, or what the table was measured on; None without any.

    Its rounding is that of the table or --rounding, and looks at the table's text if it is there.
    """
    from espnet_mpq.planning.measure import KL_TOKENS
    from espnet_mpq.sensitivity.kl import KlMeter

    record = table.provenance if table is not None else {}
    record = {key: value for key, value in record.items() if value is not None}
    material = open_material_or_of_table(exp, args, record)
    if material is None:
        return None
    exp.use_gpu(args.ngpu)
    n_tokens = args.rounding_tokens
    if n_tokens is None:
        n_tokens = record.get("rounding_tokens", ROUNDING_TOKENS)
    rounding = args.rounding or record.get("rounding", "nearest")
    seed = record.get("seed", 0) if args.seed is None else args.seed
    text = _text_of(record) or (args.text, args.text_format)
    return KlMeter(
        material.judge(KL_TOKENS),
        exp.weights,
        printed_form=table is not None and table.method == "kl_printed",
        rounder=make_rounder(exp, rounding, n_tokens, (*text, seed), args.ngpu),
    )


def _text_of(record: Dict):
    """Path and format of the text that a table was measured on; None if it is not as it was."""
    from espnet_mpq.io import sha256_file

    source = record.get("inputs", {}).get("text", {})
    path = source.get("path")
    if path is not None and Path(path).is_file() and sha256_file(path) == source.get("sha256"):
        return path, record.get("text_format", "auto")
    return None


def format_summary(summary: Dict) -> str:
    """The plan as a table, with its totals and predicted and measured harm."""
    from espnet_mpq.packed.receipt import times_smaller

    rows = summary["rows"]
    width = max(len("cluster"), *(len(row["cluster"]) for row in rows))
    harm = "KL" if summary["method"] in (None, "kl") else f"harm ({summary['method']})"
    heading = f"{'cluster':<{width}} {'bits':>4} {'weights':>11} {'bytes':>11}"
    lines = [f"{heading}  {harm}, {summary['unit']}"]
    for row in rows:
        value = "" if row["harm"] is None else _with_error(row["harm"], row["stderr"])
        lines.append(
            f"{row['cluster']:<{width}} {row['bits']:>4} {row['n_weights']:>11,}"
            f" {row['n_bytes']:>11,}  {value}".rstrip()
        )
    kept = summary["float_n_bytes"]
    lines += [
        f"float (biases, norms) {kept:,} bytes, header {summary['header_n_bytes']:,} bytes",
        f"whole file: {summary['n_bytes']:,} bytes, {summary['effective_bits']:.4f} effective bits,"
        f" {times_smaller(summary['ratio'])} than fp ({summary['fp_n_bytes']:,} bytes)",
    ]
    if summary["predicted"] is not None:
        lines.append(
            f"predicted {harm} (sum of clusters): "
            + _with_error(summary["predicted"], summary["predicted_stderr"])
        )
    if summary["joint_kl"] is None:
        lines.append("joint KL: not measured (give --text, or --data for a recogniser)")
    else:
        joint = _with_error(summary["joint_kl"], summary["joint_kl_stderr"])
        line = f"joint KL (measured): {joint}"
        predicted = summary["predicted"]
        if summary["unit"].startswith("nats/") and predicted and predicted > 0:
            line += f", {summary['joint_kl'] / predicted:.2f} x the sum"
        lines.append(line)
    if summary.get("allocated_joint_kl") is not None:
        beside = [f"of the table's optimum {summary['allocated_joint_kl']:.3e}"]
        if summary["uniform_joint_kl"] is not None:
            bits = summary["uniform_bits"]
            beside.append(f"of {bits} bits everywhere {summary['uniform_joint_kl']:.3e}")
        lines.append("joint KL at most of the same bytes: " + ", ".join(beside))
    return "\n".join(lines)


def _with_error(value: float, stderr: Optional[float]) -> str:
    return f"{value:.3e}" + (f" +- {stderr:.1e}" if stderr is not None else "")


def _head(args, summary) -> str:
    return (
        f"ADMM training at {summary['effective_bits']:.4f} effective bits, written by\n"
        f"  {getattr(args, 'command_line', 'mpq plan')}\n"
        "Train with: python -m espnet_mpq -m espnet2.bin.lm_train --config THIS_FILE\n"
        "  --init_param FP_CHECKPOINT --token_list ... and the data options of the fp LM."
    )


def _next_step(folder: Path, exp) -> str:
    source, plan = quote(str(exp.config.parent)), quote(f"{folder}/plan.json")
    pack = f"mpq pack --{exp.kind}_exp {source} --plan {plan}"
    if exp.kind != "lm":
        return f"next: {pack} --output_dir ..."
    return (
        "next: python -m espnet_mpq -m espnet2.bin.lm_train --config"
        f" {quote(f'{folder}/train_lm_mpq.yaml')} --init_param {quote(str(exp.checkpoint))} ... ,"
        f" or without training: {pack} --output_dir ..."
    )
