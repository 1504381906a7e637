"""Import guards, each tried in a fresh interpreter on a made-up installation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
needs_nltk = pytest.mark.skipif(
    importlib.util.find_spec("nltk") is None, reason="nltk is not installed"
)


def run(
    code: str, *folders: Path, umask: int = 0o022, **environment
) -> subprocess.CompletedProcess:
    """Run code with ``folders`` first on the path; returns the finished process."""
    path = os.pathsep.join(str(p) for p in (*folders, ROOT))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    before = os.umask(umask)
    try:
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
    finally:
        os.umask(before)


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder with a torch that has only a version, so that these tests are quick."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "torch.py").write_text(
        "__version__ = '2.13.0+cpu'\nclass version:\n    cuda = None\n", encoding="utf-8"
    )
    return folder


def make_torchaudio(site: Path, extension: str, init: str = "") -> None:
    package = site / "torchaudio"
    (package / "compliance").mkdir(parents=True)
    (package / "_extension").mkdir()
    (package / "_extension" / "__init__.py").write_text(extension, encoding="utf-8")
    (package / "__init__.py").write_text(
        init + "from . import _extension\nfrom . import compliance, aligning\n", encoding="utf-8"
    )
    (package / "compliance" / "__init__.py").write_text("from . import kaldi", encoding="utf-8")
    (package / "compliance" / "kaldi.py").write_text(
        "def fbank(x):\n    return [x]\n", encoding="utf-8"
    )
    (package / "aligning.py").write_text(
        "from torchaudio._extension import fail_if_no_align\n"
        "@fail_if_no_align\n"
        "def forced_align(x):\n    return x\n",
        encoding="utf-8",
    )


PROBE = """
from espnet_mpq.hosts.espnet.environment import torchaudio as guards
print(guards.guard_torchaudio(), guards.guard_torchaudio())
import torchaudio, torchaudio.compliance.kaldi as kaldi
"""


def test_healthy_torchaudio_is_left_alone(site):
    make_torchaudio(site, "real = True\ndef fail_if_no_align(f):\n    return f\n")
    done = run(
        PROBE + "print(torchaudio._extension.real, torchaudio.aligning.forced_align(3))", site
    )
    assert done.stdout.splitlines() == ["whole whole", "True 3"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    "error", ["OSError('libc10_cuda.so: not found')", "RuntimeError('CUDA')", "ImportError('x')"]
)
def test_broken_compiled_part_leaves_the_python_part(site, error):
    make_torchaudio(site, f"raise {error}")
    code = PROBE + (
        "print(kaldi.fbank(5))\n"
        "try:\n    torchaudio.aligning.forced_align(3)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = run(code, site)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["pure python pure python", "[5]"]
    assert lines[2].startswith("MissingTorchaudioError") and "forced_align" in lines[2]
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert error.split("(")[0] in done.stderr and "pip install" in done.stderr
    assert "2.13.0 (CPU)" in done.stderr
    assert "raise " in (site / "torchaudio" / "_extension" / "__init__.py").read_text()


@pytest.mark.parametrize("present", [True, False])
def test_absent_or_hopeless_torchaudio_gets_a_stand_in(site, present):
    if present:
        make_torchaudio(site, "", init="raise ImportError('built for another Python')\n")
        hide = ""
    else:
        hide = (
            "import sys\nfrom importlib.machinery import PathFinder\n"
            "class Finder(PathFinder):\n"
            "    @classmethod\n"
            "    def find_spec(cls, name, path=None, target=None):\n"
            "        if name.split('.')[0] != 'torchaudio':\n"
            "            return PathFinder.find_spec(name, path, target)\n"
            "sys.meta_path[sys.meta_path.index(PathFinder)] = Finder\n"
        )
    code = (
        hide
        + PROBE
        + "import importlib.util\n"
        + "print(hasattr(torchaudio, 'load'), importlib.util.find_spec('torchaudio') is not None)\n"
        + "try:\n    kaldi.fbank(5)\n"
        + "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = run(code, site)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["absent absent", "False True"], done.stderr
    assert lines[2].startswith("MissingTorchaudioError torchaudio.compliance.kaldi.fbank")
    assert "pip install" in lines[2]
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_missing_and_old_host(site):
    code = (
        "from espnet_mpq.hosts.espnet.environment import espnet as guards\n"
        "try:\n    guards.prepare_host()\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    hide = "import sys\nsys.modules['espnet2'] = None\n"
    done = run(hide + code, site)
    assert done.stdout.startswith("HostError ESPnet is needed"), done.stderr
    assert "pip install espnet" in done.stdout
    for name in ("espnet", "espnet2"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("__version__ = '202301'\n", encoding="utf-8")
    done = run(code, site)
    assert "too old: found ESPnet 202301; expected 202402" in done.stdout, done.stderr


NLTK_PROBE = """
from espnet_mpq.hosts.espnet.environment import nltk as guards
folder = guards.offer_nltk_placeholders()
guards.offer_nltk_placeholders()
import os, nltk
def download(*args, **kwargs):
    raise SystemExit("download started")
nltk.download = download
for resource in guards.NLTK_RESOURCES:
    print(nltk.data.find(resource))
print(os.environ["NLTK_DATA"].split(os.pathsep).count(str(folder)))
"""


@needs_nltk
@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_nltk_finds_the_placeholders(tmp_path, umask):
    done = run(
        NLTK_PROBE,
        umask=umask,
        HOME=str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        NLTK_DATA="",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[2] == "1", done.stderr
    assert all(str(tmp_path / "cache" / "espnet_mpq") in line for line in lines[:2])


@needs_nltk
def test_real_nltk_data_wins(tmp_path):
    """Data in the user's home and in their own NLTK_DATA comes before the placeholders."""
    home, own = tmp_path / "home", tmp_path / "own"
    for folder, resource in (
        (home / "nltk_data", "taggers/averaged_perceptron_tagger_eng.zip"),
        (own, "corpora/cmudict.zip"),
    ):
        (folder / resource).parent.mkdir(parents=True)
        with zipfile.ZipFile(folder / resource, "w") as archive:
            archive.writestr("real", "data")
    done = run(
        NLTK_PROBE, HOME=str(home), XDG_CACHE_HOME=str(tmp_path / "cache"), NLTK_DATA=str(own)
    )
    lines = done.stdout.splitlines()
    assert str(home) in lines[0] and str(own) in lines[1], done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("g2p_en") is None, reason="no g2p_en")
def test_g2p_import_needs_no_network(tmp_path):
    code = NLTK_PROBE + "import g2p_en\nprint('imported')"
    done = run(code, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"), NLTK_DATA="")
    assert done.stdout.endswith("imported\n"), done.stderr


def test_read_only_cache_is_survived(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", encoding="utf-8")
    code = (
        "from espnet_mpq.hosts.espnet.environment import nltk as guards\n"
        "print(guards.offer_nltk_placeholders())\n"
        "import os; print('NLTK_DATA' in os.environ and os.environ['NLTK_DATA'])"
    )
    done = run(code, XDG_CACHE_HOME=str(blocked), TMPDIR=str(tmp_path), NLTK_DATA="")
    assert done.stdout.splitlines()[0].startswith(str(tmp_path / "espnet_mpq-")), done.stderr
