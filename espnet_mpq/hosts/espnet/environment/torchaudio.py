"""Makes `import torchaudio` work where it is missing or broken; what needs it fails, clearly."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types

from espnet_mpq.errors import HostError
from espnet_mpq.hosts.espnet.environment.installed import is_installed

LOG = logging.getLogger("espnet_mpq")


class MissingTorchaudioError(HostError, AttributeError):
    """Something of torchaudio is used that this machine does not have.

    An AttributeError too, so that hasattr() on a stand-in answers False.
    """


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
    if not is_installed("torchaudio"):
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
