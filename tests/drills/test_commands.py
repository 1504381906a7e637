"""Drills of sensitivity, pack and quantize: killed, or the disk full, at random moments.

After any of that, one more run gives the bytes of an undisturbed run; what is on the disk before
is the old result, the new one, or is refused. Longer: make drills.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Tuple

import pytest
from disturbed_runs import Done, End, enlarge, hashes, is_long, run, small_disk

RESULTS = ("*.json", "out/*.*", "out/work/*.json", "out/work/plan/*.json", "out/work/plan/*.yaml")
ROOM = 1 << 30


@dataclass(frozen=True)
class Command:
    """A command, what it leaves when nothing disturbs it, and how long that takes."""

    name: str
    arguments: Tuple[str, ...]
    results: Dict[str, str]
    done: Done
    start: Path  # the folder it starts in is a copy of this one

    def begin_in(self, folder: Path) -> None:
        """Make the folder as it is before the command."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.start, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder that all runs have in turn: configurations of trainings hold absolute paths."""
    return tmp_path_factory.mktemp("drills") / "run"


@pytest.fixture(scope="module")
def commands(fp_exp, text_file, place):
    """name -> Command, as it is undisturbed."""
    start = {"fresh": place.with_name("fresh"), "packed": place.with_name("packed")}
    lm = ["--lm_exp", str(fp_exp.path)]
    text = ["--text", str(text_file), "--text_format", "plain"]
    place.mkdir()
    for bits in ("2", "8"):
        made = run(["plan", *lm, "--uniform", bits, "--output_dir", f"plan{bits}"], place)
        assert made.status == 0, made.output
    shutil.copytree(place, start["fresh"])
    made = run(["pack", *lm, "--plan", "plan2/plan.json", "--output_dir", "out"], place)
    assert made.status == 0, made.output
    shutil.move(place, start["packed"])
    sensitivity = ["sensitivity", *lm, *text, "--max_tokens", "200", "--output", "s.json"]
    pack = ["pack", *lm, "--plan", "plan8/plan.json", "--output_dir", "out"]
    quantize = ["quantize", str(fp_exp.path), "--bits", "20", *text, "--output", "out"]
    quantize += ["--sensitivity_tokens", "200"]
    wanted = {
        "sensitivity": (sensitivity, "fresh"),
        "hessian": ([*sensitivity, "--method", "hessian", "--max_probes", "3"], "fresh"),
        "pack": (pack, "fresh"),
        "pack over another": (pack, "packed"),
        "quantize without training": ([*quantize, "--no_train"], "fresh"),
        "quantize": ([*quantize, "--max_epoch", "2"], "fresh"),
    }

    def make(name: str) -> Command:
        if name not in made_before:
            arguments, folder = wanted[name]
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(start[folder], place)
            done = run(arguments, place)
            assert done.status == 0, done.output
            results = hashes(place, *RESULTS)
            made_before[name] = Command(name, tuple(arguments), results, done, start[folder])
        return made_before[name]

    made_before: Dict[str, Command] = {}
    return make


# Rounds of the short form; the others are run by make drills alone.
KILLED = {"sensitivity": 2, "pack over another": 3}
FULL = {"sensitivity": 2, "pack over another": 2}
if is_long():
    KILLED = FULL = dict.fromkeys(
        [*KILLED, "hessian", "pack", "quantize without training", "quantize"], 1
    )


def some_end(rng: random.Random, command: Command) -> End:
    """A moment of the run to kill it at."""
    kind = rng.choice(("event", "seconds", "file_n_bytes"))
    if kind == "event":
        return End(event=rng.randint(1, command.done.n_events))
    if kind == "seconds":
        return End(seconds=rng.uniform(0.01, command.done.seconds))
    return End(file_n_bytes=int(10 ** rng.uniform(1, 5)))


def finish(command: Command, folder: Path, what: object) -> None:
    """Run it undisturbed: at once or after one clear error, the results are the right ones."""
    done = run(command.arguments, folder)
    if done.status != 0:
        assert done.is_clear_error(), f"{what}: {done.output}"
        done = run(command.arguments, folder)
    assert done.status == 0, f"{what}: {done.output}"
    found = hashes(folder, *RESULTS)
    different = sorted(k for k in command.results if found.get(k) != command.results[k])
    left = sorted(found.keys() - command.results.keys())
    assert not different and not left, f"{what}: {different} differ, {left} are left"


@pytest.mark.parametrize("name", KILLED)
def test_killed(commands, rounds, place, name):
    command = commands(name)
    for rng in rounds(KILLED[name]):
        command.begin_in(place)
        ends = [some_end(rng, command) for _ in range(rng.randint(1, 3))]
        for end in ends:
            done = run(command.arguments, place, end)
            assert done.was_killed or done.status == 0 or done.is_clear_error(), (end, done.output)
        finish(command, place, ends)


def test_a_packed_lm_that_is_being_replaced_is_never_silently_wrong(
    commands, rounds, text_file, place
):
    """Perplexity after the kill: that of the old LM, or of the new one, or an error."""
    command = commands("pack over another")
    measure = ["perplexity", "out", "--text", str(text_file), "--json", "../ppl.json"]

    def perplexity():
        done = run(measure, place)
        assert done.status == 0 or done.is_clear_error(), done.output
        return None if done.status else json.loads(place.with_name("ppl.json").read_text())["ppl"]

    command.begin_in(place)
    old = perplexity()
    assert run(command.arguments, place).status == 0
    new = perplexity()
    assert None not in (old, new) and old != new
    for rng in rounds(2):
        command.begin_in(place)
        # the last events are those that put files in place
        end = End(event=rng.randint(max(1, command.done.n_events - 15), command.done.n_events))
        assert run(command.arguments, place, end).was_killed
        assert perplexity() in (old, new, None), end
        finish(command, place, end)


@pytest.mark.parametrize("name", FULL)
def test_full_disk(commands, rounds, place, name):
    """One clear error that speaks of the disk, then, with room, the right results."""
    command = commands(name)
    for rng in rounds(FULL[name]):
        start = sum(p.stat().st_size + 4096 for p in command.start.rglob("*"))
        n_bytes = start + int(10 ** rng.uniform(3, 6))
        shutil.rmtree(place, ignore_errors=True)
        with small_disk(place, n_bytes) as is_mounted:
            end = End() if is_mounted else End(full_n_bytes=int(10 ** rng.uniform(1, 5)))
            what = f"{n_bytes} bytes" if is_mounted else end
            shutil.copytree(command.start, place, dirs_exist_ok=True)
            done = run(command.arguments, place, end)
            assert done.status == 0 or done.is_clear_error(), f"{what}: {done.output}"
            if done.status:
                reasons = ("No space left", "File too large", "disk")
                assert any(reason in done.output for reason in reasons), f"{what}: {done.output}"
            if is_mounted:
                enlarge(place, ROOM)
            finish(command, place, what)
