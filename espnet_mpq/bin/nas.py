"""mpq nas: bits found by a super-network that ESPnet trains; writes a table for mpq plan."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from shlex import quote
from typing import Dict

from espnet_mpq.bin.options import check_group, check_ngpu, provenance, read_yaml
from espnet_mpq.bin.sensitivity import CHOSEN_BITS, add_grid_arguments
from espnet_mpq.errors import InputError, MismatchError, WriteError

KL_TOKENS = 10000  # on which mpq plan measures the joint KL
MOST_BITS = 64  # of a budget: more than any LM takes, its header included
EXAMPLE = """example:
  mpq nas --lm_exp exp/lm --text dump/raw/lm_train.txt --budget 2.0 --output_dir exp/nas
  mpq plan --lm_exp exp/lm --sensitivity exp/nas/sensitivity.json --budget 2.0 --output_dir plan

Two modes. pipelined (default): the weights first, from the fp LM, on uniformly drawn one-hot paths;
then the probabilities of the bits alone, on 5 % of the text that was held out, with Gumbel-softmax
and falling temperature. joint: weights and probabilities together on the training text, plain
softmax. The penalty on size finds its own weight: no beta to sweep.

OUTPUT_DIR gets text/ (the parts of the text), train_lm_nas_weights.yaml and train_lm_nas.yaml
(options of lm_train), one folder per phase with ESPnet's experiment in exp/, and sensitivity.json
(harm = -ln p). The same command goes on where a killed one stopped. To train by hand:
  mpq nas ... --config_only, lm_train with the files it wrote, then mpq nas ... --nas_exp EXP
