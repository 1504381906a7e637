"""Clusters of recognisers: a known list, what stays float, and what is refused."""

from __future__ import annotations

import pytest
import torch
import yaml

from espnet_mpq.errors import InputError, MismatchError

SUBLAYERS = {
    "conformer": ("ffn_macaron", "attn", "conv", "ffn"),
    "e_branchformer": ("ffn_macaron", "attn", "cgmlp", "merge", "ffn"),
    "transformer": ("attn", "ffn"),
}


@pytest.fixture(scope="module")
def load(host):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp

    return load_fp


def test_one_cluster_a_sublayer(load, asr_exp):
    exp = load(asr_exp.path)
    encoder = asr_exp.settings["encoder"]
    expected = {"encoder.embed.conv.2", "encoder.embed.out", "ctc.ctc_lo"}
    expected |= {f"encoder.{n}.{name}" for n in (0, 1) for name in SUBLAYERS[encoder]}
    expected |= {f"decoder.{n}.{name}" for n in (0, 1) for name in ("self_attn", "src_attn", "ffn")}
    expected |= {"decoder.embed", "decoder.output_layer"}
    clusters = {cluster.name: cluster for cluster in exp.architecture.clusters()}
    assert set(clusters) == expected and exp.kind == "asr"
    n_attention = 5 if encoder == "conformer" else 5 if encoder == "e_branchformer" else 4
    assert len(clusters["encoder.1.attn"].parts) == n_attention  # q, k, v, out and linear_pos
    # Every matrix that a layer multiplies by is in a cluster, but for what is kept on purpose.
    kept = exp.architecture.kept()
    coded = {part.parameter for c in clusters.values() for part in c.parts}
    for name, parameter in exp.model.named_parameters():
        assert (parameter.dim() > 1) == (name in coded or name in kept), name
    assert "encoder.embed.conv.0.weight" in kept and "frontend.logmel.melmat" in kept
    float_rest = dict(exp.architecture.rest())
    if encoder == "conformer":
        assert "encoder.encoders.0.self_attn.pos_bias_u" in kept
        assert "encoder.encoders.0.conv_module.depthwise_conv.weight" in kept
        assert float_rest["encoder.encoders.0.conv_module.norm.running_var"] == (16,)
    if encoder == "e_branchformer":
        assert "encoder.encoders.0.cgmlp.csgu.conv.weight" in kept
        assert "encoder.encoders.0.depthwise_conv_fusion.weight" in kept


def test_other_layers_are_clusters_of_their_own(load, make_asr_exp, tmp_path):
    """Convolutional feed-forward layers, another subsampling, absolute positions with a scale."""
    conf = dict(
        positionwise_layer_type="conv1d",
        input_layer="conv2d6",
        pos_enc_layer_type="scaled_abs_pos",
        selfattention_layer_type="selfattn",
    )
    exp = load(make_asr_exp(tmp_path / "asr", encoder_conf=conf, ctc_weight=1.0).path)
    names = [cluster.name for cluster in exp.architecture.clusters()]
    assert "encoder.0.ffn" in names and "decoder.embed" not in names
    assert exp.architecture.state_shapes()["encoder.embed.out.1.alpha"] == ()


def test_refusals_are_one_sentence(load, make_asr_exp, tmp_path):
    exp = make_asr_exp(tmp_path / "asr")
    settings = yaml.safe_load(exp.config.read_text())

    def refused(message, error=InputError, **change):
        exp.config.write_text(yaml.safe_dump({**settings, **change}))
        with pytest.raises(error, match=message) as caught:
            assert load(exp.path).architecture
        assert str(exp.config) in str(caught.value) or "checkpoint" in str(caught.value)

    refused("not supported: found decoder: transducer", decoder="transducer")
    refused("not supported: found model: maskctc", model="maskctc")
    refused("speech translation is not supported", src_token_list=["a"])
    refused("adapters", use_adapter=True, adapter="lora")
    refused("encoder: conformr; did you mean 'conformer'", encoder="conformr")
    refused("cannot be built: found TypeError", encoder_conf={"output_sise": 4})
    refused("malformed encoder_conf", encoder_conf=3)
    refused("does not fit its config.yaml", MismatchError, encoder="transformer", encoder_conf={})
    exp.config.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "token_list"}))
    with pytest.raises(InputError, match="not the configuration of a recogniser: found no token_l"):
        load(exp.path)


def test_cells_are_refused(load, make_asr_exp, tmp_path):
    exp = load(make_asr_exp(tmp_path / "asr", decoder="rnn").path)
    with pytest.raises(InputError, match="no packed file can hold .*RNNDecoder.*LSTM layers only"):
        assert exp.architecture


def test_a_recurrent_encoder_is_listed_gate_by_gate(load, make_asr_exp, tmp_path):
    conf = dict(hidden_size=8, output_size=16, num_layers=1, use_projection=False)
    folder = tmp_path / "asr"
    make_asr_exp(folder, "rnn", encoder_conf=conf, ctc_weight=1.0, plain=True)
    names = [cluster.name for cluster in load(folder).architecture.clusters()]
    assert any(name.endswith(".l0.reverse.i") for name in names), names


def test_language_model_commands_refuse_recognisers(host, conformer_exp):
    from espnet_mpq.hosts.espnet.experiment.opened import load_lm

    with pytest.raises(MismatchError, match="describes a recogniser: expected an LM"):
        load_lm(conformer_exp.path)


def test_counters_do_not_count(load, conformer_exp):
    """num_batches_tracked is in the checkpoint, not in the architecture."""
    state = torch.load(conformer_exp.checkpoint)
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    assert counters and not set(counters) & set(load(conformer_exp.path).architecture.state)
