"""`mpq quantize`: from an fp LM to a packed LM in one command, and it goes on after a kill."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from espnet_mpq.errors import InputError
from espnet_mpq.plan import GRIDS, QUANTIZED_BITS, TYINGS

HELP = "from an fp LM to a packed LM in one command"
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
        "with --uniform the bits of every cluster: 1, 2, 4 or 8",
    )
    add("--text", required=True, help="training text: plain or `utt text` lines, .gz too")
    add("--output", required=True, help="folder of the packed LM, an LM experiment for ESPnet")
    add("--no_train", action="store_true", help="no training: post-training quantization, minutes")
    add("--uniform", action="store_true", help="the same bits for every cluster")
    add("--valid_text", help="text for validation (default: 5%% of --text held out)")
    add("--text_format", choices=("auto", "plain", "kaldi"), default="auto")
    add("--lm_file", help="checkpoint in lm_exp (default: valid.loss.best.pth, ...)")
    add("--grid", choices=GRIDS, default="uniform")
    add("--tying", choices=TYINGS, default="row", help="what shares a scale")
    add("--group_size", type=int, help="columns per scale, for --tying group")
    add("--sensitivity_tokens", type=int, default=10000, help="tokens the KL is measured on")
    add("--max_epoch", type=int, help="training epochs (default: as `mpq plan` suggests)")
    add(
        "--epoch_tokens",
        type=int,
        default=200000,
        help="tokens of one training epoch; a larger text is spread over several (200000)",
    )
    add("--train_config", help="YAML with options of the host's lm_train and mpq_* options")
    add("--ngpu", type=int, default=0, help="GPUs for the training")
    add("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    """Run all steps and print the receipt and the perplexities."""
    _check(args)
    from espnet_mpq.hosts.espnet import text as host_text
    from espnet_mpq.hosts.espnet.experiment import load_fp_lm
    from espnet_mpq.hosts.espnet.training_run import split_valid, train_lm

    work = Path(args.output) / "work"
    exp = load_fp_lm(args.lm_exp, args.lm_file)
    sentences = host_text.read_text(args.text, args.text_format)
    if args.valid_text:
        train, valid = sentences, host_text.read_text(args.valid_text, args.text_format)
    else:
        train, valid = split_valid(sentences, args.seed)
    checkpoint = ["--lm_exp", args.lm_exp, "--lm_file", str(exp.checkpoint.resolve())]
    storage = ["--grid", args.grid, "--tying", args.tying]
    if args.group_size is not None:
        storage += ["--group_size", str(args.group_size)]
    text = ["--text", args.text, "--text_format", args.text_format, "--seed", str(args.seed)]
    text += ["--max_tokens", str(args.sensitivity_tokens)]

    plan = ["plan", *checkpoint, *text, "--output_dir", str(work / "plan")]
    if args.uniform:
        plan += ["--uniform", str(int(args.bits)), *storage]
    else:
        table = str(work / "sensitivity.json")
        _step("1 sensitivity", ["sensitivity", *checkpoint, *text, *storage, "--output", table])
        plan += ["--sensitivity", table, "--budget", str(args.bits)]
    if args.train_config:
        plan += ["--train_config", args.train_config]
    _step("2 plan", plan)

    pack = ["pack", "--output_dir", args.output, "--fp_exp", args.lm_exp]
    pack += ["--fp_file", str(exp.checkpoint.resolve())]
    if args.no_train:
        pack += [*checkpoint, "--plan", str(work / "plan" / "plan.json")]
    else:
        print(f"== 3 training (log: {work}/train/train.log)", file=sys.stderr, flush=True)
        trained = train_lm(
            exp,
            work / "plan" / "train_lm_mpq.yaml",
            train,
            valid,
            work / "train",
            max_epoch=args.max_epoch,
            epoch_tokens=args.epoch_tokens,
            ngpu=args.ngpu,
            seed=args.seed,
        )
        pack += ["--lm_exp", str(trained)]
    _step("4 packing", pack)
    _report(args, exp, valid)


def _check(args: argparse.Namespace) -> None:
    if args.uniform and args.bits not in QUANTIZED_BITS:
        raise InputError(
            "--uniform gives every cluster the same bits",
            found=f"--bits {args.bits:g}",
            expected="--bits 1, 2, 4 or 8",
        )
    if not 0 < args.bits <= 32:
        raise InputError("--bits", found=f"{args.bits:g}", expected="a budget above 0, at most 32")
    for name in ("max_epoch", "epoch_tokens", "sensitivity_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}", found=value, expected="at least 1")
    if Path(args.output).resolve() == Path(args.lm_exp).resolve():
        raise InputError("--output is the fp LM's own folder", todo="give another folder")


def _step(title: str, words) -> None:
    """One subcommand, as its own command line would run it."""
    from espnet_mpq.bin.options import parse

    print(f"== {title}: mpq {' '.join(words)}", file=sys.stderr, flush=True)
    module = importlib.import_module(f"espnet_mpq.bin.{words[0]}")
    parser = argparse.ArgumentParser(prog=f"mpq {words[0]}")
    module.add_arguments(parser)
    module.main(parse(parser, words[1:]))


def _report(args: argparse.Namespace, exp, valid) -> None:
    """The receipt, and the perplexity of fp and packed LM on the held-out text."""
    from espnet_mpq.hosts.espnet import perplexity
    from espnet_mpq.hosts.espnet import text as host_text
    from espnet_mpq.hosts.espnet.experiment import load_lm
    from espnet_mpq.packed.receipt import format_receipt

    output = Path(args.output)
    tokenized = host_text.tokenize(exp, valid)
    numbers = {
        name: perplexity.measure(lm, tokenized).to_dict()
        for name, lm in (("fp", exp), ("packed", load_lm(output)))
    }
    from espnet_mpq.io import write_json

    write_json(output / "perplexity.json", numbers)
    print(format_receipt(json.loads((output / "receipt.json").read_text(encoding="utf-8"))))
    for name, value in numbers.items():
        print(f"perplexity {name:<7} {value['ppl']:.4f} +- {value['ppl_stderr']:.4f} per token")
