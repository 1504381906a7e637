"""`mpq quantize`: from an fp LM to a packed LM in one command, and it goes on after a kill."""

from __future__ import annotations

import argparse
import importlib
import math
import shlex
import sys
from pathlib import Path
from typing import List, Optional

from espnet_mpq.bin.options import Parser, check_group, check_ngpu, parse, read_yaml
from espnet_mpq.bin.rounding import ROUNDINGS
from espnet_mpq.errors import InputError, WriteError
from espnet_mpq.io import read_json, sha256_file, write_json
from espnet_mpq.plan import GRIDS, QUANTIZED_BITS, TYINGS

REPORT_TOKENS = 50000
PLAN, MARK = Path("plan", "plan.json"), "quantize.json"  # in OUTPUT/work
EXAMPLE = """example:
  mpq quantize exp/lm_train_lm --bits 2.0 --text dump/raw/lm_train.txt --output exp/lm_packed
  mpq quantize exp/lm_train_lm --bits 2.0 --text train.txt --output exp/lm_ptq --no_train

What it does: sensitivity (KL) -> plan (exact optimum) -> ADMM training by the host -> packing.
Everything on the way is kept in OUTPUT/work (sensitivity.json, plan/, train/); the same command
goes on where a killed one stopped. Then decode with
  python -m espnet_mpq -m espnet2.bin.asr_inference --lm_train_config OUTPUT/config.yaml \\
      --lm_file OUTPUT/packed.safetensors ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mpq quantize`."""
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("lm_exp", help="the fp LM's experiment folder (config.yaml and a checkpoint)")
    add(
        "--bits",
        type=float,
        required=True,
        help="budget in effective bits: all bytes of the packed file x 8 / weights of the LM; "
        "with --uniform the bits of every cluster: 1, 2, 3, 4 or 8",
    )
    add("--text", required=True, help="training text: plain or `utt text` lines, .gz too")
    add("--output", required=True, help="folder of the packed LM, an LM experiment for ESPnet")
    add("--no_train", action="store_true", help="post-training quantization, a minute or two")
    add("--uniform", action="store_true", help="the same bits for every cluster")
    add("--valid_text", help="text for validation (default: 5%% of --text held out)")
    add("--text_format", choices=("auto", "plain", "kaldi"), default="auto")
    add("--lm_file", help="checkpoint in lm_exp (default: valid.loss.best.pth, ...)")
    add("--grid", choices=GRIDS, default="uniform")
    add("--tying", choices=TYINGS, default="row", help="what shares a scale")
    add("--group_size", type=int, help="columns per scale, for --tying group")
    tokens = {"type": int, "default": 10000, "help": "tokens the KL is measured on"}
    add("--sensitivity_tokens", "--max_tokens", dest="sensitivity_tokens", **tokens)
    add(
        "--rounding",
        choices=ROUNDINGS,
        help="how float weights come to the grid (default: second_order with --no_train, "
        "else nearest)",
    )
    add("--max_epoch", type=int, help="training epochs (default: as `mpq plan` suggests)")
    add(
        "--epoch_tokens",
        type=int,
        default=200000,
        help="tokens of one training epoch; a larger text is spread over several (200000)",
    )
    add("--train_config", help="YAML with options of lm_train and mpq_*, which win")
    add("--ngpu", type=int, default=0, help="GPUs for the training")
    add("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    """Run all steps and print the receipt and the perplexities."""
    _check_options(args)
    from espnet_mpq.hosts.espnet.experiment.directory import check_output
    from espnet_mpq.lock import locked

    check_output(Path(args.output), [Path(args.lm_exp)])
    try:
        with locked(args.output):
            _quantize(args, Path(args.output) / "work")
    except WriteError as error:
        if not error.is_full:
            raise
        todo = "free disk space; the same command goes on with what is finished in OUTPUT/work"
        raise error.advising(todo) from error


def _quantize(args: argparse.Namespace, work: Path) -> None:
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.hosts.espnet.lm.train import check_paths, train_lm
    from espnet_mpq.text import read_text, split_valid

    user_options = read_yaml(args.train_config) if args.train_config else {}
    exp = load_fp_lm(args.lm_exp, args.lm_file)
    if not args.no_train:
        check_paths(work, exp.checkpoint)
    _check_own_plan(work)
    _check_plan(args, exp, user_options)
    train = valid = read_text(args.text, args.text_format)
    if args.valid_text:
        valid = read_text(args.valid_text, args.text_format)
    elif not args.no_train:
        train, valid = split_valid(train, args.seed)
    fp_file = str(exp.checkpoint.resolve())
    checkpoint = _words(lm_exp=args.lm_exp, lm_file=fp_file)
    storage = _words(grid=args.grid, tying=args.tying, group_size=args.group_size)
    text = _words(text=args.text, text_format=args.text_format, seed=args.seed)
    max_tokens = _words(max_tokens=args.sensitivity_tokens)
    rounding = _words(rounding=args.rounding or ("second_order" if args.no_train else "nearest"))

    plan = ["plan", *checkpoint, *text, *max_tokens, *rounding]
    plan += _words(output_dir=work / "plan")
    if args.uniform:
        plan += ["--uniform", str(int(args.bits)), *storage]
    else:
        table = work / "sensitivity.json"
        words = ["sensitivity", *checkpoint, *text, *max_tokens, *storage, *rounding]
        _step("sensitivity", words + _words(output=table))
        plan += _words(sensitivity=table, budget=args.bits)
    _mark_plan(work, None)  # from here on a plan in this folder is ours
    _step("plan", plan + _words(train_config=args.train_config))
    _mark_plan(work, sha256_file(work / PLAN))

    pack = ["pack", *_words(output_dir=args.output, fp_exp=args.lm_exp, fp_file=fp_file)]
    if args.no_train:
        pack += [*checkpoint, *text, *rounding, *_words(plan=work / PLAN)]
    else:
        print(f"== training (log: {work}/train/train.log)", file=sys.stderr, flush=True)
        trained = train_lm(
            exp,
            work / "plan" / "train_lm_mpq.yaml",
            train,
            valid,
            work / "train",
            keep=user_options,
            max_epoch=args.max_epoch,
            epoch_tokens=args.epoch_tokens,
            ngpu=args.ngpu,
            seed=args.seed,
        )
        pack += _words(lm_exp=trained)
    _step("packing", pack)
    if args.valid_text:
        name = args.valid_text
    else:
        name = args.text if args.no_train else f"{len(valid)} held-out sentences of {args.text}"
    _report(args, exp, valid, name)


def _words(**options: object) -> List[str]:
    """Options that have a value as words of a command line."""
    words: List[str] = []
    for name, value in options.items():
        if value is not None:
            text = str(value)
            # As one word, a value may begin with a dash.
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return words


def _check_own_plan(work: Path) -> None:
    """Raise InputError for a plan that this command did not write, or that was changed since."""
    plan, mark = work / PLAN, work / MARK
    if not plan.exists():
        return
    known = read_json(mark).get("plan_sha256") if mark.is_file() else "none"
    if known is not None and known != sha256_file(plan):
        raise InputError(
            f"{plan} would be written over",
            found="a plan that mpq quantize did not write"
            if known == "none"
            else "a plan that was changed since mpq quantize wrote it",
            todo="move it away or give another --output; with this plan: `mpq pack --plan`, or "
            "lm_train and `mpq pack`",
        )


def _mark_plan(work: Path, sha256: Optional[str]) -> None:
    """Record which plan is ours; None: whichever is there, until the next call."""
    write_json(work / MARK, {"plan_sha256": sha256})


def _check_options(args: argparse.Namespace) -> None:
    """What can be refused before anything is read; raises InputError."""
    check_group(args)
    if args.uniform and args.bits not in QUANTIZED_BITS:
        raise InputError(
            "--uniform gives every cluster the same bits",
            found=f"--bits {args.bits:g}",
            expected="--bits 1, 2, 3, 4 or 8",
        )
    if not 0 < args.bits <= 32:
        raise InputError("--bits", found=f"{args.bits:g}", expected="a budget above 0, at most 32")
    if not 0 <= args.seed < 2**32:
        raise InputError("--seed", found=args.seed, expected="0 .. 2^32 - 1")
    for name in ("max_epoch", "epoch_tokens", "sensitivity_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}", found=value, expected="at least 1")
    check_ngpu(args.ngpu)


def _check_plan(args: argparse.Namespace, exp, user_options) -> None:
    """What would stop the later steps, said before the first: LM, grid, budget, train_config."""
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings
    from espnet_mpq.packed.size import packed_size
    from espnet_mpq.plan import uniform_plan

    clusters = exp.architecture.clusters()
    smallest = uniform_plan(clusters, 1, args.grid, args.tying, args.group_size)
    if args.max_epoch is not None:
        user_options = {**user_options, "max_epoch": args.max_epoch}
    train_settings(exp, smallest, user_options)
    least = packed_size(exp.architecture, smallest)
    if not args.uniform and args.bits < least.effective_bits:
        raise InputError(
            "the budget is too small for this LM (header, scales and biases count)",
            found=f"--bits {args.bits:g}",
            expected=f"at least {least.effective_bits:.4f}, which is {least.n_bytes} bytes",
        )


def _step(title: str, words) -> None:
    """One subcommand, as its own command line would run it."""
    print(f"== {title}: mpq {shlex.join(words)}", file=sys.stderr, flush=True)
    module = importlib.import_module(f"espnet_mpq.bin.{words[0]}")
    parser = Parser(prog=f"mpq {words[0]}")
    module.add_arguments(parser)
    module.main(parse(parser, words[1:]))


def _report(args: argparse.Namespace, exp, valid, text_name: str) -> None:
    """The receipt, and the perplexity of fp and packed LM on the same sentences."""
    from espnet_mpq.hosts.espnet.experiment.opened import load_lm
    from espnet_mpq.hosts.espnet.lm import perplexity
    from espnet_mpq.hosts.espnet.lm.tokenizer import tokenize
    from espnet_mpq.packed.receipt import format_receipt

    output = Path(args.output)
    tokenized = tokenize(exp, valid).sample(REPORT_TOKENS, args.seed)
    lms = {"fp": exp, "packed": load_lm(output)}
    numbers = {name: perplexity.measure(lm, tokenized).to_dict() for name, lm in lms.items()}
    write_json(output / "perplexity.json", {"text": text_name, **numbers})
    print(format_receipt(read_json(output / "receipt.json")))
    print(f"\nperplexity per token on {len(tokenized)} sentences ({text_name}):")
    for name, value in numbers.items():
        error = value["ppl_stderr"]
        spread = f" +- {error:.4f}" if error is not None and math.isfinite(error) else ""
        print(f"  {name:<7} {value['ppl']:.4f}{spread}")
    change = 100 * (numbers["packed"]["ppl"] / numbers["fp"]["ppl"] - 1)
    print(f"  packed against fp: {change:+.2f} %")
