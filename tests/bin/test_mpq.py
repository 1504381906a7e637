"""The `mpq` command: help that teaches, lazy subcommands, exit status."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from espnet_mpq.bin import mpq


def test_help_lists_every_subcommand_and_the_road(capsys):
    assert mpq.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in mpq.SUBCOMMANDS:
        assert f"  {name} " in text
    assert "mpq quantize" in text and "--init_param" in text
    assert mpq.main([]) == 2


def test_version(capsys):
    from espnet_mpq import __version__

    assert mpq.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mpq {__version__}\n"


@pytest.mark.parametrize("name", list(mpq.SUBCOMMANDS))
def test_every_subcommand_has_help_with_an_example(name, capsys):
    assert mpq.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"mpq {name} " in text and "--config FILE.yaml" in text
    assert "example" in text
    module = importlib.import_module(f"espnet_mpq.bin.{name}")
    assert callable(module.add_arguments) and callable(module.main)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from espnet_mpq.bin.mpq import main; main(['--help']);"
        "main(['sensitivity', '--help']); main(['plan', '--help']);"
        "bad = {'torch', 'numpy', 'espnet2', 'scipy'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_subcommand(capsys):
    assert mpq.main(["sensitvity"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'sensitivity'" in error and error.count("\n") == 1


def test_an_unexpected_error_is_one_line_and_a_traceback_on_demand(capsys, monkeypatch):
    from espnet_mpq.bin import info

    def broken(args):
        raise KeyError("lost\nand found")

    monkeypatch.setattr(info, "main", broken)
    monkeypatch.delenv("MPQ_DEBUG", raising=False)
    assert mpq.main(["info", "somewhere"]) == 1
    line = "mpq info: internal error: KeyError: 'lost\\nand found'"
    hint = " (--debug or MPQ_DEBUG=1 shows the traceback)"
    assert capsys.readouterr().err == f"{line}{hint}\n"
    assert mpq.main(["info", "somewhere", "--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1] == line
    monkeypatch.setenv("MPQ_DEBUG", "1")
    assert mpq.main(["info", "somewhere"]) == 1
    assert "Traceback" in capsys.readouterr().err
