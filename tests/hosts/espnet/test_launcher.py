"""The launcher: its own words and errors, which modules register, spawned workers."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from espnet_mpq import __main__ as launcher
from espnet_mpq import __version__

ROOT = Path(__file__).resolve().parents[3]
needs_host = pytest.mark.skipif(
    importlib.util.find_spec("espnet2") is None, reason="ESPnet is not installed"
)


def host_bin() -> Path:
    return Path(importlib.util.find_spec("espnet2").submodule_search_locations[0]) / "bin"


@pytest.mark.parametrize(
    "argv, problem",
    [
        ([], "nothing to run"),
        (["-m"], "-m needs the name"),
        (["--unknown"], "unknown argument '--unknown'"),
        (["espnet2.bin.lm_train"], "unknown argument 'espnet2.bin.lm_train'"),
    ],
)
def test_wrong_use_explains_itself(argv, problem, capsys):
    assert launcher.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and problem in err
    assert "usage: python -m espnet_mpq -m MODULE" in err


def test_help_and_version(capsys):
    assert launcher.main(["--help"]) == 0
    assert launcher.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert "espnet2.bin.lm_train" in out and out.endswith(f"espnet_mpq {__version__}\n")


@needs_host
def test_misspelt_module_names_its_neighbours(capsys, monkeypatch):
    monkeypatch.setattr(launcher, "prepare", lambda name: None)
    assert launcher.main(["-m", "espnet2.bin.lm_trian"]) == 1
    assert "did you mean 'espnet2.bin.lm_train'" in capsys.readouterr().err
    assert launcher.main(["-m", "no_such_package.module"]) == 1
    assert "there is no module no_such_package.module" in capsys.readouterr().err


@needs_host
@pytest.mark.parametrize("kind, task", [("lm", r"\bLMTask"), ("asr", r"\bASRTask")])
def test_every_module_that_loads_a_model_registers(kind, task):
    """The patterns are checked against the sources of the installed host."""
    for path in host_bin().glob("*.py"):
        if re.search(task, path.read_text(encoding="utf-8")):
            assert kind in launcher.kinds_of(path.stem), path.stem
    assert launcher.kinds_of("tts_train") == () and launcher.kinds_of("lm_train") == ("lm",)
    assert not any(map(launcher.kinds_of, launcher.LIGHT_MODULES))


@needs_host
def test_light_modules_stay_light():
    """A recipe calls these dozens of times: no torch, arguments passed on, argv[0] set."""
    code = (
        "import sys\nfrom espnet_mpq.__main__ import main\n"
        "try:\n    main(['-m', 'espnet2.bin.tokenize_text', '--help'])\n"
        "except SystemExit as stop:\n    print('status', stop.code)\n"
        "print(sys.argv[0], sorted({'torch', 'espnet2.tasks.lm'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert "usage: tokenize_text.py" in done.stdout, done.stderr
    assert lines[-2] == "status 0"
    assert lines[-1] == f"{host_bin() / 'tokenize_text.py'} []"


def test_scripts_and_other_modules_run_as_python_runs_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(__name__, sys.argv, sys.path[0])", encoding="utf-8")
    (tmp_path / "plain_module.py").write_text("import sys\nprint(__name__, sys.argv[1:])")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "espnet_mpq"]
    out = subprocess.run(
        [*command, str(script), "-x", "a b"], env=environment, capture_output=True, text=True
    ).stdout
    assert out.strip() == f"__main__ {[str(script), '-x', 'a b']} {tmp_path}"
    out = subprocess.run(
        [*command, "-m", "plain_module", "1"], env=environment, capture_output=True, text=True
    ).stdout
    assert out.strip() == "__main__ ['1']"


PROBE = """
import sys
import torch.multiprocessing as mp

def child(queue):
    from espnet2.tasks.lm import LMTask, lm_choices
    queue.put([LMTask.trainer.__name__, *sorted(lm_choices.classes)])

def main():
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print("CHILD", *queue.get(timeout=300))
    process.join()
    print("ARGV", *sys.argv[1:], __name__)
"""
# Puts the probe among the host's programs, in the parent and in what it spawns.
SITE = """
import importlib.util, pathlib, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "espnet2.bin.lm_probe":
            place = pathlib.Path(__file__).parent / "espnet2" / "bin" / "lm_probe.py"
            return importlib.util.spec_from_file_location(name, place)
sys.meta_path.insert(0, Finder)
"""


@needs_host
def test_spawned_workers_know_the_plugin(tmp_path):
    """Multi-GPU training spawns its workers, which import the parent's __main__ again."""
    place = tmp_path / "espnet2" / "bin"
    place.mkdir(parents=True)
    (place / "lm_probe.py").write_text(PROBE, encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "espnet_mpq", "-m", "espnet2.bin.lm_probe", "--x", "1"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    child = next((line.split() for line in lines if line.startswith("CHILD")), [])
    assert "mpq_seq_rnn" in child and "mpq_packed_rnn" in child, done.stderr[-2000:]
    assert child[1] == "MpqTrainer"
    assert "ARGV --x 1 espnet2.bin.lm_probe" in lines
