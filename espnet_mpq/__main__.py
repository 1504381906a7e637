"""The launcher: runs a module of the host, with the plugin registered, in place of `python -m`."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import os
import pkgutil
import runpy
import sys
from pathlib import Path
from typing import Optional, Sequence

from espnet_mpq import __version__
from espnet_mpq.errors import InputError, MpqError, near_matches

USAGE = """\
usage: python -m espnet_mpq -m MODULE [ARGUMENTS ...]
       python -m espnet_mpq SCRIPT.py [ARGUMENTS ...]

Runs a module of ESPnet as `python -m MODULE` would, with the low-bit language models
of espnet_mpq (mpq_seq_rnn, mpq_transformer, mpq_packed_rnn, mpq_packed_transformer, ...)
and its packed recognisers (mpq_packed_asr) registered. Examples:

  python -m espnet_mpq -m espnet2.bin.lm_train --config conf/train_lm_mpq.yaml ...
  python -m espnet_mpq -m espnet2.bin.asr_inference --asr_train_config ... --lm_train_config ...
  ./run.sh --python "python3 -m espnet_mpq" ...      (a whole ESPnet recipe)

The plugin's own commands are under `mpq` (python -m espnet_mpq.bin.mpq --help).

options:
  -h, --help     show this text
  --version      show the version of espnet_mpq
"""

# Tells spawned workers which module of espnet2.bin runs.
MODULE_VARIABLE = "ESPNET_MPQ_MODULE"
# Modules of espnet2.bin that build or load a language model (LMTask).
LM_MODULES = (
    "lm_*",
    "asr_train",
    "asr_inference*",
    "asr_transducer_*",
    "s2t_inference*",
    "st_inference*",
    "mt_inference*",
    "slu_inference*",
    "speechlm_*",
    "uasr_inference*",
)
# Those that build or load a recogniser (ASRTask).
ASR_MODULES = ("asr_train", "asr_inference*", "asr_align")
# Helpers of the recipes that start without torch; they must stay that quick.
LIGHT_MODULES = (
    "aggregate_stats_dirs",
    "hugging_face_export_vocabulary",
    "launch",
    "pack",
    "split_scps",
    "tokenize_text",
    "whisper_export_vocabulary",
)


def kinds_of(name: str) -> tuple[str, ...]:
    """The kinds of models that a module of espnet2.bin, by its last name ("lm_train"), loads."""
    patterns = {"lm": LM_MODULES, "asr": ASR_MODULES}
    return tuple(
        kind for kind, names in patterns.items() if any(fnmatch.fnmatchcase(name, n) for n in names)
    )


def prepare(name: str) -> None:
    """Do what the module espnet2.bin.``name`` needs: register, or only guard its imports."""
    from espnet_mpq.hosts.espnet.environment import espnet, nltk

    kinds = kinds_of(name)
    if kinds:
        from espnet_mpq.hosts.espnet.registry import register, watch_recognisers

        register(*kinds)
        watch_recognisers()
    elif name in LIGHT_MODULES:
        espnet.check_host()
        nltk.offer_nltk_placeholders()
    else:
        espnet.prepare_host()


def run_module(module_name: str, arguments: Sequence[str]) -> None:
    """Run a module's ``main()``, or the module itself as `python -m` would when it has none.

    A host module is imported under its own name, not as ``__main__``: a spawned worker
    imports the parent's ``__main__`` again and must find this launcher there, so that it
    registers too.
    """
    package, _, name = module_name.rpartition(".")
    is_host = package == "espnet2.bin"
    if is_host:
        from espnet_mpq.hosts.espnet.environment.espnet import check_host

        check_host()
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        known = [f"espnet2.bin.{m}" for m in _host_modules()] if is_host else []
        hint = near_matches(module_name, known) if known else "check the name after -m"
        raise InputError(f"there is no module {module_name}", todo=hint)
    if is_host and spec.origin:
        os.environ[MODULE_VARIABLE] = name
        prepare(name)
        # The host prints sys.argv[0] in its logs.
        sys.argv = [spec.origin, *arguments]
        module = importlib.import_module(module_name)
        if callable(getattr(module, "main", None)):
            module.main()
            return
    sys.argv = [module_name, *arguments]
    runpy.run_module(module_name, run_name="__main__", alter_sys=True)


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a Python file as `python FILE` would, so that `--python` of a recipe is complete."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).resolve().parent))
    runpy.run_path(path, run_name="__main__")


def _host_modules() -> list[str]:
    try:
        spec = importlib.util.find_spec("espnet2.bin")
    except ModuleNotFoundError:
        return []
    places = spec.submodule_search_locations if spec else None
    return [m.name for m in pkgutil.iter_modules(places)] if places else []


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Read the launcher's own words, then hand over; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv and argv[0] == "--version":
        print(f"espnet_mpq {__version__}")
        return 0
    problem = None
    if not argv:
        problem = "nothing to run"
    elif argv[0] == "-m" and len(argv) == 1:
        problem = "-m needs the name of a module"
    elif argv[0] != "-m" and not Path(argv[0]).is_file():
        problem = f"unknown argument {argv[0]!r}"
    if problem:
        print(f"{USAGE}\npython -m espnet_mpq: error: {problem}", file=sys.stderr)
        return 2
    try:
        if argv[0] == "-m":
            run_module(argv[1], argv[2:])
        else:
            run_script(argv[0], argv[1:])
    except MpqError as error:
        print(f"python -m espnet_mpq: error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare_spawned_worker() -> None:
    """Register in a worker that multiprocessing spawned; sys.argv does not tell for whom there."""
    if os.environ.get(MODULE_VARIABLE):
        prepare(os.environ[MODULE_VARIABLE])


if __name__ == "__main__":
    # multiprocessing leaves out a package's __main__ in spawned workers when it knows it by its
    # module name; without a spec it goes by the file and imports it there as __mp_main__.
    __spec__ = None
    sys.exit(main())
elif __name__ == "__mp_main__":
    prepare_spawned_worker()
