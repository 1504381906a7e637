"""The kernels inside the host: its LM calls and its beam search with int8 activations."""

from __future__ import annotations

import pytest
import torch

from espnet_mpq.plan import uniform_plan


@pytest.fixture(scope="module")
def int8_exp(fp_exp, tmp_path_factory):
    """`fp_exp` with 4 bits everywhere: all of it has kernels."""
    from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment
    from espnet_mpq.hosts.espnet.families import architecture_of

    clusters = architecture_of("seq_rnn", fp_exp.settings["lm_conf"], 31).clusters()
    folder = tmp_path_factory.mktemp("int8") / "lm_packed"
    pack_experiment(fp_exp.path, folder, plan=uniform_plan(clusters, 4))
    return folder


@pytest.fixture
def lm(host, int8_exp, kernels):
    model, _ = host.LMTask.build_model_from_file(
        str(int8_exp / "config.yaml"), str(int8_exp / "packed.safetensors")
    )
    assert model.lm.packed.kernel() == kernels[-1]
    return model.eval().lm


def test_score_batch_score_and_forward_agree(lm):
    """The same floats from all three calls, with states in any mixture."""
    ids = torch.randint(1, 31, (5, 7), generator=torch.Generator().manual_seed(1))
    logits, _ = lm(ids, None)
    states, before = [None] * 5, None
    for t in range(7):
        log_probs, states = lm.batch_score(ids[:, : t + 1], states, None)
        assert torch.allclose(log_probs, logits[:, t].log_softmax(-1), atol=1e-5)
        # One hypothesis alone, from the state that the batch gave.
        if t:
            alone, state = lm.score(ids[2, : t + 1], before, None)
            assert torch.equal(alone, log_probs[2])
            assert torch.equal(state[0][:, 0], states[2][0])
        before = states[2]
    assert states[0][0].shape == (2, 16) and not log_probs.requires_grad
    # A smaller batch, one hypothesis at its start.
    mixture, _ = lm.batch_score(ids[:2, :1], [states[3], None], None)
    start, _ = lm.score(ids[1, :1], None, None)
    assert torch.equal(mixture[1], start)
    assert lm.packed._lstm is not None and lm.packed._dense is None


def test_beam_search(lm, int8_exp, asr_exp, kernels, monkeypatch):
    """The same n-best, to the last digit, on every path; nearly so with float activations."""
    from espnet2.bin.asr_inference import Speech2Text

    generator = torch.Generator().manual_seed(5)
    speech = (0.1 * torch.randn(5000, generator=generator)).numpy()
    decoder = Speech2Text(
        asr_train_config=str(asr_exp.config),
        asr_model_file=str(asr_exp.checkpoint),
        lm_train_config=str(int8_exp / "config.yaml"),
        lm_file=str(int8_exp / "packed.safetensors"),
        beam_size=4,
        lm_weight=2.0,
        ctc_weight=0.3,
        maxlenratio=0.5,
        nbest=3,
    )
    found = {}
    for path in (*kernels, "reference"):
        monkeypatch.setenv("MPQ_KERNEL", path)
        found[path] = [
            ([int(i) for i in h.yseq], float(h.score), float(h.scores["lm"]))
            for *_, h in decoder(speech)
        ]
    want = found[kernels[0]]
    assert len(want[0][0]) > 5 and all(found[path] == want for path in kernels)
    best, best_float = want[0], found["reference"][0]
    assert best[1:] == pytest.approx(best_float[1:], rel=5e-3) and best[2] != best_float[2]


def test_mixed_plans_with_float_clusters_run_on_the_kernels(host, packed_exp, kernels):
    """1, 2, 4, 8 and 16 bits in one LM, with scales of rows and of clusters."""
    model, _ = host.LMTask.build_model_from_file(str(packed_exp.config), str(packed_exp.checkpoint))
    assert model.lm.packed.kernel() == kernels[-1]
    assert {spec.bits for spec in model.lm.plan.clusters.values()} == {1, 2, 4, 8, 16}
    ids = torch.randint(1, 31, (5, 7), generator=torch.Generator().manual_seed(1))
    got, _ = model.lm(ids, None)
    model.lm.double()
    want, _ = model.lm(ids, None)
    assert want.dtype == torch.float64 and torch.allclose(got.double(), want, atol=0.05)
