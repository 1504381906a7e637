"""The host's unmodified asr.sh with the launcher on mini_an4, then mpq.sh on top of it (opt-in)."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from espnet_mpq.setup_recipe import setup_recipe

pytestmark = pytest.mark.timeout(1800)

RUN = "./run.sh --feats-type raw --audio-format wav --token_type char --nj 1"
LAUNCHER = "python3 -m espnet_mpq"
LM_CONFIG = """lm: seq_rnn
lm_conf: {nlayers: 2, unit: 128}
optim: adam
optim_conf: {lr: 0.01}
best_model_criterion: [[valid, loss, min]]
keep_nbest_models: 1
batch_type: folded
batch_size: 2
max_epoch: 3
num_workers: 0
use_tensorboard: false
use_matplotlib: false
"""
NAS_CONFIG = "weights_epochs: 1\nnas_epochs: 2\nnas_updates: 2\n"
TRAIN_CONFIG = "max_epoch: 3\nbatch_type: folded\nbatch_size: 2\nnum_workers: 0\n"


@pytest.fixture(scope="module")
def recipe(data_root, tmp_path_factory):
    """A copy of egs2/mini_an4/asr1 from a checkout in $ESPNET_ROOT with its data prepared."""
    root = os.environ.get("ESPNET_ROOT")
    if not root:
        pytest.skip("ESPNET_ROOT is not set: a checkout of ESPnet is needed for asr.sh")
    # resampy, dateutil and humanfriendly are what the recipe's own scripts import.
    for module in ("espnet2", "soundfile", "resampy", "dateutil", "humanfriendly"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the host's recipe needs the Python module {module}")
    root = Path(root)
    tree = tmp_path_factory.mktemp("espnet")
    for part in ("egs2/TEMPLATE", "egs2/mini_an4/asr1", "tools", "utils"):
        # Installed tools of a built checkout are large and not needed here.
        ignore = shutil.ignore_patterns("venv", "kaldi", "exp", "dump", "downloads")
        shutil.copytree(root / part, tree / part, symlinks=True, ignore=ignore)
    folder = tree / "egs2" / "mini_an4" / "asr1"
    prepare_data(data_root / "mini_an4" / "downloads.tar.gz", folder)
    (folder / "conf" / "train_lm_test.yaml").write_text(LM_CONFIG)
    (folder / "conf" / "train_lm_mpq_test.yaml").write_text(TRAIN_CONFIG)
    wrapper = tree / "bin" / "python3"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    return folder


def prepare_data(archive: Path, folder: Path) -> None:
    """data/{train_nodev,train_dev,test} as the recipe's stage 1 makes them, without sph2pipe."""
    import soundfile

    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    an4 = folder / "downloads" / "an4"
    for part, sub in (("train", "an4_clstk"), ("test", "an4test_clstk")):
        rows = []
        lines = (an4 / "etc" / f"an4_{part}.transcription").read_text().splitlines()
        for line in filter(None, lines):
            words, _, source = line.strip().rstrip(")").rpartition(" (")
            words = words.replace("<s> ", "").replace(" </s>", "")
            prefix, speaker, last = source.split("-")
            samples, rate = soundfile.read(an4 / "wav" / sub / speaker / f"{source}.sph")
            wav = folder / "downloads" / f"{source}.wav"
            soundfile.write(wav, samples, rate)
            rows.append((f"{speaker}-{prefix}-{last}", words, wav, speaker))
        rows.sort()
        sets = (
            {"test": rows} if part == "test" else {"train_dev": rows[:1], "train_nodev": rows[1:]}
        )
        for name, some in sets.items():
            data = folder / "data" / name
            data.mkdir(parents=True)
            (data / "text").write_text("".join(f"{u} {w}\n" for u, w, _, _ in some))
            (data / "wav.scp").write_text("".join(f"{u} {p}\n" for u, _, p, _ in some))
            (data / "utt2spk").write_text("".join(f"{u} {s}\n" for u, _, _, s in some))
            speakers = {}
            for utt, _, _, speaker in some:
                speakers.setdefault(speaker, []).append(utt)
            (data / "spk2utt").write_text(
                "".join(f"{s} {' '.join(utts)}\n" for s, utts in sorted(speakers.items()))
            )


