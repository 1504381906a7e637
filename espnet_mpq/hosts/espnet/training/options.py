"""The --mpq_* options of the host's training: fields of AdmmOptions and QatOptions, and a few."""

from __future__ import annotations

import dataclasses
from typing import List, Optional, get_type_hints

from espnet2.train.trainer import TrainerOptions
from espnet2.utils.types import str2bool, str_or_none

from espnet_mpq.errors import InputError
from espnet_mpq.training.options import TRAINERS, AdmmOptions, QatOptions

ADMM, QAT = dataclasses.fields(AdmmOptions), dataclasses.fields(QatOptions)
TYPES = {**get_type_hints(AdmmOptions), **get_type_hints(QatOptions)}


def add_arguments(parser) -> None:
    """Add every --mpq_* option to the host's parser."""
    group = parser.add_argument_group(description="Low-bit training (with a plan only)")
    group.add_argument(
        "--mpq_trainer",
        default=TRAINERS[0],
        help="admm, or qat: straight-through training with learned scales",
    )
    for option in (*ADMM, *QAT):
        # Choices are checked by AdmmOptions: a run that resumes reads them from a file.
        group.add_argument(
            f"--mpq_{option.name}",
            type=str2bool if TYPES[option.name] is bool else TYPES[option.name],
            default=option.default,
            help=option.metadata["help"].replace("%", "%%"),
        )
    group.add_argument(
        "--mpq_start",
        type=str_or_none,
        default=None,
        help="packed.safetensors with the plan of the run, whose codes, scales and biases qat"
        " starts from: mpq pack --rounding second_order of the --init_param LM",
    )
    group.add_argument(
        "--mpq_distill",
        type=float,
        default=0.0,
        help="weight of KL(fp || model in training) in the loss, 0..1 (needs --model mpq_lm)",
    )
    group.add_argument(
        "--mpq_teacher",
        type=str_or_none,
        default=None,
        help="checkpoint of the fp model to distill from; default: the --init_param file",
    )


@dataclasses.dataclass
class _Named(TrainerOptions):
    """What the host copies in from arguments of the same names, besides its own options."""

    init_param: List[str]
    mpq_trainer: str
    mpq_start: Optional[str]
    mpq_distill: float
    mpq_teacher: Optional[str]

    def admm(self) -> AdmmOptions:
        """The ADMM part, checked; raises InputError."""
        options = AdmmOptions(**{o.name: getattr(self, f"mpq_{o.name}") for o in ADMM})
        self._check_shared()
        if self.mpq_start is not None:
            raise InputError("--mpq_start", found="--mpq_trainer admm", expected="qat")
        if options.finish_epochs > self.max_epoch:
            raise InputError(
                "--mpq_finish_epochs",
                found=options.finish_epochs,
                expected=f"at most --max_epoch, which is {self.max_epoch}",
            )
        return options

    def qat(self) -> QatOptions:
        """The QAT part, checked; raises InputError."""
        self._check_shared()
        return QatOptions(**{o.name: getattr(self, f"mpq_{o.name}") for o in QAT})

    def _check_shared(self) -> None:
        if self.mpq_trainer not in TRAINERS:
            expected = " or ".join(TRAINERS)
            raise InputError("--mpq_trainer", found=self.mpq_trainer, expected=expected)
        if not 0.0 <= self.mpq_distill <= 1.0:
            raise InputError("--mpq_distill", found=self.mpq_distill, expected="a weight in 0..1")


MpqTrainerOptions = dataclasses.make_dataclass(
    "MpqTrainerOptions", [(f"mpq_{o.name}", TYPES[o.name]) for o in (*ADMM, *QAT)], bases=(_Named,)
)
