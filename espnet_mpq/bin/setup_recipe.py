"""`mpq setup_recipe`: add mpq.sh to an ESPnet recipe folder that has already been run."""

from __future__ import annotations

import argparse

from espnet_mpq import setup_recipe

EXAMPLE = """example:
  mpq setup_recipe egs2/librispeech/asr1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    setup_recipe.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Write mpq.sh and print the next command."""
    setup_recipe.report(args)
