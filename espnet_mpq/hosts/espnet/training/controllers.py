"""Makes the controller that trains a model: ADMM with a plan, or a search of bits."""

from __future__ import annotations

import torch

from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.hosts.espnet.training.run_checks import check_nas_start, check_start
from espnet_mpq.hosts.espnet.training.teacher import attach_teacher
from espnet_mpq.search.nas import Penalty
from espnet_mpq.training.admm import AdmmController
from espnet_mpq.training.controller import Controller
from espnet_mpq.training.nas import NasController


def make_controller(
    model: torch.nn.Module,
    prefix: str,
    part: torch.nn.Module,
    optimizer,
    options,
    distributed_option,
    resumes: bool,
) -> Controller:
    """The controller of ``part``, a module of ``model`` with a plan or a mixture of bits.

    Args:
        prefix: of the part's names in a checkpoint.
        options: MpqTrainerOptions.
        resumes: from a checkpoint, so that --init_param counts no more.

    Raises:
        InputError, MismatchError: options that cannot be, or another fp model than the plan's.
    """
    if part.plan is None:
        check_nas_start(options, distributed_option)
        return NasController(Penalty(part.nas), part.candidates, optimizer, options.max_epoch)
    admm = options.admm()
    attach_teacher(model, prefix, part, options, distributed_option)
    if not resumes:
        check_start(part.plan, options.init_param)
    weights = ClusterWeights(part, part.architecture.clusters())
    return AdmmController(weights, part.plan, optimizer, admm)
