"""mpq_seq_rnn: the host's recurrent LM (LSTM, GRU, plain RNN) together with its plan."""

from __future__ import annotations

from espnet2.lm.seq_rnn_lm import SequentialRNNLM

from espnet_mpq.hosts.espnet.lm.planned import PlannedLm


class MpqSequentialRNNLM(PlannedLm, SequentialRNNLM):
    """SequentialRNNLM whose ``lm_conf`` may carry a plan.

    Options of the host: vocab_size, unit, nhid, nlayers, dropout_rate, tie_weights, rnn_type,
    ignore_id.
    """

    FP_LM = "seq_rnn"
