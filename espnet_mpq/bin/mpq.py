"""The `mpq` command: gathers the subcommands, loads only the one that is called."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from typing import List, Optional

from espnet_mpq import __version__
from espnet_mpq.errors import InputError, MpqError, near_matches

LOG = logging.getLogger("espnet_mpq")
SUBCOMMANDS = {
    "quantize": "everything below in one command: from an fp LM to a packed LM",
    "sensitivity": "measure how much every cluster suffers at 1, 2, 4 and 8 bits",
    "nas": "or let a super-network find the bits, trained by ESPnet under the same budget",
    "plan": "choose the bits of every cluster: the exact optimum under a budget",
    "pack": "write a quantized LM as codes and scales that ESPnet decodes with",
    "info": "what is in a packed LM: bits, bytes and error of every cluster",
    "perplexity": "perplexity of an fp, quantized or packed LM",
    "tune": "weights of LMs for rescoring, tuned on the n-best lists of a development set",
    "rescore": "n-best lists in the order that LMs give them: packed, float, n-gram, density ratio",
    "compare": "word error rates of systems, whether they differ, and which words changed",
    "overlap": "does the text of an LM hold sentences of the test sets?",
    "setup_recipe": "add the mpq stages to an ESPnet recipe folder",
}
HELP = """\
usage: mpq SUBCOMMAND [options]          mpq SUBCOMMAND --help  (options, an example)

Makes language models and recognisers of ESPnet small: 1, 2, 3, 4 or 8 bits, different for every
part.

subcommands:
{subcommands}

A recogniser goes the same road, so far without training: --asr_exp and --data in place of --lm_exp
and --text, `mpq quantize exp/asr --bits 4 --data dump/raw/dev --output exp/asr_packed --no_train`.

The road from an ESPnet LM (exp/lm: config.yaml, valid.loss.best.pth) to a packed one:
  mpq quantize exp/lm --bits 2.0 --text train.txt --output exp/lm_packed       (all at once)
or step by step, with training by the host's own lm_train:
  mpq sensitivity --lm_exp exp/lm --text train.txt --output sensitivity.json
  mpq plan --lm_exp exp/lm --sensitivity sensitivity.json --budget 2.0 --output_dir plan
  python -m espnet_mpq -m espnet2.bin.lm_train --config plan/train_lm_mpq.yaml \\
      --init_param exp/lm/valid.loss.best.pth --output_dir exp/lm_mpq ...
  mpq pack --lm_exp exp/lm_mpq --fp_exp exp/lm --output_dir exp/lm_packed
  mpq info exp/lm_packed

Bits of a budget are effective bits: all bytes of the packed file x 8 / weights of the LM.
Every subcommand takes --config FILE.yaml with the names of its options as keys,
and --debug (or MPQ_DEBUG=1 in the environment) for the traceback of an unexpected error.
"""


def main(argv: Optional[List[str]] = None) -> int:
    """Run one subcommand; returns the exit status (1: an error, said on stderr; 2: usage)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, SUBCOMMANDS))
        listed = [f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items()]
        print(HELP.format(subcommands="\n".join(listed)), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mpq {__version__}")
        return 0
    name = argv[0]
    try:
        if name not in SUBCOMMANDS:
            raise InputError(f"unknown subcommand {name!r}", todo=near_matches(name, SUBCOMMANDS))
    except InputError as error:
        return _fail("mpq", error, 2)
    return _run(name, argv[1:])


def _run(name: str, argv: List[str]) -> int:
    handler = _log_to_stderr()
    # Apart from the parser, so that it works whatever the other options are.
    debug = "--debug" in argv or os.environ.get("MPQ_DEBUG", "") not in ("", "0")
    argv = [word for word in argv if word != "--debug"]
    try:
        from espnet_mpq.bin.options import Parser, parse

        module = importlib.import_module(f"espnet_mpq.bin.{name}")
        parser = Parser(prog=f"mpq {name}", description=SUBCOMMANDS[name])
        module.add_arguments(parser)
        return module.main(parse(parser, argv)) or 0
    except MpqError as error:
        return _fail(f"mpq {name}", error, 1)
    except SystemExit as stop:  # argparse: --help or bad usage
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print(f"\nmpq {name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (--debug or MPQ_DEBUG=1 shows the traceback)"
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"mpq {name}: internal error: {message}{hint}", file=sys.stderr)
        return 1
    finally:
        LOG.removeHandler(handler)
        LOG.propagate = True


def _fail(prog: str, error: Exception, status: int) -> int:
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _log_to_stderr() -> logging.Handler:
    """Messages of the package as plain lines, apart from the host's own log."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mpq: %(message)s"))
    LOG.setLevel(logging.INFO)
    LOG.addHandler(handler)
    LOG.propagate = False
    return handler


def entry() -> None:
    """The console script `mpq`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
