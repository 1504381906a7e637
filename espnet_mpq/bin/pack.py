"""`mpq pack`: a quantized experiment becomes a packed one that the host decodes with."""

from __future__ import annotations

import argparse
import shlex
import sys

from espnet_mpq.bin.material import add_exp_arguments
from espnet_mpq.bin.rounding import (
    ROUNDING_TOKENS,
    add_rounding_arguments,
    check_rounding_tokens,
    make_rounder,
)
from espnet_mpq.errors import InputError

EXAMPLE = """example:
  mpq pack --lm_exp exp/lm_mpq --fp_exp exp/lm_fp --output_dir exp/lm_mpq_packed
  mpq pack --lm_exp exp/lm_fp --plan plan.json --text train.txt --output_dir exp/lm_packed
      (no training; without --text to the nearest levels, at two or three times the loss)
  mpq pack --asr_exp exp/asr --plan plan.json --output_dir exp/asr_packed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mpq pack`."""
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_exp_arguments(parser, required=True)
    parser.add_argument("--plan", help="plan.json, for a model that was not trained with a plan")
    parser.add_argument("--output_dir", required=True, help="directory of the packed model")
    parser.add_argument("--fp_exp", help="fp model that the receipt's relative errors compare with")
    parser.add_argument("--fp_file", help="checkpoint inside fp_exp")
    parser.add_argument("--text", help="with --plan: training text, for second_order rounding")
    parser.add_argument("--text_format", choices=("auto", "plain", "kaldi"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of sentences")
    add_rounding_arguments(parser, None)


def main(args: argparse.Namespace) -> None:
    """Pack and print where, how large and at how many effective bits."""
    from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment
    from espnet_mpq.lock import locked
    from espnet_mpq.packed.format import PACKED_FILE
    from espnet_mpq.packed.receipt import receipt, times_smaller

    rounding = args.rounding or ("second_order" if args.text else "nearest")
    rounded = _round(args) if rounding == "second_order" else None
    with locked(args.output_dir):
        packed = pack_experiment(
            args.exp,
            args.output_dir,
            file=args.file,
            plan=args.plan,
            fp_exp=args.fp_exp,
            fp_file=getattr(args, "fp_file", None),
            rounded=rounded,
            command=shlex.join(["mpq", *sys.argv[1:]]),
        )
    totals = receipt(packed)["totals"]
    print(
        f"{args.output_dir}/{PACKED_FILE}: {totals['n_bytes']:,} bytes, "
        f"{totals['effective_bits']:.4f} effective bits, {times_smaller(totals['compression'])} "
        f"than fp; see `mpq info {shlex.quote(str(args.output_dir))}`"
    )


def _round(args: argparse.Namespace):
    """The fp LM rounded by second order as the plan says (rounding.model.Rounded)."""
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp
    from espnet_mpq.plan import Plan

    for option in ("plan", "text"):
        if getattr(args, option) is None:
            raise InputError(
                f"second_order rounding needs --{option}",
                todo="an LM that was trained with a plan is packed as it is, --rounding nearest"
                if option == "plan"
                else "give the training text",
            )
    tokens = ROUNDING_TOKENS if args.rounding_tokens is None else args.rounding_tokens
    check_rounding_tokens(tokens)
    exp, plan = load_fp(args.exp, args.file), Plan.read(args.plan)
    plan.check(exp.architecture.clusters())
    source = args.text, args.text_format, args.seed
    return make_rounder(exp, "second_order", tokens, source).round_all(plan)
