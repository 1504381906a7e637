"""Opens the experiment of a super-network that searched the bits of an LM."""

from __future__ import annotations

from pathlib import Path
from typing import Tuple

import torch

from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm


def open_search(folder: Path) -> Tuple[torch.nn.Module, Path]:
    """The super-network of an experiment, and the checkpoint whose architecture counts.

    Raises:
        InputError: the experiment is none of a search, or has only its first phase.
    """
    best = folder / "valid.nas_loss.best.pth"
    opened = load_fp_lm(folder, str(best.resolve()) if best.exists() else None)
    lm = opened.module
    if getattr(lm, "nas", None) is None:
        raise InputError(
            f"{folder} is no search of bits",
            found=f"lm: {opened.args.lm}",
            expected="lm: mpq_nas_seq_rnn or mpq_nas_transformer",
        )
    if lm.nas.options.phase == "weights":
        raise InputError(
            f"{folder} is the first phase of a search, without an architecture",
            todo="train the second phase with train_lm_nas.yaml",
        )
    return lm, opened.checkpoint
