"""The fp model as teacher of the one in training."""

from __future__ import annotations

import copy
import logging

import torch

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.hosts.espnet.experiment.state import read_state
from espnet_mpq.hosts.espnet.lm.model import MpqLanguageModel
from espnet_mpq.hosts.espnet.training.options import MpqTrainerOptions
from espnet_mpq.hosts.espnet.training.run_checks import refuse_one_process_for_gpus


def attach_teacher(
    model, prefix: str, part: torch.nn.Module, options: MpqTrainerOptions, distributed_option
) -> None:
    """Give ``model`` its teacher as --mpq_distill and --mpq_teacher say: a copy of ``part``.

    Args:
        prefix: of the part's names in a checkpoint.

    Raises:
        InputError: it cannot be distilled so; MismatchError: a teacher of another size.
    """
    if options.mpq_distill == 0.0:
        return
    # DataParallel copies the model to every GPU, but not the teacher, which is no part of it.
    refuse_one_process_for_gpus("--mpq_distill", distributed_option)
    if not isinstance(model, MpqLanguageModel):
        raise InputError(
            "--mpq_distill", found=type(model).__name__, expected="--model mpq_lm in the config"
        )
    if options.mpq_teacher is None and not options.init_param:
        raise InputError(
            "--mpq_distill: no teacher",
            expected="--mpq_teacher FILE or --init_param FILE with the fp LM",
        )
    # At this point the model is what --init_param made of it, also when a run resumes.
    teacher = copy.deepcopy(part)
    if options.mpq_teacher is not None:
        _load_teacher(teacher, prefix, options.mpq_teacher)
    model.set_teacher(teacher, options.mpq_distill)
    logging.info(f"Distilling from {options.mpq_teacher or options.init_param[0]}")


def _load_teacher(teacher: torch.nn.Module, prefix: str, path: str) -> None:
    state = read_state(path)
    state = {k[len(prefix) :] if k.startswith(prefix) else k: v for k, v in state.items()}
    try:
        teacher.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:  # shapes and names; values that are no tensors
        raise MismatchError(
            f"--mpq_teacher {path} is not a checkpoint of this LM",
            found=str(error).splitlines()[-1].strip(),
            todo="distill from an fp LM of the same size and token list",
        ) from error
