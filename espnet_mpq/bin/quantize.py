"""`mpq quantize`: from an fp model to a packed one in one command, and it goes on after a kill."""

from __future__ import annotations

import argparse
import importlib
import math
import shlex
import sys
from pathlib import Path
from typing import List, Optional

from espnet_mpq.bin.material import FILE_OPTIONS, MAX_SECONDS
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
  mpq quantize exp/asr_train --bits 4 --data dump/raw/dev --output exp/asr_ptq --no_train

What it does: sensitivity (KL) -> plan (exact optimum) -> ADMM training by the host -> packing.
Everything on the way is kept in OUTPUT/work (sensitivity.json, plan/, train/); the same command
goes on where a killed one stopped. Then decode with
  python -m espnet_mpq -m espnet2.bin.asr_inference --lm_train_config OUTPUT/config.yaml \\
      --lm_file OUTPUT/packed.safetensors ...
or, for a recogniser, with --asr_train_config and --asr_model_file.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mpq quantize`."""
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("exp", metavar="EXP", help="experiment folder of the fp LM or recogniser")
    add(
        "--bits",
        type=float,
        required=True,
        help="budget in effective bits: all bytes of the packed file x 8 / weights of the model; "
        "with --uniform the bits of every cluster: 1, 2, 3, 4 or 8",
    )
    add("--text", help="of an LM, training text: plain or `utt text` lines, .gz too")
    add("--data", metavar="DIR", help="of a recogniser: folder with wav.scp and text")
    add("--output", required=True, help="folder of the packed model, an experiment for ESPnet")
    add("--no_train", action="store_true", help="post-training quantization, a minute or two")
    add("--uniform", action="store_true", help="the same bits for every cluster")
    add("--valid_text", help="text for validation (default: 5%% of --text held out)")
    add("--text_format", choices=("auto", "plain", "kaldi"), default="auto")
    add(*FILE_OPTIONS, dest="file", metavar="FILE", help="checkpoint inside EXP")
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
    add("--max_seconds", type=float, default=MAX_SECONDS, help="speech the KL is measured on")
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

    check_output(Path(args.output), [Path(args.exp)])
    try:
        with locked(args.output):
            _quantize(args, Path(args.output) / "work")
    except WriteError as error:
        if not error.is_full:
            raise
        todo = "free disk space; the same command goes on with what is finished in OUTPUT/work"
        raise error.advising(todo) from error


def _quantize(args: argparse.Namespace, work: Path) -> None:
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp

    exp = load_fp(args.exp, args.file)
    name, other = ("data", "text") if exp.kind == "asr" else ("text", "data")
    if getattr(args, name) is None or getattr(args, other) is not None:
        raise InputError(
            f"{exp.config} describes {'a recogniser' if exp.kind == 'asr' else 'an LM'}",
            found=f"--{other}" if getattr(args, other) is not None else f"no --{name}",
            expected=f"--{name}",
        )
    (_quantize_asr if exp.kind == "asr" else _quantize_lm)(args, exp, work)


def _quantize_lm(args: argparse.Namespace, exp, work: Path) -> None:
    from espnet_mpq.hosts.espnet.lm.train import check_paths, train_lm
    from espnet_mpq.text import read_text, split_valid

    user_options = read_yaml(args.train_config) if args.train_config else {}
    if not args.no_train:
        check_paths(work, exp.checkpoint)
    _check_own_plan(work)
    _check_training(args, exp, user_options)
    _check_budget(args, exp)
    train = valid = read_text(args.text, args.text_format)
    if args.valid_text:
        valid = read_text(args.valid_text, args.text_format)
    elif not args.no_train:
        train, valid = split_valid(train, args.seed)
    text = _words(text=args.text, text_format=args.text_format, seed=args.seed)
    rounding = _words(rounding=args.rounding or ("second_order" if args.no_train else "nearest"))
    max_tokens = _words(max_tokens=args.sensitivity_tokens)
    _make_plan(args, exp, work, [*text, *max_tokens, *rounding])
    trained = None
    if not args.no_train:
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
    _pack(args, exp, work, _words(lm_exp=trained) if trained else [*text, *rounding])
    if args.valid_text:
        name = args.valid_text
    else:
        name = args.text if args.no_train else f"{len(valid)} held-out sentences of {args.text}"
    _report(args, exp, valid, name)


def _quantize_asr(args: argparse.Namespace, exp, work: Path) -> None:
    from espnet_mpq.packed.receipt import format_receipt

    if not args.no_train:
        raise InputError(
            "recognisers are quantized without training", found="no --no_train", todo="add it"
        )
    for option in ("train_config", "valid_text"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option} is for LMs", found=f"{exp.config}, a recogniser")
    _check_own_plan(work)
    _check_budget(args, exp)
    data = _words(data=args.data, max_seconds=args.max_seconds, seed=args.seed)
    rounding = _words(rounding=args.rounding)
    _make_plan(args, exp, work, [*data, *rounding])
    _pack(args, exp, work, rounding)
    print(format_receipt(read_json(Path(args.output) / "receipt.json")))


def _source(exp) -> List[str]:
    """The experiment and its checkpoint as words of a command line."""
    return _words(**{f"{exp.kind}_exp": exp.config.parent, "file": exp.checkpoint.resolve()})


def _make_plan(args: argparse.Namespace, exp, work: Path, how: List[str]) -> None:
    """Sensitivity, unless the bits are uniform, and the plan, in OUTPUT/work.

    how: what to measure on and how to round, as words of a command line.
    """
    source = _source(exp)
    storage = _words(grid=args.grid, tying=args.tying, group_size=args.group_size)
    plan = ["plan", *source, *how, *_words(output_dir=work / "plan")]
    if args.uniform:
        plan += ["--uniform", str(int(args.bits)), *storage]
    else:
        table = work / "sensitivity.json"
        words = ["sensitivity", *source, *how, *storage, *_words(output=table)]
        _step("sensitivity", words)
        plan += _words(sensitivity=table, budget=args.bits)
    _mark_plan(work, None)  # from here on a plan in this folder is ours
    _step("plan", plan + _words(train_config=args.train_config))
    _mark_plan(work, sha256_file(work / PLAN))


def _pack(args: argparse.Namespace, exp, work: Path, how: List[str]) -> None:
    """Pack the trained experiment that ``how`` names, else the fp weights with the plan."""
    folder, fp_file = exp.config.parent, exp.checkpoint.resolve()
    pack = ["pack", *_words(output_dir=args.output, fp_exp=folder, fp_file=fp_file), *how]
    if "--lm_exp" not in how:
        pack += [*_source(exp), *_words(plan=work / PLAN)]
    _step("packing", pack)


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


def _check_training(args: argparse.Namespace, exp, user_options) -> None:
    """What would stop the training, said before the first step: LM, train_config."""
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    if args.max_epoch is not None:
        user_options = {**user_options, "max_epoch": args.max_epoch}
    train_settings(exp, _smallest(args, exp), user_options)


def _smallest(args: argparse.Namespace, exp):
    from espnet_mpq.plan import uniform_plan

    clusters = exp.architecture.clusters()
    return uniform_plan(clusters, 1, args.grid, args.tying, args.group_size)


def _check_budget(args: argparse.Namespace, exp) -> None:
    """Raise InputError for a budget that the smallest file does not fit."""
    from espnet_mpq.packed.size import packed_size

    least = packed_size(exp.architecture, _smallest(args, exp))
    if not args.uniform and args.bits < least.effective_bits:
        noun = "recogniser" if exp.kind == "asr" else "LM"
        raise InputError(
            f"the budget is too small for this {noun} (header, scales and biases count)",
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
