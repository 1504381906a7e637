"""mpq_transformer: the host's Transformer LM together with its plan."""

from __future__ import annotations

from espnet2.lm.transformer_lm import TransformerLM

from espnet_mpq.hosts.espnet.lm.planned import PlannedLm


class MpqTransformerLM(PlannedLm, TransformerLM):
    """TransformerLM whose ``lm_conf`` may carry a plan.

    Options of the host: vocab_size, pos_enc (None or "sinusoidal"), embed_unit, att_unit, head,
    unit, layer, dropout_rate, positional_dropout_rate, attention_dropout_rate.
    """

    FP_LM = "transformer"
