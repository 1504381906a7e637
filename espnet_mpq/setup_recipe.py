"""Adds mpq.sh to an ESPnet recipe folder; nothing that is already there is changed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Optional, Sequence, Union

from espnet_mpq.errors import InputError, MpqError
from espnet_mpq.io import atomic_write

TEMPLATE = Path(__file__).parent / "recipe" / "mpq.sh"
NEEDED = ("path.sh", "cmd.sh", "utils/parse_options.sh")


def setup_recipe(folder: Union[str, Path], force: bool = False) -> bool:
    """Put mpq.sh into a recipe folder such as `egs2/<corpus>/asr1`.

    Args:
        folder: the recipe, with the host's path.sh, cmd.sh and utils/.
        force: replace an mpq.sh that differs from the one of this version.

    Returns:
        False if the same mpq.sh was there already.

    Raises:
        InputError: not a recipe folder, or a different mpq.sh is there and not ``force``.
    """
    folder = Path(folder)
    missing = [name for name in NEEDED if not (folder / name).exists()]
    if missing:
        raise InputError(
            f"{folder} is not a recipe folder of the host",
            found="no " + ", no ".join(missing) if folder.is_dir() else "no such folder",
            expected="a folder like egs2/<corpus>/asr1 with run.sh, path.sh, cmd.sh and utils/",
        )
    content = TEMPLATE.read_bytes()
    target = folder / TEMPLATE.name
    if os.path.lexists(target):
        if target.is_file() and target.read_bytes() == content:
            return False
        if not force:
            raise InputError(
                f"{target} is there already and differs from the one of this version",
                todo="keep it, or look at the difference and repeat with --force to replace it",
            )
    atomic_write(target, content)
    target.chmod(target.stat().st_mode | 0o111)
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("folder", help="recipe folder, e.g. egs2/an4/asr1")
    parser.add_argument("--force", action="store_true", help="replace an mpq.sh that differs")


def report(args: argparse.Namespace) -> None:
    """Set the recipe up and say what to type next."""
    written = setup_recipe(args.folder, args.force)
    print(f"{Path(args.folder) / TEMPLATE.name}: {'written' if written else 'is up to date'}")
    print(
        f"next: cd {args.folder} && ./mpq.sh --lm_exp exp/lm_... --asr_exp exp/asr_..."
        ' --budget 2.0 --test_sets "..."   (./mpq.sh --help lists the options)'
    )


def main(command: Optional[Sequence[str]] = None) -> None:
    """Entry of `python -m espnet_mpq.setup_recipe`."""
    parser = argparse.ArgumentParser(prog="python -m espnet_mpq.setup_recipe", description=__doc__)
    add_arguments(parser)
    try:
        report(parser.parse_args(command))
    except MpqError as error:
        sys.exit(f"setup_recipe: error: {error}")


if __name__ == "__main__":
    main()
