"""The arrows between modules, and what `import espnet_mpq` costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "espnet_mpq"
FILES = sorted(PACKAGE.rglob("*.py"))

# Floors of the package: a part may import its own floor's list and nothing else of the package.
LEAVES = {"errors", "strict_json", "io", "file_kind", "lock", "fields", "progress", "vocabulary"}
LEAVES |= {"text"}
LEAVES |= {"statistics"}
BASE = LEAVES | {"quant", "clusters", "architecture", "plan"}
MIDDLE = {"sensitivity", "rounding", "search", "training", "packed"}
ALLOWED = {
    "errors": set(),
    "strict_json": set(),
    "progress": set(),
    "file_kind": {"errors"},
    "fields": {"errors"},
    "statistics": set(),
    "quant": {"errors"},
    "io": {"errors", "strict_json", "file_kind"},
    "text": {"errors", "io"},
    "lock": {"errors", "io"},
    "state_file": {"errors", "file_kind"},
    "vocabulary": {"io"},
    "clusters": {"errors"},
    "architecture": {"errors", "fields", "clusters"},
    "plan": {"errors", "io", "quant", "clusters"},
    "sensitivity": BASE,
    "rounding": BASE | {"sensitivity"},
    "search": BASE,
    "training": BASE,
    "kernels": {"errors"},
    "packed": BASE,
    "runtime": BASE | {"packed", "kernels"},
    "planning": BASE | MIDDLE,
    "decode": {"errors", "io"},
    "evaluate": {"errors", "io", "text", "statistics"},
    "report": {"errors", "io"},
    "hosts": BASE | MIDDLE | {"state_file", "kernels", "runtime", "planning", "evaluate", "decode"},
    "bin": BASE
    | MIDDLE
    | {"kernels", "runtime", "planning", "evaluate", "decode", "report", "hosts", "setup_recipe"},
    # The top: the public register() and the launcher reach into hosts when they are called.
    "__init__": {"hosts"},
    "__main__": {"errors", "hosts"},
    "setup_recipe": {"errors", "io"},
    "recipe": BASE | {"packed", "hosts", "bin"},
}
# Rooms of hosts/espnet, from the bottom up: a room imports those before it.
ROOMS = ("environment", "families", "kinds", "config_file", "recogniser", "loading", "registry")
ROOMS += ("experiment", "lm", "asr", "training")
HOSTS = {"espnet", "espnet2", "espnetez", "k2", "icefall", "lhotse"}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports_of(path: Path) -> set:
    """Dotted names of all modules imported anywhere in a file, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_parts(names: set) -> set:
    """The parts of espnet_mpq among imported names; its bare names (__version__) do not count."""
    parts = {n.split(".")[1] for n in names if n.startswith("espnet_mpq.")}
    return {p for p in parts if (PACKAGE / p).is_dir() or (PACKAGE / f"{p}.py").is_file()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    names = imports_of(path)
    assert part in ALLOWED, f"new part {part}: add its arrows here"
    wrong = own_parts(names) - ALLOWED[part] - {part}
    assert not wrong, f"{path.name} ({part}) must not import {sorted(wrong)}"
    if part != "hosts":
        foreign = {n.split(".")[0] for n in names} & HOSTS
        assert not foreign, f"only hosts/ imports {sorted(foreign)}"


def test_floors_have_no_circle():
    below = {part: set(allowed) for part, allowed in ALLOWED.items()}
    while below:
        free = [part for part, allowed in below.items() if not allowed & set(below)]
        assert free, f"a circle among {sorted(below)}"
        for part in free:
            del below[part]


def test_rooms_of_the_host_point_one_way():
    root = PACKAGE / "hosts" / "espnet"
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0].replace(".py", "")
        if room == "__init__":
            continue
        assert room in ROOMS, f"new room {room}: give it its place in ROOMS"
        names = {n for n in imports_of(path) if n.startswith("espnet_mpq.hosts.espnet.")}
        used = {n.split(".")[3] for n in names}
        wrong = [other for other in used if ROOMS.index(other) > ROOMS.index(room)]
        assert not wrong, f"{path.relative_to(root)} must not import {wrong}"
    assert len(list(root.glob("*.py"))) <= 8


LM_ROOMS = (
    r"architecture/\w+_lm\.py",
    r"runtime/(\w+_lm|prefixes|kernel_forms)\.py",
    r"hosts/\w+/lm/.*",
    r"decode/.*",
    r"evaluate/perplexity\.py",
    r"bin/.*",
    r"recipe/lm_\w+\.py",
    r"kernels/lstm\.py",
)


def test_words_of_language_models_stay_in_their_rooms():
    """No identifier elsewhere speaks of an LM, so that a recogniser can live there as well."""
    word = re.compile(r"^lms?$|lm_conf|seq_rnn")
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        if any(re.fullmatch(room, name) for room in LM_ROOMS):
            continue
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for key in ("id", "attr", "arg", "name"):
                value = getattr(node, key, None)
                if isinstance(value, str) and word.search(value):
                    found.add(value)
        assert not found, f"{name} speaks of language models: {sorted(found)}"


def test_only_the_registry_changes_the_host():
    """No other file assigns to attributes of the host's task, choices or modules."""
    for path in FILES:
        if path.name == "registry.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            for target in targets if isinstance(node, (ast.Assign, ast.AugAssign)) else ():
                text = ast.unparse(target)
                assert not text.startswith(("LMTask.", "ASRTask.", "lm_choices.", "model_choices."))


def test_files_are_short_and_say_what_they_are():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 370, f"{path} is too long"
        assert not text or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    for path in (PACKAGE / "recipe").glob("*.sh"):
        first, *rest = (
            path.read_text(encoding="utf-8").replace("#!/usr/bin/env bash\n", "").split("\n")
        )
        assert first.startswith("# ") and first.endswith("."), f"{path} does not say what it is"
        assert len(rest) <= 300, f"{path} is too long"


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_import_is_light():
    out = run_python(
        "import sys, espnet_mpq\n"
        "heavy = {'torch', 'espnet', 'espnet2', 'numpy', 'yaml', 'scipy', 'k2'}\n"
        "print(sorted(heavy & set(sys.modules)), espnet_mpq.__version__)"
    )
    assert out.split("]")[0] == "["


def test_import_of_the_core_is_quick():
    """Everything but hosts and bin, after torch, in under 0.3 s (best of 3)."""
    code = (
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import espnet_mpq, espnet_mpq.plan, espnet_mpq.clusters, espnet_mpq.__main__\n"
        "print(time.perf_counter() - start)"
    )
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_core_needs_no_host():
    code = (
        "import sys, importlib, importlib.util, pkgutil\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('espnet', 'espnet2', 'k2', 'torchaudio'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import espnet_mpq\n"
        "for m in pkgutil.walk_packages(espnet_mpq.__path__, 'espnet_mpq.'):\n"
        "    if '.hosts' not in m.name and not m.name.endswith('__main__'):\n"
        "        importlib.import_module(m.name)\n"
        "try:\n"
        "    espnet_mpq.register()\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    out = run_python(code)
    assert out.startswith("HostError ESPnet is needed") and "pip install espnet" in out
