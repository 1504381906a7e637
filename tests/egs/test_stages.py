"""stages.sh with stages that only touch files: what is skipped, repeated, kept and dropped."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "espnet_mpq" / "recipe"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
SCRIPT = """set -euo pipefail
# General
stage=1
stop_stage=9
nj=1
python=python3
fail=
help_message=none
. {tools}/parse_options.sh
. {tools}/stages.sh
marks=marks stages="first second"
title_first=first title_second=second
inputs_first() {{ echo text; }}
outputs_first() {{ echo first.out; }}
stage_first() {{ echo "run first" >> notes; cp text first.out; }}
units_second="a b"
inputs_second() {{ echo "first.out options_$1"; }}
outputs_second() {{ echo "second_$1"; }}
stage_second() {{
    echo "run second $1, found $(ls second_$1 2> /dev/null | xargs)" >> notes
    mkdir -p "second_$1"
    echo half > "second_$1/half"
    [ "${{fail}}" != "$1" ] || exit 3
    while [ -e "wait" ]; do touch waiting; sleep 0.05; done
}}
run_stages
"""


class Recipe:
    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "run.sh").write_text(SCRIPT.format(tools=TOOLS))
        for name in ("text", "options_a", "options_b"):
            (folder / name).write_text("1\n")

    def run(self, *options: str) -> tuple[int, list[str], str]:
        """(exit status, what ran, output)."""
        done = subprocess.run(
            ["bash", "run.sh", *options],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(TOOLS.parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        notes = self.folder / "notes"
        ran = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return done.returncode, ran, done.stdout


@pytest.fixture
def recipe(tmp_path):
    return Recipe(tmp_path)


def test_a_unit_runs_again_only_when_its_inputs_changed(recipe):
    everything = ["run first", "run second a, found ", "run second b, found "]
    status, ran, output = recipe.run()
    assert (status, ran) == (0, everything)
    assert "finished stages 1 to 2" in output
    assert recipe.run()[1] == []
    (recipe.folder / "options_b").write_text("2\n")
    assert recipe.run()[1] == ["run second b, found "]  # its old output was dropped
    (recipe.folder / "text").write_text("2\n")
    assert recipe.run()[1] == everything


def test_one_stage_alone_always_runs(recipe):
    recipe.run()
    assert recipe.run("--stage", "1", "--stop_stage", "1")[1] == ["run first"]


def test_a_lost_output_is_made_again(recipe):
    recipe.run()
    shutil.rmtree(recipe.folder / "second_a")
    assert recipe.run()[1] == ["run second a, found "]


def test_a_killed_unit_goes_on_and_foreign_leftovers_are_dropped(recipe):
    status, ran, _ = recipe.run("--fail", "b")
    assert status == 3 and ran[-1] == "run second b, found "
    # What is there of the part that failed is handed to the same work again; the other is finished.
    assert recipe.run()[1] == ["run second b, found half"]
    recipe.run("--fail", "b", "--stage", "2", "--stop_stage", "2")
    (recipe.folder / "options_b").write_text("2\n")
    assert recipe.run()[1] == ["run second b, found "]


def test_a_missing_input_is_named(recipe):
    (recipe.folder / "options_b").unlink()
    status, ran, output = recipe.run()
    assert status == 1 and ran == ["run first"]
    assert "stage 2 needs options_b, which does not exist" in output


def test_a_failed_stage_says_how_to_repeat_it(recipe):
    given = ["--fail", "b", "--stage=1", "--stop_stage", "9", "--nj", "1"]
    _, _, output = recipe.run(*given)
    command = "run.sh --fail b --nj 1 --stage 2 --stop_stage 2"
    assert f"stage 2 did not finish; this repeats it alone: {command}\n" in output
    # What is left of it, not what is finished.
    assert recipe.run("--stage", "2", "--stop_stage", "2")[1] == ["run second b, found half"]


def test_force(recipe):
    recipe.run()
    script = recipe.folder / "run.sh"
    text = script.read_text()
    script.write_text(text.replace("fail=\n", "fail=\nforce=true\n"))
    assert len(recipe.run()[1]) == 3
    script.write_text(text.replace("fail=\n", "fail=\nforce=false\n"))
    assert recipe.run("--stage", "1", "--stop_stage", "1")[1] == []


def test_an_empty_output_is_an_error_and_no_finished_stage(recipe):
    script = recipe.folder / "run.sh"
    text = script.read_text()
    script.write_text(text.replace("cp text first.out", ": > first.out"))
    status, _, output = recipe.run()
    assert status == 1 and "stage 1 (first) did not make first.out" in output
    script.write_text(text)
    assert len(recipe.run()[1]) == 3
    (recipe.folder / "first.out").write_text("")
    assert recipe.run("--stop_stage", "1", "--nj", "1")[1] == ["run first"]


def test_two_runs_at_once(recipe):
    """The second says so and ends; when the first has been killed, it goes on from there."""
    (recipe.folder / "wait").touch()
    first = subprocess.Popen(["bash", "run.sh"], cwd=recipe.folder, stdout=subprocess.DEVNULL)
    while not (recipe.folder / "waiting").exists():
        assert first.poll() is None
        time.sleep(0.02)
    status, _, output = recipe.run()
    *skipped, last = output.splitlines()
    assert status == 1 and all("skipped" in line for line in skipped)
    assert last == (
        f"run.sh: error: another run (process {first.pid}) is at work here, see marks; "
        "wait until it has ended"
    )
    first.kill()
    first.wait()
    (recipe.folder / "wait").unlink()
    status, ran, _ = recipe.run()
    assert status == 0 and ran == ["run second a, found half", "run second b, found "]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--stage", "3"], "--stage 3: there are 2 stages"),
        (["--stage", "2", "--stop_stage", "1"], "--stage 2 comes after --stop_stage 1"),
        (["--stop_stage", ""], "--stage and --stop_stage are numbers, found '1' and ''"),
        (["--fail", "--nj", "2"], "option --fail needs a value, found the option --nj"),
        (["--fial=b"], "unknown option --fial; did you mean '--fail'?"),
        (["--fail"], "option --fail needs a value"),
        (["--marks", "x"], "unknown option --marks"),
        (["-x"], "unexpected argument '-x'"),
    ],
)
def test_wrong_options(recipe, options, message):
    status, ran, output = recipe.run(*options)
    assert (status, ran) == (2, [])
    assert output == f"run.sh: {message} (see --help)\n" or output.startswith(f"run.sh: {message}")
    assert len(output.splitlines()) == 1
