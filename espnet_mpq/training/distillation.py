"""Distillation: pull the softmax of the LM in training towards that of the fp LM."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def kl_distillation(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean KL(teacher || student) over the whole vocabulary, in nats per token.

    Args:
        student_logits: (..., vocabulary), any float dtype; carries the gradient.
        teacher_logits: as student_logits; no gradient flows into it.
        mask: (...) bool, True where a token counts.

    Returns:
        float32 scalar; 0 when no token counts.

    Source: own choice of direction; distillation of low-bit models from the fp model as in
    arXiv 2406.10160. Computed in float32, since bfloat16 log-softmax loses the small tail.
    """
    log_q = F.log_softmax(student_logits[mask].float(), dim=-1)
    log_p = F.log_softmax(teacher_logits.detach()[mask].float(), dim=-1)
    n_tokens = max(log_q.shape[0], 1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / n_tokens
