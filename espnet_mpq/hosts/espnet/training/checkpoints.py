"""The host's checkpoint files: kept whole when a run is killed, averages put back on the grid."""

from __future__ import annotations

import copy
import io
import logging
import os
import re
from pathlib import Path
from typing import Callable

import torch

from espnet_mpq.errors import CheckpointError
from espnet_mpq.hosts.espnet.experiment.state import read_state
from espnet_mpq.io import atomic_write
from espnet_mpq.state_file import is_whole

CHECKPOINT = "checkpoint.pth"
PREVIOUS = "checkpoint.prev.pth"
HALF = "checkpoint.half.pth"  # what a run left that was killed while it wrote its first one
AVERAGE = re.compile(r".+\.ave_\d+best(\.till\d+epoch)?\.pth")


def set_aside(output_dir: Path) -> None:
    """Move checkpoint.pth aside before the host overwrites it: its torch.save is not atomic."""
    if (output_dir / CHECKPOINT).exists():
        os.replace(output_dir / CHECKPOINT, output_dir / PREVIOUS)


def recover(output_dir: Path) -> None:
    """Before a run resumes: take the previous checkpoint if the last was not written whole.

    Half of a run's first checkpoint is set aside: there is nothing to lose.

    Raises:
        CheckpointError: checkpoint.pth is damaged, there is no whole previous one, and finished
            epochs are there that a new start would write over.
    """
    last, previous = output_dir / CHECKPOINT, output_dir / PREVIOUS
    if is_whole(last):
        return
    epochs = sorted(path.name for path in output_dir.glob("*epoch.pth"))
    if is_whole(previous):
        logging.warning(f"{last} is missing or damaged: resuming from {previous}")
        os.replace(previous, last)
    elif not epochs and last.is_file() and _may_be_half(last):
        logging.warning(f"{last} was not written whole: moved to {HALF}, training starts anew")
        os.replace(last, output_dir / HALF)
    elif os.path.lexists(last):
        todo = "move it away to train from the start"
        if epochs:
            todo += f", which writes over {', '.join(epochs[:4])}"
        raise CheckpointError(f"{last} is damaged and there is no {PREVIOUS}", todo=todo)


def _may_be_half(path: Path) -> bool:
    """Whether a file is the beginning of one of torch.save: nothing yet, zeros, or a zip's."""
    with open(path, "rb") as file:
        head = file.read(2)
    return head.strip(b"\x00") in (b"", b"P", b"PK")


def forget_previous(output_dir: Path) -> None:
    """Remove the previous checkpoint; the last one is whole."""
    if is_whole(output_dir / CHECKPOINT) and (output_dir / PREVIOUS).exists():
        (output_dir / PREVIOUS).unlink()


def mend_epoch_files(output_dir: Path, model: torch.nn.Module, reporter, criteria) -> None:
    """Write {n}epoch.pth and its links if the run was killed right after checkpoint.pth.

    Args:
        model: as just loaded from checkpoint.pth.
        reporter: the host's Reporter, loaded from it too.
        criteria: the host's best_model_criterion, [(phase, key, "min" | "max"), ...].
    """
    epoch = reporter.get_epoch()
    path = output_dir / f"{epoch}epoch.pth"
    if not is_whole(path):
        logging.warning(f"{path} is missing or damaged: written again from {CHECKPOINT}")
        atomic_save(path, model.state_dict())
    links = ["latest.pth"]
    for phase, key, mode in criteria:
        if reporter.has(phase, key) and reporter.get_best_epoch(phase, key, mode) == epoch:
            links.append(f"{phase}.{key}.best.pth")
    for link in (output_dir / name for name in links):
        if not link.is_symlink() or os.readlink(link) != path.name:
            if link.is_symlink() or link.exists():
                link.unlink()
            link.symlink_to(path.name)


def atomic_save(path: Path, value) -> None:
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    atomic_write(path, buffer.getvalue())


def project_averages(
    output_dir: Path,
    prefix: str,
    part: torch.nn.Module,
    project: Callable[[torch.nn.Module], None],
) -> None:
    """Put the host's n-best averages on the grid; the mean of grid points lies off it.

    Args:
        prefix: of the part's names in a checkpoint.
        part: what has the plan; a copy is used.
        project: projects the module it is given, in place.

    Raises:
        CheckpointError: an average is damaged.
    """
    paths = [p for p in output_dir.glob("*.pth") if AVERAGE.fullmatch(p.name)]
    paths = [p for p in paths if not p.is_symlink()]
    if not paths:
        return
    module = copy.deepcopy(part).cpu()
    for path in sorted(paths):
        state = read_state(path)
        own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        module.load_state_dict(own)
        project(module)
        state.update({prefix + k: v for k, v in module.state_dict().items()})
        atomic_save(path, state)
        logging.info(f"{path} was projected onto the grid of the plan")
