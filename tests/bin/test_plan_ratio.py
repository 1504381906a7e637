"""mpq plan: the joint KL is compared with the predicted sum only where that is above 0."""

from __future__ import annotations

import pytest

from espnet_mpq.bin import plan


@pytest.mark.parametrize("predicted, said", [(0.5, True), (0.0, False), (-0.5, False)])
def test_the_ratio_is_said_for_a_positive_sum_only(predicted, said):
    row = {"cluster": "c", "bits": 1, "n_weights": 8, "n_bytes": 1, "harm": 0.0, "stderr": None}
    totals = dict.fromkeys(("float_n_bytes", "header_n_bytes", "n_bytes", "fp_n_bytes"), 1)
    summary = {
        **totals,
        **{"rows": [row], "effective_bits": 1.0, "ratio": 1.0},
        **{"predicted": predicted, "predicted_stderr": None},
        **{"joint_kl": 1.0, "joint_kl_stderr": None},
        **{"method": "fisher", "unit": "nats/token"},
    }
    text = plan.format_summary(summary)
    assert "bytes  harm (fisher), nats/token" in text
    assert "bytes  KL, nats/token" in plan.format_summary({**summary, "method": "kl"})
    assert ("2.00 x the sum" in text) is said and (" x the sum" in text) is said
    assert " x the sum" not in plan.format_summary({**summary, "unit": "nats"})
