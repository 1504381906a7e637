"""What every trainable mpq_* LM adds to the host's class: its plan and strict loading."""

from __future__ import annotations

from typing import Optional

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.errors import MismatchError
from espnet_mpq.hosts.espnet import families
from espnet_mpq.plan import Plan


class PlannedLm:
    """Mixin in front of an LM class of the host; parameters keep the host's names.

    The forward pass is the host's own: the trainer writes projected weights into the
    parameters before it validates or saves, so checkpoints lie on the grid.

    Attributes:
        architecture: the shape of the LM.
        plan: as given, None for a plain fp LM.

    Args:
        plan: the JSON form of a Plan (``lm_conf.plan``), or None for a plain fp LM.
        **host_options: as the host's class.

    Raises:
        PlanError: the plan does not fit this LM.
    """

    FP_LM: str  # the host's name of the class with float weights
    architecture: Architecture
    plan: Optional[Plan]

    def __init__(self, vocab_size: int, plan: Optional[dict] = None, **host_options):
        super().__init__(vocab_size=vocab_size, **host_options)
        self.architecture = families.architecture_of(self.FP_LM, host_options, vocab_size)
        self.plan = None
        if plan is not None:
            self.plan = Plan.from_dict(plan)
            self.plan.check(self.architecture.clusters())

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if not hasattr(self, "nas"):  # weights of a super-network, without its architecture
            state_dict.pop(f"{prefix}nas.logits", None)
        # The host loads with strict=False and would take a file without one matching key.
        missing = [name for name in self.state_dict() if prefix + name not in state_dict]
        if missing:
            raise MismatchError(
                "checkpoint does not belong to this LM",
                found=f"no {prefix + missing[0]} ({len(missing)} tensors missing)",
                expected=f"{', '.join(prefix + name for name in list(self.state_dict())[:3])}, ...",
                todo="check --lm_file / --init_param and the lm_conf it was trained with",
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
