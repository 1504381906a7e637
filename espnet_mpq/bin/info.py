"""`mpq info`: verify a packed model and print its receipt; needs no ESPnet."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """example:
  mpq info exp/lm_packed
  mpq info exp/lm_packed --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mpq info`."""
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dir", help="directory of a packed LM, or its packed.safetensors")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    """Print the receipt of a packed LM after verifying every hash in it.

    Raises:
        InputError: there is no packed LM; FormatError: it is damaged.
    """
    import torch

    from espnet_mpq.io import to_json
    from espnet_mpq.packed.format import PACKED_FILE, load_packed
    from espnet_mpq.packed.receipt import format_receipt, receipt
    from espnet_mpq.runtime.kernel_forms import kernel_name

    path = Path(args.dir)
    path = path / PACKED_FILE if path.is_dir() else path
    packed = load_packed(path)
    value = {**receipt(packed), "kernel": kernel_name(packed.architecture)}
    value["n_threads"] = torch.get_num_threads()
    if args.json:
        print(to_json(value))
        return
    print(f"file             {path}")
    print(f"model            {packed.architecture.describe()}")
    print(f"token list       SHA-256 {value['token_list']['sha256']}")
    for key, fact in value["source"].items():
        print(f"{key:<22} {fact}")
    threads = "thread" if value["n_threads"] == 1 else "threads"
    print(f"kernel           {value['kernel']}, {value['n_threads']} {threads}")
    print()
    print(format_receipt(value))
