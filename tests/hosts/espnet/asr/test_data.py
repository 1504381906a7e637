"""Folders of speech: what is read, in which order, and one error for each way to be wrong."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import soundfile
from recognisers import RATE, SENTENCES, noise

from espnet_mpq.errors import InputError


@pytest.fixture(scope="module")
def data(host):
    from espnet_mpq.hosts.espnet.asr import data

    return data


@pytest.fixture(scope="module")
def exp(host, conformer_exp):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp

    return load_fp(conformer_exp.path)


@pytest.fixture
def folder(speech_dir, tmp_path):
    """A copy with its own audio, to change."""
    return copy_of(speech_dir, tmp_path / "data")


def copy_of(folder, target):
    shutil.copytree(folder, target)
    lines = [line.split() for line in (target / "wav.scp").read_text().splitlines()]
    scp = [f"{name} {target}/{path.split('/')[-1]}\n" for name, path in lines]
    (target / "wav.scp").write_text("".join(scp))
    return target


def test_samples_and_tokens(data, exp, folder):
    speech = data.read_speech(exp, folder)
    assert speech.names == [f"utt-{k}" for k in range(6)]
    assert speech.seconds == pytest.approx(sum(0.4 + 0.1 * k for k in range(6)))
    for k, (samples, ids) in enumerate(zip(speech.samples, speech.tokens)):
        assert samples.dtype == np.float32
        np.testing.assert_allclose(samples, noise(0.4 + 0.1 * k, k), atol=1 / 32768)
        text = "".join(exp.vocabulary.tokens[i] for i in ids).replace("<space>", " ")
        assert text == SENTENCES[k]


def test_sample_is_random_seeded_and_bounded(data, exp, folder):
    whole = data.read_speech(exp, folder)
    chosen = [data.read_speech(exp, folder, max_seconds=1.7, seed=seed) for seed in (0, 0, 1, 2)]
    assert all(speech.seconds <= 1.7 for speech in chosen)
    assert chosen[0].names == chosen[1].names and chosen[0].sha256 == chosen[1].sha256
    assert len({tuple(speech.names) for speech in chosen}) > 1
    assert all(speech.names == sorted(speech.names) for speech in chosen)
    assert whole.sha256 != chosen[0].sha256
    assert len(data.read_speech(exp, folder, max_seconds=0.01)) == 1  # never none


def test_hash_is_of_content_not_of_places(data, exp, folder, tmp_path):
    before = data.read_speech(exp, folder).sha256
    moved = copy_of(folder, tmp_path / "moved")
    assert data.read_speech(exp, moved).sha256 == before
    soundfile.write(moved / "u0.wav", noise(0.4, 9), RATE)
    assert data.read_speech(exp, moved).sha256 != before
    (folder / "text").write_text((folder / "text").read_text().replace("cat", "dog"))
    assert data.read_speech(exp, folder).sha256 != before


def test_segments(data, exp, folder):
    (folder / "segments").write_text("b utt-2 0.1 0.35\na utt-4 0.25 0.8\n")
    (folder / "text").write_text("a one\nb two\n")
    speech = data.read_speech(exp, folder)
    assert speech.names == ["b", "a"]
    np.testing.assert_allclose(speech.samples[0], noise(0.6, 2)[1600:5600], atol=1 / 32768)
    # An end behind the last sample is where the recording ends, as in Kaldi's rounding.
    assert len(speech.samples[1]) == round(0.8 * RATE) - 4000


def test_archives_and_channels(data, exp, folder):
    import kaldiio

    ark, two = noise(0.5, 3), np.stack([noise(0.4, 1), noise(0.4, 5)], axis=1)
    pcm = np.round(ark * 32767).astype(np.int16)
    kaldiio.save_ark(str(folder / "w.ark"), {"utt-0": (RATE, pcm)}, scp=str(folder / "w.scp"))
    place = (folder / "w.scp").read_text().split()[1]
    soundfile.write(folder / "two.flac", two, RATE)
    (folder / "wav.scp").write_text(f"utt-0 {place}\nutt-1 {folder}/two.flac\n")
    speech = data.read_speech(exp, folder)
    np.testing.assert_allclose(speech.samples[0], ark, atol=1e-4)
    np.testing.assert_allclose(speech.samples[1], two[:, 0], atol=1 / 32768)


def change(name, text):
    def write(folder):
        (folder / name).write_text(text.replace("FOLDER", str(folder)))

    return write


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda f: (f / "wav.scp").unlink(), "has no wav.scp.*Kaldi-style"),
        (lambda f: (f / "text").unlink(), "has no text: add the transcripts"),
        (change("text", "utt-0 a\nutt-1 b\n"), "lacks 4 utterances: found no utt-2, utt-3"),
        (change("wav.scp", "utt-0 sph2pipe -p x.sph |\n"), "has a command for utt-0.*dump/raw"),
        (change("wav.scp", "utt-0 nowhere.wav\n"), "utt-0 cannot be read: found nowhere.wav"),
        (change("wav.scp", "utt-0 FOLDER/text\n"), "utt-0 cannot be read.*libsndfile"),
        (change("wav.scp", "utt-0\n"), "wav.scp, line 1: found 'utt-0'; expected a name and a"),
        (change("wav.scp", "utt-0 a\nutt-0 b\n"), "line 2: .*a name that was there before"),
        (change("wav.scp", ""), "has no utterance"),
        (change("segments", "a utt-9 0 1\n"), "segments, utterance a.*a recording of wav.scp"),
        (change("segments", "a utt-1 0.3 0.2\n"), "segments, utterance a"),
        (change("segments", "a utt-1 nan 0.2\n"), "segments, utterance a"),
        (change("segments", "utt-1 utt-1 5 6\n"), "audio of utt-1 is empty"),
    ],
)
def test_wrong_folders(data, exp, folder, wrong, message):
    wrong(folder)
    with pytest.raises(InputError, match=message):
        data.read_speech(exp, folder)


def test_another_rate_is_refused(data, exp, folder):
    soundfile.write(folder / "u2.wav", noise(0.6, 2), 8000)
    with pytest.raises(InputError, match="another rate .*found 8000 Hz; expected 16000 Hz"):
        data.read_speech(exp, folder)
