"""Checks of a training run with a plan: that it can start, and that it did train."""

from __future__ import annotations

import logging
from typing import List

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.io import sha256_file
from espnet_mpq.plan import Plan
from espnet_mpq.training.controller import Controller


def refuse_unsupported(optimizers, options) -> None:
    """Raise InputError for what cannot go together with a plan."""
    if len(optimizers) != 1:
        raise InputError("training with a plan", found=f"{len(optimizers)} optimizers", expected=1)
    for name in ("sharded_ddp", "use_adapter"):
        if getattr(options, name, False):
            raise InputError(f"training with a plan: --{name}", found=True, expected=False)
    # These unscale gradients and skip updates inside step(), where ADMM cannot look.
    if options.use_amp and getattr(optimizers[0], "_step_supports_amp_scaling", False):
        raise InputError(
            "training with a plan and --use_amp",
            found=f"a fused optimizer ({type(optimizers[0]).__name__})",
            expected="one that is not fused",
            todo="remove fused: true from optim_conf, or give --use_amp false",
        )


def check_start(plan: Plan, init_param: List[str]) -> None:
    """A run that does not resume begins with the fp LM that the plan was made for.

    Args:
        plan: where its source is recorded, the SHA-256 of the fp checkpoint counts.
        init_param: as given to the host; FILE:SRC:DST is not checked, it loads a part.

    Raises:
        MismatchError: no --init_param file has the recorded hash.
    """
    if not init_param:
        logging.warning(
            "NO --init_param: A LOW-BIT LM IS TRAINED FROM RANDOM WEIGHTS, which costs most of its "
            "quality. Give --init_param with the checkpoint of the trained fp LM."
        )
    expected = plan.source().get("checkpoint_sha256")
    whole = [path for path in init_param if ":" not in path]  # not FILE:SRC:DST
    if expected is None or not whole:
        return
    hashes = [sha256_file(path) for path in whole]
    if expected not in hashes:
        raise MismatchError(
            "the plan was made for another checkpoint than --init_param",
            found=", ".join(f"{path} with SHA-256 {h}" for path, h in zip(whole, hashes)),
            expected=f"SHA-256 {expected}",
            todo="make the plan for this checkpoint with `mpq plan`, or give the checkpoint it "
            "was made for as --init_param",
        )


def refuse_one_process_for_gpus(what: str, distributed_option) -> None:
    """Raise InputError where one process would drive several GPUs (DataParallel)."""
    if distributed_option.ngpu > 1 and not distributed_option.distributed:
        raise InputError(
            f"{what} in one process",
            found=f"--ngpu {distributed_option.ngpu}",
            expected="one process per GPU",
            todo="add --multiprocessing_distributed true, or give --ngpu 1",
        )


def check_nas_start(options, distributed_option) -> None:
    """Raise InputError for what a super-network cannot be trained with; warn of a cold start."""
    # DataParallel's copies of the model would share the candidates of the first GPU.
    refuse_one_process_for_gpus("search of bits", distributed_option)
    if options.mpq_distill:
        raise InputError("search of bits: --mpq_distill", found=options.mpq_distill, expected=0)
    if not options.init_param:
        logging.warning("NO --init_param: the bits are searched for an LM of random weights.")


def check_updates(controller: Controller, options) -> None:
    """Raise InputError if epochs went by, now or before a resume, without a single update."""
    if options.no_forward_run or not controller.is_idle():
        return
    raise InputError(
        "no update was made in any epoch: the LM is the projected fp LM",
        found=f"--accum_grad {options.accum_grad}",
        expected="at most the number of batches in an epoch, and finite gradients",
        todo="lower --accum_grad or the size of the batches, and train into a new folder "
        "(--output_dir)",
    )
