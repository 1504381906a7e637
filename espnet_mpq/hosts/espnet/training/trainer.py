"""MpqTrainer: the host's Trainer with ADMM around it for an LM with a plan, or a search of bits."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from contextlib import nullcontext
from pathlib import Path
from typing import List, Optional, Union

import torch
from espnet2.train.reporter import aggregate
from espnet2.train.trainer import Trainer, TrainerOptions
from espnet2.utils.build_dataclass import build_dataclass
from espnet2.utils.types import str2bool, str_or_none

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.hosts.espnet.experiment.state import read_state
from espnet_mpq.hosts.espnet.lm.model import MpqLanguageModel
from espnet_mpq.hosts.espnet.training import checkpoints
from espnet_mpq.hosts.espnet.training.replay import Replay
from espnet_mpq.hosts.espnet.training.run_checks import (
    check_nas_start,
    check_start,
    check_updates,
    refuse_unsupported,
)
from espnet_mpq.search.nas import Penalty
from espnet_mpq.training.admm import AdmmController
from espnet_mpq.training.nas import NasController
from espnet_mpq.training.on_grid import project_lm
from espnet_mpq.training.options import AdmmOptions

_DEFAULT = AdmmOptions()


@dataclasses.dataclass
class MpqTrainerOptions(TrainerOptions):
    """TrainerOptions and every --mpq_* option; the host copies same-named arguments in."""

    init_param: List[str]
    mpq_gamma: float
    mpq_gamma_schedule: str
    mpq_gamma_growth: float
    mpq_gamma_max: float
    mpq_dual_period: int
    mpq_projection: str
    mpq_als_rounds: int
    mpq_extragradient: bool
    mpq_eta1: float
    mpq_saved: str
    mpq_finish_epochs: int
    mpq_finish_lr: float
    mpq_distill: float
    mpq_teacher: Optional[str]

    def admm(self) -> AdmmOptions:
        """The ADMM part, checked; raises InputError."""
        values = {
            field.name: getattr(self, f"mpq_{field.name}")
            for field in dataclasses.fields(AdmmOptions)
            if field.name != "dual_period_updates"
        }
        options = AdmmOptions(dual_period_updates=self.mpq_dual_period, **values)
        if not 0.0 <= self.mpq_distill <= 1.0:
            raise InputError("--mpq_distill", found=self.mpq_distill, expected="a weight in 0..1")
        if options.finish_epochs > self.max_epoch:
            raise InputError(
                "--mpq_finish_epochs",
                found=options.finish_epochs,
                expected=f"at most --max_epoch, which is {self.max_epoch}",
            )
        return options


class MpqTrainer(Trainer):
    """Stock Trainer, byte for byte, unless ``model.lm`` has a plan or a mixture of bits (``nas``).

    With a plan: ADMM on the optimizer (training/admm.py); between epochs the model holds
    projected weights, so validation, {n}epoch.pth, the choice of the best model and n-best
    averages are those of the quantized LM. A super-network (``mpq_nas_*``): training/nas.py;
    validation is that of its one-best path. Like the host's trainer it is never instantiated.
    """

    _controller: Union[AdmmController, NasController, None] = None
    _options: Optional[MpqTrainerOptions] = None

    @classmethod
    def add_arguments(cls, parser):
        group = parser.add_argument_group(description="Low-bit training (LM with a plan only)")
        add = group.add_argument
        add("--mpq_gamma", type=float, default=_DEFAULT.gamma, help="ADMM penalty")
        add(
            "--mpq_gamma_schedule",
            type=str,
            default=_DEFAULT.gamma_schedule,
            help="constant (as published) or growing (--mpq_gamma_growth per epoch)",
        )
        add("--mpq_gamma_growth", type=float, default=_DEFAULT.gamma_growth, help="per epoch")
        add("--mpq_gamma_max", type=float, default=_DEFAULT.gamma_max, help="ceiling of gamma")
        add(
            "--mpq_dual_period",
            type=int,
            default=_DEFAULT.dual_period_updates,
            help="updates between two dual updates, 0 = once per epoch",
        )
        add("--mpq_projection", type=str, default=_DEFAULT.projection, help="mse or als")
        add("--mpq_als_rounds", type=int, default=_DEFAULT.als_rounds, help="rounds of als")
        add(
            "--mpq_extragradient",
            type=str2bool,
            default=_DEFAULT.extragradient,
            help="two gradient evaluations per update (as published)",
        )
        add("--mpq_eta1", type=float, default=_DEFAULT.eta1, help="extragradient probe step")
        add(
            "--mpq_saved",
            type=str,
            default=_DEFAULT.saved,
            help="validate and save the projection of: weights, table (weights + dual), or auto",
        )
        add(
            "--mpq_finish_epochs",
            type=int,
            default=_DEFAULT.finish_epochs,
            help="last epochs: codes frozen, scales and float parameters tuned",
        )
        add("--mpq_finish_lr", type=float, default=_DEFAULT.finish_lr, help="for log scales")
        add(
            "--mpq_distill",
            type=float,
            default=0.0,
            help="weight of KL(fp LM || LM in training) in the loss, 0..1 (needs --model mpq_lm)",
        )
        add(
            "--mpq_teacher",
            type=str_or_none,
            default=None,
            help="checkpoint of the fp LM to distill from; default: the --init_param file",
        )

    @classmethod
    def build_options(cls, args) -> TrainerOptions:
        return build_dataclass(MpqTrainerOptions, args)

    @classmethod
    def run(cls, model, optimizers, trainer_options, distributed_option, **others) -> None:
        arguments = dict(
            model=model,
            optimizers=optimizers,
            trainer_options=trainer_options,
            distributed_option=distributed_option,
            **others,
        )
        lm = getattr(model, "lm", None)
        plan = getattr(lm, "plan", None)
        if plan is None and getattr(lm, "nas", None) is None:
            super().run(**arguments)
            return
        refuse_unsupported(optimizers, trainer_options)
        if plan is not None:
            admm = trainer_options.admm()
            _attach_teacher(model, trainer_options, distributed_option)
        output_dir = Path(trainer_options.output_dir)
        first = not distributed_option.distributed or distributed_option.dist_rank == 0
        if first and trainer_options.resume:
            checkpoints.recover(output_dir)
        if distributed_option.distributed:
            torch.distributed.barrier()
        resumes = trainer_options.resume and (output_dir / checkpoints.CHECKPOINT).exists()
        if plan is not None:
            if not resumes:
                check_start(plan, trainer_options.init_param)
            controller = AdmmController(lm, plan, optimizers[0], admm)
        else:
            check_nas_start(trainer_options, distributed_option)
            max_epoch = trainer_options.max_epoch
            controller = NasController(Penalty(lm.nas), lm.candidates, optimizers[0], max_epoch)
        cls._controller, cls._options = controller, trainer_options
        try:
            super().run(**arguments)
        finally:
            cls._controller = cls._options = None
        if plan is not None:
            check_updates(controller, trainer_options)
        if first:
            if plan is not None:
                checkpoints.project_averages(output_dir, model, lambda lm: project_lm(lm, plan))
            checkpoints.forget_previous(output_dir)

    @classmethod
    def resume(cls, checkpoint, model, reporter, optimizers, **others):
        Trainer.resume(
            checkpoint=checkpoint, model=model, reporter=reporter, optimizers=optimizers, **others
        )
        if cls._controller is not None and _is_first_process():
            criteria = cls._options.best_model_criterion
            checkpoints.mend_epoch_files(Path(checkpoint).parent, model, reporter, criteria)

    @classmethod
    def train_one_epoch(
        cls, model, iterator, optimizers, scaler, reporter, options, distributed_option, **others
    ) -> bool:
        controller = cls._controller
        watching = nullcontext(iterator)
        if controller is not None:
            # Gradients of an unfinished accumulation window would not survive a restart.
            optimizers[0].zero_grad()
            controller.start_epoch(options.max_epoch - reporter.get_epoch() + 1)
            if getattr(controller.options, "extragradient", False):
                replay = Replay(
                    model, optimizers[0], scaler, options, distributed_option.distributed
                )
                controller.gradient_at = replay
                watching = replay.watching(iterator)
        with watching as watched:
            all_steps_are_invalid = super().train_one_epoch(
                model=model,
                iterator=watched,
                optimizers=optimizers,
                scaler=scaler,
                reporter=reporter,
                options=options,
                distributed_option=distributed_option,
                **others,
            )
        if controller is not None:
            if watching is not iterator:
                controller.gradient_at = None
            controller.end_epoch()
        return all_steps_are_invalid

    @classmethod
    def validate_one_epoch(cls, model, iterator, reporter, options, distributed_option) -> None:
        super().validate_one_epoch(
            model=model,
            iterator=iterator,
            reporter=reporter,
            options=options,
            distributed_option=distributed_option,
        )
        controller = cls._controller
        if controller is None:
            return
        losses = reporter.stats.get("loss")
        loss_nats = float(aggregate(losses)) if losses else math.nan
        reporter.register({"ppl": math.exp(min(loss_nats, 700.0)), **controller.stats(loss_nats)})
        reporter.next()
        if _is_first_process():
            # The host's next act is to write checkpoint.pth.
            checkpoints.set_aside(Path(options.output_dir))


def _is_first_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _attach_teacher(model, options: MpqTrainerOptions, distributed_option) -> None:
    if options.mpq_distill == 0.0:
        return
    if distributed_option.ngpu > 1 and not distributed_option.distributed:
        # DataParallel copies the model to every GPU, but not the teacher, which is no part of it.
        raise InputError(
            "--mpq_distill in one process",
            found=f"--ngpu {distributed_option.ngpu}",
            expected="one process per GPU",
            todo="add --multiprocessing_distributed true, or give --ngpu 1",
        )
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
    teacher = copy.deepcopy(model.lm)
    if options.mpq_teacher is not None:
        _load_teacher(teacher, options.mpq_teacher)
    model.set_teacher(teacher, options.mpq_distill)
    logging.info(f"Distilling from {options.mpq_teacher or options.init_param[0]}")


def _load_teacher(teacher: torch.nn.Module, path: str) -> None:
    prefix = "lm."
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
