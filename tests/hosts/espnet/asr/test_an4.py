"""A trained recogniser on real speech: the host's hypotheses at 32 bits, small harm at 8."""

from __future__ import annotations

import tarfile

import pytest
import torch

from espnet_mpq.plan import uniform_plan


@pytest.fixture(scope="module")
def an4(data_root, host, tmp_path_factory):
    """(trained experiment, folder of eight test utterances)."""
    model, corpus = data_root / "an4_models" / "asr", data_root / "an4"
    if not model.is_dir() or not corpus.is_dir():
        pytest.skip("no an4_models/asr and an4 below MPQ_DATA_ROOT")
    folder = tmp_path_factory.mktemp("an4")
    names = (corpus / "etc" / "an4_test.fileids").read_text().split()[::17]
    lines = (corpus / "etc" / "an4_test.transcription").read_text().splitlines()[::17]
    with tarfile.open(corpus / "an4_flac.tar") as archive:
        for member in archive:
            if any(member.name.endswith(f"{name}.flac") for name in names):
                path = folder / member.name.replace("/", "-")
                path.write_bytes(archive.extractfile(member).read())
    paths = {name: next(folder.glob(f"*{name.split('/')[-1]}.flac")) for name in names}
    scp = "".join(f"{name.replace('/', '-')} {path}\n" for name, path in paths.items())
    text = [f"{n.replace('/', '-')} {t.rsplit('(', 1)[0].strip()}\n" for n, t in zip(names, lines)]
    (folder / "wav.scp").write_text(scp)
    (folder / "text").write_text("".join(text))
    return model, folder


@pytest.mark.parametrize("bits", [32, 8])
def test_trained_recogniser(an4, tmp_path, bits):
    from espnet2.bin.asr_inference import Speech2Text

    from espnet_mpq.hosts.espnet.asr.data import read_speech
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp
    from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment

    folder, data = an4
    exp = load_fp(folder)
    speech = read_speech(exp, data)
    assert len(speech) == 8
    pack_experiment(folder, tmp_path / "x", plan=uniform_plan(exp.architecture.clusters(), bits))
    files = (folder, exp.checkpoint.name), (tmp_path / "x", "packed.safetensors")
    options = dict(beam_size=5, ctc_weight=1.0, nbest=2)
    theirs, ours = (Speech2Text(str(f / "config.yaml"), str(f / n), **options) for f, n in files)
    for samples in speech.samples:
        batch = torch.from_numpy(samples)[None], torch.tensor([len(samples)])
        models = theirs.asr_model, ours.asr_model
        with torch.no_grad():
            fp, mine = (m.ctc.log_softmax(m.encode(*batch)[0])[0] for m in models)
        kl = float((fp.exp() * (fp - mine)).sum(-1).mean())
        if bits == 8:
            assert kl < 0.01
            continue
        assert abs(kl) < 1e-7
        for a, b in zip(ours(samples), theirs(samples)):
            assert a[:3] == b[:3]
            assert float(a[3].score) == pytest.approx(float(b[3].score), abs=1e-4)
