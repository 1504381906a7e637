"""Makes the controller that trains a model: ADMM or QAT with a plan, or a search of bits."""

from __future__ import annotations

import torch

from espnet_mpq.clusters import ClusterWeights, as_matrix
from espnet_mpq.hosts.espnet.training.run_checks import check_nas_start, check_start
from espnet_mpq.hosts.espnet.training.teacher import attach_teacher
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.packed.format import load_packed
from espnet_mpq.packed.load import check_model
from espnet_mpq.search.nas import Penalty
from espnet_mpq.training.admm import AdmmController
from espnet_mpq.training.controller import Controller
from espnet_mpq.training.nas import NasController
from espnet_mpq.training.on_grid import OnGrid, project
from espnet_mpq.training.qat import QatController


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
    chosen = options.qat() if options.mpq_trainer == "qat" else options.admm()
    attach_teacher(model, prefix, part, options, distributed_option)
    if not resumes:
        check_start(part.plan, options.init_param)
    weights = ClusterWeights(part, part.architecture.clusters())
    if options.mpq_trainer != "qat":
        return AdmmController(weights, part.plan, optimizer, chosen)
    start = None
    if options.mpq_start is not None and not resumes:
        start = read_start(options.mpq_start, part)
    return QatController(weights, part.plan, optimizer, chosen, start)


def read_start(path: str, part: torch.nn.Module) -> OnGrid:
    """Scales and codes of a packed model with the plan of ``part``; gives its biases to ``part``.

    The matrices of ``part`` stay float: a start moves them just inside the cells of the codes.

    Raises:
        InputError, FormatError: no packed file; MismatchError: of another model or plan.
    """
    packed = load_packed(path)
    check_model(packed, part.architecture, part.plan, path)
    state = float_state(packed)
    with torch.no_grad():
        parameters = dict(part.named_parameters())
        for name, _ in part.architecture.rest():
            parameters[name].copy_(state[name])
    device = next(part.parameters()).device
    mats = {
        cluster.name: [
            as_matrix(state[p.parameter])[p.start : p.stop].to(device) for p in cluster.parts
        ]
        for cluster in part.architecture.clusters()
    }
    return project(mats, part.plan)  # which finds what lies on the grid
