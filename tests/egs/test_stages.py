"""stages.sh with stages that only touch files: what is skipped, repeated, kept and dropped."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "espnet_mpq" / "recipe"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
SCRIPT = """set -euo pipefail
stage=1 stop_stage=9 nj=1 python=false fail=
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
    # Nothing of the stage is marked as done; what is there is handed to the same work again.
    assert recipe.run()[1] == ["run second a, found half", "run second b, found half"]
    recipe.run("--fail", "b", "--stage", "2", "--stop_stage", "2")
    (recipe.folder / "options_b").write_text("2\n")
    assert recipe.run()[1] == ["run second a, found half", "run second b, found "]


def test_a_missing_input_is_named(recipe):
    (recipe.folder / "options_b").unlink()
    status, ran, output = recipe.run()
    assert status == 1 and ran == ["run first"]
    assert "stage 2 needs options_b, which does not exist" in output
