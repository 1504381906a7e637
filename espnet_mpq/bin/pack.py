"""`mpq pack`: a quantized LM experiment becomes a packed LM that the host decodes with."""

from __future__ import annotations

import argparse
import shlex
import sys

EXAMPLE = """example:
  mpq pack --lm_exp exp/lm_mpq --fp_exp exp/lm_fp --output_dir exp/lm_mpq_packed
  mpq pack --lm_exp exp/lm_fp --plan plan.json --output_dir exp/lm_packed   (no training)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mpq pack`."""
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--lm_exp", required=True, help="LM experiment: config.yaml and a checkpoint"
    )
    parser.add_argument("--lm_file", help="checkpoint inside lm_exp (valid.loss.best.pth)")
    parser.add_argument("--plan", help="plan.json, for an LM that was not trained with a plan")
    parser.add_argument("--output_dir", required=True, help="directory of the packed LM")
    parser.add_argument("--fp_exp", help="fp LM that the receipt's relative errors compare with")
    parser.add_argument("--fp_file", help="checkpoint inside fp_exp (valid.loss.best.pth)")


def main(args: argparse.Namespace) -> None:
    """Pack and print where, how large and at how many effective bits."""
    from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment
    from espnet_mpq.lock import locked
    from espnet_mpq.packed.format import PACKED_FILE
    from espnet_mpq.packed.receipt import receipt, times_smaller

    with locked(args.output_dir):
        packed = pack_experiment(
            args.lm_exp,
            args.output_dir,
            lm_file=args.lm_file,
            plan=args.plan,
            fp_exp=args.fp_exp,
            fp_file=getattr(args, "fp_file", None),
            command=shlex.join(["mpq", *sys.argv[1:]]),
        )
    totals = receipt(packed)["totals"]
    print(
        f"{args.output_dir}/{PACKED_FILE}: {totals['n_bytes']:,} bytes, "
        f"{totals['effective_bits']:.4f} effective bits, {times_smaller(totals['compression'])} "
        f"than fp; see `mpq info {shlex.quote(str(args.output_dir))}`"
    )
