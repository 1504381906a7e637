"""Makes the installed host importable: no network, a missing or broken torchaudio, clear errors."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Optional

from espnet_mpq.errors import HostError

# A named logger: the root functions of logging would configure it before the host does.
LOG = logging.getLogger("espnet_mpq")
OLDEST_ESPNET = 202402
INSTALL_ESPNET = "install it: pip install espnet"
# What g2p_en downloads while it is imported (by the host, for phonemes).
NLTK_RESOURCES = ("taggers/averaged_perceptron_tagger_eng.zip", "corpora/cmudict.zip")


class MissingTorchaudioError(HostError, AttributeError):
    """Something of torchaudio is used that this machine does not have.

    An AttributeError too, so that hasattr() on a stand-in answers False.
    """


def prepare_host() -> None:
    """Guard the imports of the host; call it before any import of espnet2. Idempotent.

    Raises:
        HostError: ESPnet is missing or older than 202402.
    """
    check_host()
    offer_nltk_placeholders()
    guard_torchaudio()


def check_host() -> str:
    """Return the version of the installed ESPnet ("202511").

    Raises:
        HostError: it is missing or too old.
    """
    for name in ("espnet2", "espnet"):
        if not _is_installed(name):
            raise HostError(
                "ESPnet is needed for this",
                found=f"no module {name} in {sys.prefix}",
                expected=f"ESPnet {OLDEST_ESPNET} or newer",
                todo=INSTALL_ESPNET,
            )
    version = str(getattr(importlib.import_module("espnet"), "__version__", "unknown"))
    digits = version.replace(".", "")[:6]
    if digits.isdigit() and int(digits) < OLDEST_ESPNET:
        raise HostError(
            "this ESPnet is too old",
            found=f"ESPnet {version}",
            expected=f"{OLDEST_ESPNET} or newer",
            todo='upgrade it: pip install --upgrade "espnet>=202402"',
        )
    return version


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


# nltk -----------------------------------------------------------------------------------------


def offer_nltk_placeholders() -> Optional[Path]:
    """Stop the downloads that the host's g2p_en starts at import, also in child processes.

    Placeholder files go to a private folder that becomes the LAST of nltk's search path:
    NLTK_DATA is searched before nltk's default folders, so these are repeated in front of
    ours and real data always wins. Returns the folder, or None when none could be written.
    """
    try:
        folder = _placeholder_folder()
    except OSError as error:
        LOG.warning("no folder for nltk placeholders (%s): imports may try to download", error)
        return None
    before = [p for p in os.environ.get("NLTK_DATA", "").split(os.pathsep) if p]
    if str(folder) not in before:
        paths = [*before, *_nltk_default_paths(), str(folder)]
        os.environ["NLTK_DATA"] = os.pathsep.join(dict.fromkeys(paths))
    data = sys.modules.get("nltk.data")
    if data is not None and str(folder) not in data.path:
        data.path.append(str(folder))
    return folder


def _nltk_default_paths() -> list[str]:
    """The folders that nltk searches by itself, in its order (nltk.data)."""
    prefix = sys.prefix
    paths = [os.path.expanduser("~/nltk_data")]
    paths += [os.path.join(prefix, *parts, "nltk_data") for parts in ((), ("share",), ("lib",))]
    if sys.platform.startswith("win"):
        return paths + [os.path.join(os.environ.get("APPDATA", "C:\\"), "nltk_data")]
    shared = ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")
    return paths + [os.path.join(p, "nltk_data") for p in shared]


def _placeholder_folder() -> Path:
    """The folder with one empty archive per resource, made when needed.

    Private to the user (0700, files 0600): nltk refuses data that others could change.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    bases = [Path(cache) / "espnet_mpq", Path(tempfile.gettempdir()) / f"espnet_mpq-{user}"]
    problem: Optional[OSError] = None
    for base in bases:
        folder = base / "nltk_placeholders"
        try:
            for resource in NLTK_RESOURCES:
                _write_placeholder(folder, resource)
            return folder
        except OSError as error:
            problem = error
    raise problem


