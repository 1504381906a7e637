"""What every mpq_packed_* LM has in place of the host's parameters: a packed runtime."""

from __future__ import annotations

import logging
from typing import Mapping

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.hosts.espnet import families
from espnet_mpq.packed.format import PackedModel
from espnet_mpq.plan import Plan
from espnet_mpq.runtime.packed import PackedModule


class PackedHostLm:
    """Mixin in front of an LM class of the host, built empty and filled by load_into alone.

    It has no parameters, stays in eval mode and gives no gradients. Subclasses name the
    RUNTIME and call ``build`` once torch.nn.Module is initialised.
    """

    RUNTIME: type
    packed: PackedModule

    def build(self, lm: str, lm_conf: Mapping, vocab_size: int, plan: Mapping) -> None:
        """Make the empty runtime; raises PlanError or InputError for what cannot be."""
        architecture = families.architecture_of(lm, lm_conf, vocab_size)
        self.packed = self.RUNTIME(architecture, Plan.from_dict(plan))
        self.train(False)

    @property
    def architecture(self) -> Architecture:
        return self.packed.architecture

    @property
    def plan(self) -> Plan:
        return self.packed.plan

    def load(self, packed: PackedModel) -> None:
        """Take the tensors of a packed LM; raises MismatchError for another one."""
        self.packed.load(packed)
        logging.info("packed LM: kernel %s", self.packed.kernel())

    def train(self, mode: bool = True):
        """Stays in eval mode: some of the host's programs never call eval()."""
        return super().train(False)
