"""Packed recognisers in the host: equal to the float model they stand for, and strictly loaded."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import yaml
from recognisers import noise

from espnet_mpq.errors import FormatError, InputError, MismatchError
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.packed.format import load_packed
from espnet_mpq.plan import ClusterSpec, Plan, uniform_plan

SPECS = (
    ClusterSpec(4),
    ClusterSpec(2, "paper", "group", 5),
    ClusterSpec(8, "uniform", "cluster"),
    ClusterSpec(1),
    ClusterSpec(16),
    ClusterSpec(3),
    ClusterSpec(4, "paper", "model"),
    ClusterSpec(32),
)


@pytest.fixture(scope="module")
def pack(host):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp
    from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment

    def run(exp, folder, plan=None):
        clusters = load_fp(exp.path).architecture.clusters()
        mixed = Plan({c.name: SPECS[k % len(SPECS)] for k, c in enumerate(clusters)})
        plan = mixed if plan is None else uniform_plan(clusters, plan)
        pack_experiment(exp.path, folder, plan=plan)
        return folder

    return run


@pytest.fixture(scope="module")
def load(host):
    from espnet_mpq.hosts.espnet.experiment.opened import load

    return load


def outputs(model, samples, tokens=(3, 4, 5, 3)):
    """CTC and decoder log-probabilities of one utterance, by the host's own calls."""
    speech = torch.as_tensor(samples)[None]
    ids = torch.tensor([[model.sos, *tokens]])
    with torch.no_grad():
        rows, lengths = model.encode(speech, torch.tensor([speech.shape[1]]))
        ctc = model.ctc.log_softmax(rows)
        decoder = model.decoder(rows, lengths, ids, torch.tensor([ids.shape[1]]))[0]
    return ctc, decoder.log_softmax(-1)


@pytest.fixture
def speech2text(host):
    from espnet2.bin.asr_inference import Speech2Text

    def make(folder, file, **options):
        options = {"beam_size": 4, "ctc_weight": 0.3, "nbest": 3, "maxlenratio": -8, **options}
        return Speech2Text(str(folder / "config.yaml"), str(folder / file), **options)

    return make


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_float_plan_gives_the_hosts_n_best(
    asr_exp, pack, speech2text, tmp_path, monkeypatch, kernel
):
    monkeypatch.setenv("MPQ_KERNEL", kernel)
    packed = pack(asr_exp, tmp_path / "packed", 32)
    ours, theirs = (
        speech2text(packed, "packed.safetensors"),
        speech2text(asr_exp.path, "valid.acc.ave.pth"),
    )
    assert type(ours.asr_model).__name__ == "MpqPackedASRModel"
    for k in range(3):
        for mine, other in zip(ours(noise(0.5, k)), theirs(noise(0.5, k))):
            assert mine[:3] == other[:3]
            assert float(mine[3].score) == pytest.approx(float(other[3].score), abs=1e-4)


def test_packed_is_the_dequantized_model(asr_exp, pack, load, tmp_path, float_activations):
    """All bits and tyings; utterances of one and of three rows, and an ordinary one."""
    folder = pack(asr_exp, tmp_path / "packed")
    exp, fp = load(folder), load(asr_exp.path)
    state = float_state(load_packed(folder / "packed.safetensors"))
    missing, unknown = fp.model.load_state_dict(state, strict=False)
    assert not unknown and all(name.endswith("num_batches_tracked") for name in missing)
    lengths = set()
    for seconds in (0.07, 0.16, 0.8):
        models = exp.model, fp.model
        pairs = list(zip(*(outputs(model, noise(seconds, 1)) for model in models)))
        lengths.add(pairs[0][0].shape[1])
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert {1, 3} <= lengths


def test_kernels_are_close_to_the_reference(conformer_exp, pack, load, tmp_path, monkeypatch):
    """int8 activations move the posteriors a little; float layers do not count on them at all."""
    model = load(pack(conformer_exp, tmp_path / "packed", 8)).model
    results = {}
    for kernel in ("reference", "auto"):
        monkeypatch.setenv("MPQ_KERNEL", kernel)
        results[kernel] = outputs(model, noise(0.8, 2))
    for fp, mine in zip(results["reference"], results["auto"]):
        kl = (fp.exp() * (fp - mine)).sum(-1)
        assert 0 < float(kl.mean()) < 2e-3 and float(kl.max()) < 2e-2