def _write_placeholder(folder: Path, resource: str) -> None:
    target = folder / resource
    if target.is_file() and zipfile.is_zipfile(target):
        return
    for place in (folder, target.parent):
        place.mkdir(parents=True, exist_ok=True)
        os.chmod(place, 0o700)
    # Many jobs of a recipe may start at once: write aside, then rename.
    handle, temporary = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("README", "Placeholder of espnet_mpq; the real data was not downloaded.")
    os.replace(temporary, target)


# torchaudio -----------------------------------------------------------------------------------


def guard_torchaudio() -> str:
    """Make `import torchaudio` work; returns "whole", "pure python" or "absent".

    A healthy installation is left alone. One whose compiled part does not fit (a CUDA build
    beside a CPU torch raises OSError) is imported without that part, which keeps its Kaldi
    filter banks. Where there is none, or nothing helps, a stand-in raises when it is used.
    Nothing on disk changes.
    """
    current = sys.modules.get("torchaudio")
    if current is not None:
        return getattr(current, "__mpq_state__", "whole")
    if not _is_installed("torchaudio"):
        return _stand_in("torchaudio is not installed")
    try:
        importlib.import_module("torchaudio")
        return "whole"
    except Exception as error:  # OSError, ImportError or RuntimeError, by version
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    _forget_torchaudio()
    sys.modules["torchaudio._extension"] = _no_extension()
    try:
        module = importlib.import_module("torchaudio")
    except Exception:
        _forget_torchaudio()
        return _stand_in(f"torchaudio cannot be imported ({problem})")
    module.__mpq_state__ = "pure python"
    LOG.warning(
        "torchaudio's compiled part does not fit this torch (%s): using its Python part only; %s",
        problem,
        _install_torchaudio(),
    )
    return "pure python"


def _install_torchaudio() -> str:
    torch = importlib.import_module("torch")
    build = "CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    version = torch.__version__.split("+")[0]
    return (
        f"for the whole of it install the build that belongs to torch {version} ({build}): "
        "pip install --no-deps torchaudio"
    )


def _forget_torchaudio() -> None:
    for name in [n for n in sys.modules if n == "torchaudio" or n.startswith("torchaudio.")]:
        del sys.modules[name]


def _no_extension() -> types.ModuleType:
    """A torchaudio._extension that found nothing to load, as torchaudio itself allows."""

    def fail_if_no_align(function):
        def fail(*args, **kwargs):
            raise MissingTorchaudioError(
                f"torchaudio's {function.__name__} needs its compiled part",
                todo=_install_torchaudio(),
            )

        return fail

    module = types.ModuleType("torchaudio._extension")
    module._IS_TORCHAUDIO_EXT_AVAILABLE = False
    module._IS_ALIGN_AVAILABLE = False
    module._IS_RIR_AVAILABLE = False
    module._IS_KALDI_AVAILABLE = False
    module._SOX_INITIALIZED = False
    module._FFMPEG_EXT = None
    module._load_lib = lambda lib: False
    module._init_ffmpeg = lambda: None
    module._check_cuda_version = lambda: None
    module.fail_if_no_align = fail_if_no_align
    module.fail_if_no_rir = fail_if_no_align
    module.fail_if_no_kaldi = fail_if_no_align
    module.fail_if_no_sox = fail_if_no_align
    module.fail_if_no_ffmpeg = fail_if_no_align
    return module


class _StandIn(types.ModuleType):
    """A module that can be imported but not used."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingTorchaudioError(
            f"{self.__name__}.{name} is not available",
            found=self.__dict__.get("__mpq_problem__"),
            expected="torchaudio",
            todo=_install_torchaudio(),
        )


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for torchaudio and its submodules, after every other finder."""

    def __init__(self, problem: str):
        self.problem = problem

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] != "torchaudio":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        module.__mpq_state__ = "absent"
        module.__mpq_problem__ = self.problem


def _stand_in(problem: str) -> str:
    finder = _StandInFinder(problem)
    spec = finder.find_spec("torchaudio")
    module = importlib.util.module_from_spec(spec)
    finder.exec_module(module)
    # In sys.modules first: a broken installation on the path must not be tried again.
    sys.modules["torchaudio"] = module
    sys.meta_path.append(finder)
    LOG.warning("%s: what needs it fails, the rest works; %s", problem, _install_torchaudio())
    return "absent"