"""
PIPELINED, JOINT = "pipelined", "joint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mpq nas`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--lm_exp", required=True, help="experiment of the fp LM: config.yaml and a checkpoint")
    add("--lm_file", help="checkpoint inside lm_exp (default: valid.loss.best.pth)")
    add("--text", required=True, help="training text, plain or `utt text` lines, .gz too")
    add("--text_format", choices=("auto", "plain", "kaldi"), default="auto")
    add("--valid_text", help="text for validation (default: 5%% of --text)")
    add("--budget", type=float, help="effective bits: all bytes of the file x 8 / weights")
    add("--budget_bytes", type=int, help="the budget in bytes instead")
    add("--output_dir", required=True)
    add("--mode", choices=(PIPELINED, JOINT), default=PIPELINED)
    add("--bits", type=int, nargs="+", choices=CHOSEN_BITS, default=[1, 2, 4, 8])
    add_grid_arguments(parser)
    add("--relaxation", choices=("gumbel", "softmax"), help="default: as the mode")
    add(
        "--penalty",
        choices=("budget", "paper"),
        default="budget",
        help="paper: beta * sum p sqrt(bits), which knows no budget",
    )
    add("--beta", type=float, default=0.5, help="of --penalty paper (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="of the first epoch")
    add("--final_temperature", type=float, default=0.1, help="of the last epoch")
    add("--lr", type=float, default=0.05, help="Adam step of the logits (default: %(default)s)")
    add(
        "--weights_epochs",
        type=int,
        default=3,
        help="epochs of the weights, 0: the fp weights serve (pipelined; default: %(default)s)",
    )
    add("--nas_epochs", type=int, default=16, help="epochs of the probabilities (default: 16)")
    add(
        "--nas_updates",
        type=int,
        default=25,
        help="updates in one of them, pipelined (default: %(default)s)",
    )
    add(
        "--epoch_tokens",
        type=int,
        default=200000,
        help="tokens of one epoch of the weights; a larger text is spread over several (200000)",
    )
    add("--train_config", metavar="FILE.yaml", help="options of lm_train that win over ours")
    add("--ngpu", type=int, default=0, help="GPUs for the training")
    add("--seed", type=int, default=0, help="of the held-out sentences and of the training")
    add("--config_only", action="store_true", help="write text and configurations, do not train")
    add("--nas_exp", metavar="EXP", help="read a finished experiment of mpq_nas_*, do not train")


def main(args: argparse.Namespace) -> int:
    """Search, write the table, print the one-best plan; returns 0."""
    _check_options(args)
    from espnet_mpq.hosts.espnet.experiment.directory import check_output
    from espnet_mpq.lock import locked

    folder = Path(args.output_dir)
    check_output(folder, [Path(args.lm_exp)])
    try:
        with locked(folder):
            return _search(args, folder)
    except WriteError as error:
        if not error.is_full:
            raise
        todo = "free disk space; the same command goes on with what is finished in OUTPUT_DIR"
        raise error.advising(todo) from error


def _search(args: argparse.Namespace, folder: Path) -> int:
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.hosts.espnet.lm.search import open_search
    from espnet_mpq.hosts.espnet.lm.train import check_paths
    from espnet_mpq.planning.search_result import format_result, make_table
    from espnet_mpq.text import read_text

    user = read_yaml(args.train_config) if args.train_config else {}
    exp = load_fp_lm(args.lm_exp, args.lm_file)
    if not (args.nas_exp or args.config_only):
        check_paths(folder, exp.checkpoint)
        check_paths(folder, folder)  # the second phase starts from a checkpoint of the first
    _check_table(folder / "sensitivity.json")
    if args.nas_exp:
        read_text(args.text, args.text_format)  # its hash goes into the table
        found = Path(args.nas_exp)
    else:
        parts = _split(args)
        configs = _write_configs(args, exp, user, folder)
        _write_text(parts, folder)
        if args.config_only:
            names = ", ".join(path.name for path in configs.values())
            print(f"{folder}: {names}, text/ ({', '.join(f'{k}.txt' for k in parts)})")
            return 0
        found = _train(args, exp, user, parts, configs, folder)
    lm, checkpoint = open_search(found)
    record = _record(args, exp, lm.nas.options, checkpoint)
    table = make_table(lm.nas, lm.candidates, exp.architecture, exp.weights, record)
    table.write(folder / "sensitivity.json")
    print(format_result(table))
    budget = f"--budget_bytes {table.provenance['nas']['budget_n_bytes']}"
    print(
        f"\n{folder}: sensitivity.json\nnext: mpq plan --lm_exp {quote(args.lm_exp)} --sensitivity"
        f" {quote(f'{folder}/sensitivity.json')} {budget} --output_dir ..."
    )
    return 0


def _check_options(args: argparse.Namespace) -> None:
    n_budgets = (args.budget is not None) + (args.budget_bytes is not None)
    if args.nas_exp and n_budgets:
        raise InputError(
            "--nas_exp has the budget that it was trained with",
            found="--budget or --budget_bytes",
            todo="leave it out here; `mpq plan` takes any budget",
        )
    if not args.nas_exp and n_budgets != 1:
        raise InputError("mpq nas needs one of --budget and --budget_bytes")
    if args.budget is not None and args.budget > MOST_BITS:
        raise InputError("--budget", found=args.budget, expected=f"at most {MOST_BITS}")
    check_group(args)
    check_ngpu(args.ngpu)
    least = {"weights_epochs": 0, "nas_epochs": 2, "nas_updates": 1, "epoch_tokens": 1}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise InputError(f"--{name}", found=getattr(args, name), expected=f"at least {low}")
    if not 0 <= args.seed < 2**32 - 1:
        raise InputError("--seed", found=args.seed, expected="0 .. 2^32 - 2")


def _check_table(path: Path) -> None:
    """Refuse to write over a table that another method made."""
    from espnet_mpq.sensitivity.table import SensitivityTable

    method = SensitivityTable.read(path).method if path.exists() else "nas"
    if method != "nas":
        raise MismatchError(
            f"{path} was made by another method",
            found=method,
            expected="nas",
            todo="use another --output_dir, or remove the file",
        )


def _options(args: argparse.Namespace, phase: str):
    from espnet_mpq.search.nas_options import NasOptions

    storage = dict(
        bits=tuple(sorted(set(args.bits))),
        grid=args.grid,
        tying=args.tying,
        group_size=args.group_size,
        phase=phase,
    )
    if phase == "weights":  # serves every budget and every second phase
        return NasOptions(**storage)
    relaxation = args.relaxation or ("softmax" if args.mode == JOINT else "gumbel")
    return NasOptions(
        budget=args.budget,
        budget_bytes=args.budget_bytes,
        relaxation=relaxation,
        temperature=args.temperature,
        final_temperature=args.final_temperature,
        lr=args.lr,
        penalty=args.penalty,
        beta=args.beta,
        **storage,
    )


def _split(args: argparse.Namespace) -> Dict[str, list]:
    """weights, heldout (pipelined) and valid: parts of the text, as (utt, sentence) pairs."""
    from espnet_mpq.text import read_text, split_valid

    rest = read_text(args.text, args.text_format)
    if args.valid_text:
        valid = read_text(args.valid_text, args.text_format)
    else:
        rest, valid = split_valid(rest, args.seed)
    if args.mode == JOINT:
        return {"weights": rest, "valid": valid}
    weights, heldout = split_valid(rest, args.seed + 1, most=len(rest))
    return {"weights": weights, "heldout": heldout, "valid": valid}


def _write_text(parts: Dict[str, list], folder: Path) -> None:
    from espnet_mpq.text import with_host_names, write_text

    for name, sentences in parts.items():
        write_text(folder / "text" / f"{name}.txt", with_host_names(sentences))


def _write_configs(args: argparse.Namespace, exp, user: dict, folder: Path) -> Dict[str, Path]:
    """Phase -> configuration for lm_train, in the order they are trained."""
    from espnet_mpq.hosts.espnet.lm.nas_config import nas_settings
    from espnet_mpq.hosts.espnet.lm.train_config import to_yaml
    from espnet_mpq.io import atomic_write
    from espnet_mpq.packed.size import packed_size
    from espnet_mpq.plan import budget_n_bytes
    from espnet_mpq.planning.planner import Planner
    from espnet_mpq.planning.storage import Storage

    _options(args, "joint")  # its checks, before those of the budget
    storage = Storage(args.grid, args.tying, args.group_size)
    smallest = Planner(exp.architecture, storage).uniform(min(args.bits))
    least = packed_size(exp.architecture, smallest)
    budget = budget_n_bytes(least.n_weights, args.budget, args.budget_bytes)
    if budget < least.n_bytes:
        raise InputError(
            "the budget is too small for this LM (header, scales and biases count)",
            found=f"{budget} bytes",
            expected=f"at least {least.n_bytes} bytes, {least.effective_bits:.4f} effective bits",
        )
    if args.mode == JOINT:
        phases = {"joint": ("train_lm_nas.yaml", args.nas_epochs)}
    else:
        phases = {
            "weights": ("train_lm_nas_weights.yaml", args.weights_epochs),
            "architecture": ("train_lm_nas.yaml", args.nas_epochs),
        }
    written = {}
    for phase, (name, epochs) in phases.items():
        if not epochs:
            continue
        settings = nas_settings(exp, _options(args, phase), epochs, user)
        if phase == "architecture":
            settings["num_iters_per_epoch"] = args.nas_updates
        head = (
            f"Search of bits, phase {phase}, written by\n"
            f"  {getattr(args, 'command_line', 'mpq nas')}\n"
            "Train with: python -m espnet_mpq -m espnet2.bin.lm_train --config THIS_FILE\n"
            "  --init_param CHECKPOINT (of the fp LM, or of the phase weights) --token_list ..."
        )
        written[phase] = folder / name
        atomic_write(folder / name, to_yaml(settings, head))
    return written


def _train(args, exp, user: dict, parts, configs: Dict[str, Path], folder: Path) -> Path:
    """The phases one after the other; returns the experiment with the architecture."""
    from espnet_mpq.hosts.espnet.experiment.opened import find_checkpoint
    from espnet_mpq.hosts.espnet.lm.train import train_lm

    found = init = None
    for phase, config in configs.items():
        print(f"== {phase} (log: {folder}/{phase}/train.log)", file=sys.stderr, flush=True)
        searches = phase == "architecture"
        found = train_lm(
            exp,
            config,
            parts["heldout" if searches else "weights"],
            parts["valid"],
            folder / phase,
            init=init,
            keep=[*user, "num_iters_per_epoch"] if searches else list(user),
            epoch_tokens=None if searches else args.epoch_tokens,
            ngpu=args.ngpu,
            seed=args.seed,
        )
        init = find_checkpoint(found) if phase == "weights" else None
    return found


def _record(args: argparse.Namespace, exp, options, checkpoint: Path) -> Dict:
    """The provenance of the table of a search."""
    files = {"config": exp.config, "checkpoint": exp.checkpoint, "text": args.text}
    record = provenance(args, {**files, "search": checkpoint})
    return {
        **record,
        **exp.identity,
        "text_sha256": record["inputs"]["text"]["sha256"],
        "text_format": args.text_format,
        "max_tokens": KL_TOKENS,
        "seed": args.seed,
        "grid": options.grid,
        "tying": options.tying,
        "group_size": options.group_size,
        "scale_dtype": options.scale_dtype,
        "bits": list(options.bits),
    }
