"""mpq_packed_asr: the host's own recogniser, whose layers compute from a packed file."""

from __future__ import annotations

import logging

from espnet2.asr.espnet_model import ESPnetASRModel

from espnet_mpq.errors import MismatchError
from espnet_mpq.hosts.espnet.asr.clusters import architecture_of
from espnet_mpq.packed.format import PackedModel
from espnet_mpq.packed.load import check_model
from espnet_mpq.plan import Plan
from espnet_mpq.runtime.kernel_forms import kernel_name
from espnet_mpq.runtime.modules import PackedLayers


class MpqPackedASRModel(ESPnetASRModel):
    """ESPnetASRModel built by the host from config.yaml, then with packed layers in place.

    Filled by load_into alone. It stays in eval mode and gives no gradients.

    Args:
        plan: the JSON form of the plan, as `mpq pack` wrote it to model_conf.
        **conf: as the host's class.

    Attributes:
        architecture, plan: of the packed file that it takes.

    Raises:
        PlanError: the plan does not fit this recogniser; InputError: it cannot be packed.
    """

    def __init__(self, plan: dict, **conf):
        super().__init__(**conf)
        self.architecture = architecture_of(self)
        self.plan = Plan.from_dict(plan)
        self._layers = PackedLayers(self, self.architecture, self.plan)
        self.train(False)

    def load(self, packed: PackedModel) -> None:
        """Take the tensors of a packed file; raises MismatchError for that of another model."""
        check_model(packed, self.architecture, self.plan, "packed recogniser")
        self._layers.fill(self, packed)
        logging.info("packed recogniser: kernel %s", kernel_name(self.architecture))

    def train(self, mode: bool = True) -> "MpqPackedASRModel":
        """Stays in eval mode: packed weights cannot be trained."""
        return super().train(False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        raise MismatchError(
            "a packed recogniser takes its weights from its packed file alone",
            found=f"a state dict with {len(state_dict)} entries",
            expected="packed.safetensors",
            todo="give packed.safetensors as --asr_model_file, or the config.yaml of the float "
            "recogniser with this checkpoint",
        )
