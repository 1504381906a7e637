"""The --mpq_* options of the host's training: made from the fields of AdmmOptions, and two more."""

from __future__ import annotations

import dataclasses
from typing import List, Optional, get_type_hints

from espnet2.train.trainer import TrainerOptions
from espnet2.utils.types import str2bool, str_or_none

from espnet_mpq.errors import InputError
from espnet_mpq.training.options import AdmmOptions

ADMM = dataclasses.fields(AdmmOptions)
TYPES = get_type_hints(AdmmOptions)


def add_arguments(parser) -> None:
    """Add every --mpq_* option to the host's parser."""
    group = parser.add_argument_group(description="Low-bit training (with a plan only)")
    for option in ADMM:
        # Choices are checked by AdmmOptions: a run that resumes reads them from a file.
        group.add_argument(
            f"--mpq_{option.name}",
            type=str2bool if TYPES[option.name] is bool else TYPES[option.name],
            default=option.default,
            help=option.metadata["help"].replace("%", "%%"),
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
    mpq_distill: float
    mpq_teacher: Optional[str]

    def admm(self) -> AdmmOptions:
        """The ADMM part, checked; raises InputError."""
        options = AdmmOptions(**{o.name: getattr(self, f"mpq_{o.name}") for o in ADMM})
        if not 0.0 <= self.mpq_distill <= 1.0:
            raise InputError("--mpq_distill", found=self.mpq_distill, expected="a weight in 0..1")
        if options.finish_epochs > self.max_epoch:
            raise InputError(
                "--mpq_finish_epochs",
                found=options.finish_epochs,
                expected=f"at most --max_epoch, which is {self.max_epoch}",
            )
        return options


MpqTrainerOptions = dataclasses.make_dataclass(
    "MpqTrainerOptions", [(f"mpq_{o.name}", TYPES[o.name]) for o in ADMM], bases=(_Named,)
)
