"""mpq_lm: the host's language model loss, with distillation from a teacher LM while training."""

from __future__ import annotations

from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from espnet2.lm.espnet_model import ESPnetLanguageModel
from espnet2.torch_utils.device_funcs import force_gatherable

from espnet_mpq.training.distillation import kl_distillation


class MpqLanguageModel(ESPnetLanguageModel):
    """ESPnetLanguageModel with loss (1 - w) CE + w KL(teacher || student) in train mode.

    Without a teacher, and always in eval mode, it is the host's own model.
    """

    # The teacher sits in a tuple so that it is no submodule: it is neither trained, saved,
    # moved, nor synchronised with the model.
    _teacher: Tuple[torch.nn.Module, ...] = ()
    distill_weight: float = 0.0

    @property
    def teacher(self) -> Optional[torch.nn.Module]:
        return self._teacher[0] if self._teacher else None

    def set_teacher(self, teacher: Optional[torch.nn.Module], weight: float) -> None:
        """Distill from ``teacher`` (an LM: (tokens, None) -> (logits, state)); None ends it."""
        if teacher is not None:
            teacher.eval()
            for parameter in teacher.parameters():
                parameter.requires_grad_(False)
        self._teacher = () if teacher is None else (teacher,)
        self.distill_weight = float(weight) if teacher is not None else 0.0

    def forward(
        self, text: torch.Tensor, text_lengths: torch.Tensor, **kwargs
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor], torch.Tensor]:
        """As the host's; text (batch, length) token ids, text_lengths (batch,).

        Training with a teacher adds ``kl`` (nats per token) to the stats; ``loss`` there
        stays the cross entropy, so that it compares with runs without distillation.
        """
        if not self.training or self.teacher is None:
            return super().forward(text, text_lengths, **kwargs)
        text = text[:, : text_lengths.max()]
        inputs = F.pad(text, [1, 0], "constant", self.eos)
        targets = F.pad(text, [0, 1], "constant", self.ignore_id)
        targets.scatter_(1, text_lengths[:, None].to(targets), self.eos)
        positions = torch.arange(inputs.shape[1], device=text.device)
        mask = positions[None, :] <= text_lengths[:, None].to(text.device)

        logits, _ = self.lm(inputs, None)
        with torch.no_grad():
            teacher_logits, _ = self.teacher(inputs, None)
        n_tokens = mask.sum()
        cross_entropy = F.cross_entropy(logits[mask], targets[mask], reduction="sum") / n_tokens
        kl = kl_distillation(logits, teacher_logits, mask)
        loss = (1.0 - self.distill_weight) * cross_entropy + self.distill_weight * kl
        stats = {"loss": cross_entropy.detach(), "kl": kl.detach()}
        return force_gatherable((loss, stats, n_tokens), loss.device)
