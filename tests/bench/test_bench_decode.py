"""The decoding benchmark: seconds of every system, on the host's own Speech2Text."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

BENCH = runpy.run_path(str(Path(__file__).with_name("bench_decode.py")))


def test_medians_of_rounds_of_the_whole_set():
    calls = []

    def decoder(name, seconds):
        times = iter(seconds)

        def decode(speech):
            calls.append((name, speech))
            return next(times)

        return decode

    # The first is to warm up; then three rounds of two utterances.
    one = decoder("one", [[9, 9], [1, 0], [2, 0], [5, 1], [5, 1], [2, 2], [3, 2]])
    two = decoder("two", [[9, 9]] + 6 * [[1.5, 1]])
    found = BENCH["measure"]({"one": one, "two": two}, [("a", 1.0), ("b", 2.0)], 3)
    assert found == {"one": {"all_s": 5, "lm_s": 2}, "two": {"all_s": 3.0, "lm_s": 2}}
    assert calls[2:6] == [("one", "a"), ("two", "a"), ("one", "b"), ("two", "b")]


def test_decoding_of_experiments(kernels, asr_exp, fp_exp, packed_exp, tmp_path):
    import soundfile

    for name in "ab":
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, 8000)
        soundfile.write(str(tmp_path / f"{name}.wav"), noise, 16000)
    wav_scp, config = tmp_path / "wav.scp", tmp_path / "decode.yaml"
    wav_scp.write_text(f"a {tmp_path}/a.wav\nb {tmp_path}/b.wav\n")
    config.write_text("{beam_size: 3, ctc_weight: 0.3, maxlenratio: 0.5}\n")
    words = ["--set", "tiny", "--wav_scp", str(wav_scp), "--asr", str(asr_exp.checkpoint)]
    words += ["--config", str(config), "--lm_weight", "0.5", "--rounds", "1"]
    words += ["--lm", f"fp={fp_exp.checkpoint}", "--lm", f"packed={packed_exp.path}"]
    words += ["--lm_int8", f"int8={fp_exp.checkpoint}", "--work", str(tmp_path)]
    file = tmp_path / "R.md"
    row = BENCH["main"]([*words, "--markdown", str(file)])
    assert row["set"] == "tiny, 2 utterances" and row["audio_s"] == 1.0
    assert list(row["systems"]) == ["no LM", "fp", "packed", "int8"]
    for name, v in row["systems"].items():
        assert 0 <= v["lm_s"] < v["all_s"] < 60 and (v["lm_s"] == 0) == (name == "no LM")
    assert file.read_text().count("\n| tiny, 2 utterances |") == 4
    one = BENCH["main"]([*words, "--utterances", "1", "--cpu_time"])
    assert one["set"] == "tiny, 1 utterances" and one["audio_s"] == 0.5
    with pytest.raises(SystemExit, match="no LM: "):
        BENCH["main"]([*words, "--lm", f"gone={tmp_path}/gone"])