def test_copies_casts_and_modes(conformer_exp, pack, load, tmp_path, monkeypatch):
    monkeypatch.setenv("MPQ_KERNEL", "auto")
    model = load(pack(conformer_exp, tmp_path / "packed")).model
    first = outputs(model, noise(0.4, 1))
    model.train()
    assert not model.training and not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for other in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
        for mine, expected in zip(outputs(other, noise(0.4, 1)), first):
            torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    double = copy.deepcopy(model).double()
    monkeypatch.setenv("MPQ_KERNEL", "reference")
    reference = outputs(model, noise(0.4, 1))
    for mine, expected in zip(outputs(double, noise(0.4, 1).astype("float64")), reference):
        torch.testing.assert_close(mine.float(), expected, rtol=0, atol=1e-4)


def test_codes_are_in_memory_once(conformer_exp, pack, load, tmp_path, monkeypatch):
    """No float copy of a coded weight is left where the kernels compute."""
    monkeypatch.setenv("MPQ_KERNEL", "auto")
    exp = load(pack(conformer_exp, tmp_path / "packed", 4))
    outputs(exp.model, noise(0.4, 1))
    coded = {part.parameter for c in exp.architecture.clusters() for part in c.parts}
    assert not coded & {name for name, _ in exp.model.named_parameters()}
    layers = [m for m in exp.model.modules() if hasattr(m, "_weight")]
    assert len(layers) == len(coded) and all(layer._weight is None for layer in layers)


def test_what_does_not_belong_together_is_refused(
    conformer_exp, make_asr_exp, pack, host, tmp_path
):
    from espnet2.tasks.asr import ASRTask

    folder = pack(conformer_exp, tmp_path / "packed", 4)
    config, packed = folder / "config.yaml", folder / "packed.safetensors"
    settings = yaml.safe_load(config.read_text())

    def build(file=packed, **change):
        config.write_text(yaml.safe_dump({**settings, **change}))
        return ASRTask.build_model_from_file(str(config), str(file), "cpu")

    assert type(build()[0]).__name__ == "MpqPackedASRModel"
    tokens = ["<blank>", "<unk>", "!", *settings["token_list"][3:]]
    with pytest.raises(MismatchError, match="packed for another token list"):
        build(token_list=tokens)
    with pytest.raises(MismatchError, match="a packed recogniser, but .* describes another"):
        build(model="espnet", model_conf={})
    conf = {**settings["encoder_conf"], "cnn_module_kernel": 9}
    with pytest.raises(MismatchError, match="config.yaml: state, encoder.encoders.0.conv_module.d"):
        build(encoder_conf=conf)
    with pytest.raises(MismatchError, match="takes its weights from its packed file alone"):
        build(conformer_exp.checkpoint)
    with pytest.raises(InputError, match="there is no file"):
        build(tmp_path / "none.safetensors")
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(FormatError, match="is damaged"):
        build()
    with pytest.raises(MismatchError, match="is packed already"):
        from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment

        pack_experiment(folder, tmp_path / "again")


def test_plain_host_says_what_it_lacks(conformer_exp, pack, asr_task, tmp_path, monkeypatch):
    from espnet2.tasks.asr import model_choices

    folder = pack(conformer_exp, tmp_path / "packed", 4)
    monkeypatch.delitem(model_choices.classes, "mpq_packed_asr")
    original = asr_task.build_model_from_file.mpq_original
    with pytest.raises(ValueError, match="--model must be one of .*: --model mpq_packed_asr"):
        original(str(folder / "config.yaml"), str(folder / "packed.safetensors"), "cpu")


def test_float_recognisers_load_as_before(conformer_exp, asr_task, tmp_path):
    """The wrapped loader gives the host's own class with the checkpoint's weights."""
    model, args = asr_task.build_model_from_file(
        str(conformer_exp.config), str(conformer_exp.checkpoint), "cpu"
    )
    assert type(model).__name__ == "ESPnetASRModel" and args.encoder == "conformer"
    for name, value in torch.load(conformer_exp.checkpoint).items():
        assert torch.equal(model.state_dict()[name], value), name
    damaged = shutil.copy(conformer_exp.checkpoint, tmp_path / "x.pth")
    with open(damaged, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        asr_task.build_model_from_file(str(conformer_exp.config), str(damaged), "cpu")


@pytest.mark.parametrize("encoder", ["rnn"])
def test_layers_without_a_packed_class_keep_dequantized_weights(
    make_asr_exp, pack, load, tmp_path, encoder, float_activations
):
    conf = dict(hidden_size=8, output_size=16, num_layers=1, use_projection=False)
    exp = make_asr_exp(tmp_path / "asr", encoder, encoder_conf=conf, plain=True)
    folder = pack(exp, tmp_path / "packed")
    packed, fp = load(folder), load(exp.path)
    fp.model.load_state_dict(float_state(load_packed(folder / "packed.safetensors")), strict=False)
    for mine, other in zip(outputs(packed.model, noise(0.5, 1)), outputs(fp.model, noise(0.5, 1))):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