def run(folder, command):
    package = Path(__file__).resolve().parents[2]
    bin_folder = folder.parents[2] / "bin"
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ,
        "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        # Float activations: packed and quantized perplexity agree, whatever the tiny LM.
        "MPQ_KERNEL": "reference",
        "PYTHONPATH": ":".join(paths),
    }
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_recipe_then_mpq(recipe):
    out = run(
        recipe,
        [
            *RUN.split(), "--inference_nj", "1", "--ngpu", "0", "--python", LAUNCHER,
            "--lm_config", "conf/train_lm_test.yaml", "--lm_exp", "exp/lm_fp",
            "--inference_lm", "valid.loss.best.pth", "--asr_exp", "exp/asr", "--test_sets", "test",
            "--asr_args", "--num_workers 0 --use_tensorboard false --use_matplotlib false",
            "--stage", "2", "--stop_stage", "12",
        ],
    )  # fmt: skip
    assert "Successfully finished" in out
    own = {p: p.stat().st_mtime_ns for p in recipe.rglob("*") if p.is_file()}

    assert setup_recipe(recipe)
    command = [
        "./mpq.sh", "--run", RUN, "--ngpu", "0", "--nj", "2", "--lm_exp", "exp/lm_fp",
        "--inference_lm", "valid.loss.best.pth", "--asr_exp", "exp/asr", "--test_sets", "test",
        "--budget", "4.0", "--train_config", "conf/train_lm_mpq_test.yaml", "--tag", "t",
        "--inference_nj", "1",
    ]  # fmt: skip
    out = run(recipe, command)
    assert "Successfully finished" in out
    changed = [str(p) for p, when in own.items() if p.stat().st_mtime_ns != when]
    assert changed == []

    exp = recipe / "exp" / "mpq_t"
    ppl = {s: float((exp / f"ppl_{s}" / "ppl").read_text()) for s in ("fp", "quantized", "packed")}
    assert ppl["packed"] == pytest.approx(ppl["quantized"], rel=1e-3)
    totals = json.loads((exp / "packed" / "receipt.json").read_text())["totals"]
    assert totals["effective_bits"] <= 4.0
    assert totals["n_bytes"] == (exp / "packed" / "packed.safetensors").stat().st_size
    comparison = json.loads((exp / "compare" / "test.json").read_text())
    assert set(comparison["systems"]) == {"fp", "packed"} and comparison["n_utterances"] == 2
    results = (exp / "RESULTS.md").read_text()
    assert "| packed |" in results and "rnn.l0.i" in results

    assert "skipped" in run(recipe, command)  # nothing is repeated

    # Other sensitivities beside it, without training: the fp LM is packed with their plans.
    (recipe / "conf" / "nas_test.yaml").write_text(NAS_CONFIG)
    for sensitivity, last in (("uniform", "6"), ("hessian", "6"), ("nas", "5")):
        more = ["--sensitivity", sensitivity, "--no_train", "true", "--lm_type", "rnn"]
        more += ["--nas_config", "conf/nas_test.yaml", "--tag", sensitivity, "--stop_stage", last]
        run(recipe, [*command, *more])
        exp = recipe / "exp" / f"mpq_{sensitivity}"
        totals = json.loads((exp / "packed" / "receipt.json").read_text())["totals"]
        assert totals["effective_bits"] <= 4.0
        if last == "6":
            assert float((exp / "ppl_packed" / "ppl").read_text()) > 1.0
        assert not (exp / "lm").exists()
    # The search itself, by the host's trainer, and the plan within its budget.
    table = json.loads((exp / "nas" / "sensitivity.json").read_text())
    assert table["method"] == "nas" and len(table["entries"]) == 10
    assert totals["n_bytes"] <= table["provenance"]["nas"]["budget_n_bytes"]
