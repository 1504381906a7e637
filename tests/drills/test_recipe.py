"""Drills of the recipes: run.sh is killed, alone or with its jobs, or its disk is full."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disturbed_runs import enlarge, hashes, is_long, small_disk

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "egs"))
from recipes import Recipe  # noqa: E402

TOOLS = Path(__file__).resolve().parents[2] / "espnet_mpq" / "recipe"
# Three stages whose jobs write piece by piece and go on with what is there, as trainings do.
SCRIPT = """set -euo pipefail
# General
stage=1
stop_stage=9
nj=2
python=./python
word=one
help_message=none
export PYTHONPATH={root}:$PWD
. {tools}/parse_options.sh
. {tools}/stages.sh
marks=marks
stages="first second third"
title_first=first title_second=second title_third=third
inputs_first() {{ echo text; }}
options_first() {{ echo "${{word}}"; }}
outputs_first() {{ echo first; }}
stage_first() {{ job first/log slow_job first/out "${{word}}"; }}
units_second="a b c"
inputs_second() {{ echo first/out; }}
outputs_second() {{ echo "second_$1"; }}
stage_second() {{ job "second_$1/log" slow_job "second_$1/out" "$1" first/out; }}
inputs_third() {{ echo second_{{a,b,c}}/out; }}
outputs_third() {{ echo third; }}
stage_third() {{ sort $(inputs_third) > third.part; mv third.part third; }}
run_stages
"""
SLOW_JOB = """import sys, time
from pathlib import Path
def main():
    out, *words = sys.argv[1:]
    known = "".join(Path(w).read_text() if Path(w).exists() else w for w in words)
    half = Path(out + ".half")
    n = len(half.read_text().splitlines()) if half.exists() else 0
    for i in range(n, 4):
        with half.open("a") as file:
            file.write(f"{i} {known!r}\\n")
        time.sleep(0.03)
    lines = [line for line in half.read_text().splitlines() if line.endswith(repr(known))]
    assert len(lines) == 4, f"foreign lines in {half}"
    half.rename(out)
"""
# Stands for a Python with the host, which takes seconds to import.
PYTHON = """#!/usr/bin/env bash
case "$*" in *host_jobs*) set -- -c "import runpy, sys, types, espnet_mpq
espnet_mpq.register = lambda **_: None
sys.modules['torch'] = types.SimpleNamespace(set_num_threads=lambda n: None)
runpy.run_module('espnet_mpq.recipe.host_jobs', run_name='__main__')" ;; esac
exec {python} "$@"
"""
SLOW_RESULTS = ("first/out", "second_*/out", "third")


class SlowRecipe:
    """The script above in a folder; its run in a process group of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        files = {
            "run.sh": SCRIPT.format(tools=TOOLS, root=TOOLS.parents[1]),
            "python": PYTHON.format(python=sys.executable),
            "slow_job.py": SLOW_JOB,
            "text": "text\n",
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        (folder / "python").chmod(0o755)

    def start(self, *options: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "run.sh", *options],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *options: str) -> tuple[int, str]:
        process = self.start(*options)
        return process.wait(120), process.stdout.read()


def kill_after(process: subprocess.Popen, seconds: float, with_jobs: bool) -> None:
    """kill -9 of the script, with its jobs or alone, unless it has ended before."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        (os.killpg if with_jobs else os.kill)(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """(results of undisturbed runs by word, seconds of the longest)."""
    results, longest = {}, 0.0
    for word in ("one", "two"):
        recipe = SlowRecipe(tmp_path_factory.mktemp("slow"))
        begin = time.monotonic()
        status, output = recipe.finish("--word", word)
        assert status == 0, output
        longest = max(longest, time.monotonic() - begin)
        results[word] = hashes(recipe.folder, *SLOW_RESULTS)
    assert results["one"].keys() == results["two"].keys() and results["one"] != results["two"]
    return results, longest


def test_killed_engine(slow, rounds, tmp_path):
    """Kills, also with other options in between: never the results of other options."""
    results, longest = slow
    for rng in rounds(2):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        recipe = SlowRecipe(tmp_path / "run")
        for _ in range(rng.randint(1, 3)):
            word = rng.choice(("one", "two"))
            kill_after(recipe.start("--word", word), rng.uniform(0, longest), rng.random() < 0.5)
        word = rng.choice(("one", "two"))
        status, output = recipe.finish("--word", word)
        assert status == 0, output
        assert hashes(recipe.folder, *SLOW_RESULTS) == results[word], output


def test_engine_on_a_full_disk(slow, rounds, tmp_path):
    results, _ = slow
    for rng in rounds(2):
        folder = tmp_path / "disk"
        with small_disk(folder, 4096 * rng.randint(8, 48)) as is_mounted:
            if not is_mounted:
                pytest.skip("file systems cannot be mounted here")
            recipe = SlowRecipe(folder)
            status, output = recipe.finish()
            if status:
                assert "No space left on device" in output, output
            enlarge(folder, 1 << 26)
            status, output = recipe.finish()
            assert status == 0, output
            assert hashes(folder, *SLOW_RESULTS) == results["one"], output


MINI = ("--lm_type", "transformer", "--sensitivity", "kl", "--stop_stage", "9")
MINI_RESULTS = (
    *("data/mini/*/text", "data/mini/token_list/*/*", "exp/mini_*/lm_stats/*/text_shape.bpe"),
    *("exp/mini_*/transformer/*/plan/plan.json", "exp/mini_*/transformer/kl/sensitivity.json"),
    *("exp/mini_*/transformer/*/packed/packed.safetensors",),
)


def test_killed_mini_recipe(rounds, data_root, tmp_path):
    """The AMI recipe in its mini profile; a Transformer, whose training has no dropout."""
    if not is_long():
        pytest.skip("a run of a recipe takes a minute: make drills")
    for module in ("espnet2", "sentencepiece"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    folder = tmp_path / "lm1"
    recipe = Recipe("ami/lm1", folder, data_root)
    begin = time.monotonic()
    recipe.finish(*MINI)
    longest = time.monotonic() - begin
    right = hashes(folder, *MINI_RESULTS)
    assert len(right) > 10
    for rng in rounds(1):
        shutil.rmtree(folder)
        recipe = Recipe("ami/lm1", folder, data_root)
        for _ in range(rng.randint(1, 3)):
            process = subprocess.Popen(
                ["./run.sh", "--mini", "true", "--python", sys.executable, *MINI],
                cwd=folder,
                env=recipe.env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            kill_after(process, rng.uniform(0, longest), rng.random() < 0.5)
        recipe.finish(*MINI)
        found = hashes(folder, *MINI_RESULTS)
        assert found == right, sorted(k for k in right if found.get(k) != right[k])
