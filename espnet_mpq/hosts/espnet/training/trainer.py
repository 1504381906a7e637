"""MpqTrainer: the host's Trainer with a Controller around it for a model with a plan."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Optional

import torch
from espnet2.train.reporter import aggregate
from espnet2.train.trainer import Trainer, TrainerOptions
from espnet2.utils.build_dataclass import build_dataclass

from espnet_mpq.hosts.espnet.training import checkpoints
from espnet_mpq.hosts.espnet.training.controllers import make_controller
from espnet_mpq.hosts.espnet.training.options import MpqTrainerOptions, add_arguments
from espnet_mpq.hosts.espnet.training.planned import planned_part
from espnet_mpq.hosts.espnet.training.replay import Replay
from espnet_mpq.hosts.espnet.training.run_checks import check_updates, refuse_unsupported
from espnet_mpq.training.controller import Controller


class MpqTrainer(Trainer):
    """Stock Trainer, byte for byte, unless the model has a plan or searches its bits.

    Then a training.controller.Controller hangs on the optimizer. With a plan the model holds
    projected weights between epochs, so validation, {n}epoch.pth, the choice of the best model and
    n-best averages are those of the quantized model. Of a super-network (``mpq_nas_*``) validation
    is that of its one-best path. Like the host's trainer it is never instantiated.
    """

    _controller: Optional[Controller] = None
    _options: Optional[MpqTrainerOptions] = None

    @classmethod
    def add_arguments(cls, parser):
        """The --mpq_* options."""
        add_arguments(parser)

    @classmethod
    def build_options(cls, args) -> TrainerOptions:
        """The host's options and ours, from the arguments."""
        return build_dataclass(MpqTrainerOptions, args)

    @classmethod
    def run(cls, model, optimizers, trainer_options, distributed_option, **others) -> None:
        """The host's run, with a controller on the optimizer and averages on the grid."""
        arguments = dict(
            model=model,
            optimizers=optimizers,
            trainer_options=trainer_options,
            distributed_option=distributed_option,
            **others,
        )
        prefix, part = planned_part(model)
        if part is None:
            super().run(**arguments)
            return
        refuse_unsupported(optimizers, trainer_options)
        output_dir = Path(trainer_options.output_dir)
        first = not distributed_option.distributed or distributed_option.dist_rank == 0
        if first and trainer_options.resume:
            checkpoints.recover(output_dir)
        if distributed_option.distributed:
            torch.distributed.barrier()
        resumes = trainer_options.resume and (output_dir / checkpoints.CHECKPOINT).exists()
        controller = make_controller(
            model, prefix, part, optimizers[0], trainer_options, distributed_option, resumes
        )
        cls._controller, cls._options = controller, trainer_options
        try:
            super().run(**arguments)
        finally:
            cls._controller = cls._options = None
        check_updates(controller, trainer_options)
        if first:
            checkpoints.project_averages(output_dir, prefix, part, controller.project)
            checkpoints.forget_previous(output_dir)

    @classmethod
    def resume(cls, checkpoint, model, reporter, optimizers, **others):
        """The host's, then mends what a kill right after checkpoint.pth left undone."""
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
        """The host's epoch between start_epoch and end_epoch of the controller."""
        controller = cls._controller
        watching = nullcontext(iterator)
        if controller is not None:
            # Gradients of an unfinished accumulation window would not survive a restart.
            optimizers[0].zero_grad()
            controller.n_updates_in_epoch = _n_updates(iterator, options.accum_grad)
            controller.start_epoch(options.max_epoch - reporter.get_epoch() + 1)
            if controller.wants_gradient:
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
            controller.gradient_at = None
            controller.end_epoch()
        return all_steps_are_invalid

    @classmethod
    def validate_one_epoch(cls, model, iterator, reporter, options, distributed_option) -> None:
        """The host's validation; reports perplexity and the controller's figures as well."""
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


def _n_updates(iterator, accum_grad: int) -> Optional[int]:
    """Optimizer updates of an epoch, None where the iterator does not know its length."""
    try:
        return len(iterator) // accum_grad
    except TypeError:
        return None


def _is_first_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
