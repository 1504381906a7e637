"""The AN4 recipe, mini profile: every stage once, then only what has changed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from recipes import ROOT, Recipe  # noqa: E402

RECIPE = ROOT / "egs" / "an4" / "mpq1"
LM_DIR = "exp/mini_char/rnn"
LMS = ("fp", "uniform/lm", "uniform/packed", "kl/lm", "kl/packed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, data_root):
    return Recipe("an4/mpq1", tmp_path_factory.mktemp("an4") / "mpq1", data_root)


def ppl(recipe: Recipe, lm: str) -> float:
    return recipe.json(f"{LM_DIR}/{lm}/perplexity_test.json")["ppl"]


@pytest.fixture(scope="module")
def finished(recipe):
    if importlib.util.find_spec("espnet2") is None:
        pytest.skip("ESPnet is not installed")
    return recipe.finish()


def test_all_systems_are_reported(recipe, finished):
    report = (recipe.folder / LM_DIR / "RESULTS_kl.md").read_text()
    table = [line for line in report.splitlines() if line.startswith("| ")]
    systems = [line.split(" | ")[0].strip("| ") for line in table[2:8]]
    assert systems == [
        "no LM",
        "fp LM",
        "uniform, quantized",
        "uniform, packed",
        "mixed, quantized",
        "mixed, packed",
    ]
    for lm in LMS[1:]:
        name = lm.replace("/", "_")
        comparison = recipe.json(f"{LM_DIR}/decode_kl/fp_against_{name}.json")
        assert comparison["n_utterances"] == 2
        assert list(comparison["systems"]) == ["fp", name]
    assert "mixed, packed" in finished  # the table is also what the run ends with


def test_packed_perplexity_is_that_of_the_quantized_lm(recipe, finished):
    assert 1.0 < ppl(recipe, "fp") < 22.5  # 22 tokens; a uniform guess has 22
    for plan in ("uniform", "kl"):
        quantized = ppl(recipe, f"{plan}/lm")
        assert ppl(recipe, f"{plan}/packed") == pytest.approx(quantized, rel=1e-3)
        assert quantized != ppl(recipe, "fp")


def test_finished_stages_are_skipped_and_changed_ones_are_not(recipe, finished):
    again = recipe.finish()
    assert again.count("finished before, skipped") == 13
    report = recipe.folder / LM_DIR / "RESULTS_kl.md"
    changed = report.stat().st_mtime_ns
    alone = recipe.finish("--stage", "13", "--stop_stage", "13")
    assert "skipped" not in alone
    assert report.stat().st_mtime_ns > changed
    # characters stay characters: only the stages that depend on the text run again
    (recipe.folder / "data" / "mini" / "token_list" / "char" / "tokens.txt").unlink()
    (recipe.folder / "data" / "mini" / "token_list" / "char").rmdir()
    lost = recipe.run("--stop_stage", "3")
    assert lost.stdout.count("finished before, skipped") == 2
    assert "stage 2: done" in lost.stdout


def test_a_missing_input_names_the_stage_that_lacks_it(tmp_path, data_root):
    result = Recipe("an4/mpq1", tmp_path / "mpq1", data_root).run("--stage", "6")
    assert result.returncode != 0
    assert "stage 6 needs exp/mini_char/rnn/fp/valid.loss.best.pth" in result.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (["--stages", "1"], "unknown option --stages"),
        (["--stage"], "--stage needs a value"),
        (["--mini", "yes"], "--mini takes true or false, found 'yes'"),
        (["5"], "unexpected argument '5'"),
        (["--stage", "x"], "--stage: found 'x'; expected a whole number"),
        (["--lm_type", "gru"], "--lm_type gru is unknown: known: rnn, transformer"),
        (["--lm_type", "rnn "], "--lm_type rnn is unknown: did you mean 'rnn'"),
        (["--tag", "a b"], "--tag: found a space in 'a b'"),
        (["--budget", "abc"], "--budget: found 'abc'"),
        (["--lm_config", "conf/train_lmm.yaml"], "did you mean 'conf/train_lm.yaml'"),
        (["--inference_asr", "valid.cer_ctc.av.pth"], "is no name of a checkpoint"),
        (["--sensitivity", "magic"], "--sensitivity magic is unknown; known: kl hessian nas"),
    ],
)
def test_wrong_options(options, message):
    result = subprocess.run(
        ["./run.sh", "--python", sys.executable, *options],
        cwd=RECIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert message in result.stderr


def test_damaged_archive_is_refused(tmp_path):
    archive = tmp_path / "data" / "mini_an4" / "downloads.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"not the archive")
    result = Recipe("an4/mpq1", tmp_path / "mpq1", tmp_path / "data").run("--stop_stage", "1")
    assert result.returncode != 0
    assert "downloads.tar.gz: sha256" in result.stdout
    assert "expected 42314268" in result.stdout


def test_prepared_data(tmp_path, data_root):
    copy = Recipe("an4/mpq1", tmp_path / "mpq1", data_root)
    assert copy.run("--stop_stage", "2").returncode == 0
    data = copy.folder / "data" / "mini"
    assert (data / "test" / "text").read_text().splitlines() == [
        "fcaw-cen8-fcaw-b ELEVEN TWENTY SEVEN FIFTY SEVEN",
        "mmxg-cen8-mmxg-b OCTOBER TWENTY FOUR NINETEEN SEVENTY",
    ]
    assert len((data / "train" / "text").read_text().splitlines()) == 4
    assert (data / "dev" / "utt2spk").read_text() == "fash-an251-fash-b fash\n"
    tokens = (data / "token_list" / "char" / "tokens.txt").read_text().split()
    assert tokens[:2] == ["<blank>", "<unk>"] and tokens[-1] == "<sos/eos>"
    assert "<space>" in tokens and len(tokens) == 22


def test_a_killed_run_leaves_no_job_behind(tmp_path):
    jobs = tmp_path / "jobs"
    jobs.write_text(f"{tmp_path}/log sleeping_job 600\n")
    (tmp_path / "sleeping_job.py").write_text(
        "import os, sys, time\n"
        "def main():\n"
        "    open(os.path.join(os.path.dirname(__file__), 'pid'), 'w').write(str(os.getpid()))\n"
        "    time.sleep(float(sys.argv[1]))\n"
    )
    (tmp_path / "espnet_mpq.py").write_text("def register(*kinds, **options):\n    pass\n")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "espnet_mpq" / "recipe" / "host_jobs.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    server.stdin.write(f"1 1 {jobs}\n".encode())
    server.stdin.flush()
    pid_file = tmp_path / "pid"
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    server.stdin.close()  # what the death of run.sh does
    server.wait(timeout=60)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
