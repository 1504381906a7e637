"""Compiles the kernel library with the C++ compiler of this machine; needs no other package.

Commands:
    python -m espnet_mpq.kernels.build               beside the sources, as the installation does
    python -m espnet_mpq.kernels.build --sanitize --output /tmp/libmpq_kernels.so
    CXX=aarch64-linux-gnu-g++ python -m espnet_mpq.kernels.build --machine aarch64 --output FILE
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Sequence

SOURCES = Path(__file__).resolve().parent / "csrc"
# Not just .so: Python would take that for a module of its own.
LIBRARY = Path(__file__).resolve().parent / "libmpq_kernels.so.1"
# Floats are the same on every path because nothing is fused or reordered.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
FLAGS += ["-pthread"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# One instruction set per file; what is compiled here is chosen when the library runs.
AVX512_FLAGS = [
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    "-mprefer-vector-width=512",
    # GCC 12's own intrinsics header sets these off (GCC bug 105593).
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
X86_FLAGS = {
    "path_avx2.cpp": ["-mavx2", "-mfma"],
    "path_avx512.cpp": AVX512_FLAGS,
    "path_avx512vbmi.cpp": [*AVX512_FLAGS, "-mavx512vbmi"],
}
ARM64_FLAGS = {"path_neon.cpp": [], "path_neon_dot.cpp": ["-march=armv8.2-a+dotprod"]}


class BuildError(Exception):
    """There is no C++ compiler, or it failed; the message is its own."""


def is_x86(machine: Optional[str] = None) -> bool:
    return (machine or platform.machine()).lower() in ("x86_64", "amd64")


def is_arm64(machine: Optional[str] = None) -> bool:
    return (machine or platform.machine()).lower() in ("aarch64", "arm64")


def sources(machine: Optional[str] = None) -> Dict[Path, List[str]]:
    """The files to compile for a machine (None: this one), each with all its flags."""
    mine, macro = {}, []
    if is_x86(machine):
        mine, macro = X86_FLAGS, ["-DMPQ_X86"]
    elif is_arm64(machine):
        mine, macro = ARM64_FLAGS, ["-DMPQ_ARM64"]
    others = {*X86_FLAGS, *ARM64_FLAGS} - set(mine)
    return {
        source: [*FLAGS, *macro, *mine.get(source.name, [])]
        for source in sorted(SOURCES.glob("*.cpp"))
        if source.name not in others
    }


def find_compiler() -> List[str]:
    """$CXX, else c++, g++ or clang++; raises BuildError when there is none."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: {' '.join(wanted) or 'c++, g++, clang++'} not found")


def compile_library(
    output: Path = LIBRARY, more_flags: Sequence[str] = (), machine: Optional[str] = None
) -> Path:
    """Compile csrc/ into one shared library and put it at ``output`` in one move.

    Args:
        machine: what $CXX compiles for, as platform.machine() names it; None: this one.

    Raises:
        BuildError: no compiler, or it refused.
    """
    compiler = find_compiler()
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source, flags in sources(machine).items():
            objects.append(str(Path(folder) / (source.stem + ".o")))
            _call([*compiler, *flags, *more_flags, "-c", str(source), "-o", objects[-1]])
        linked = Path(folder) / "linked.so"
        _call([*compiler, "-shared", "-pthread", *more_flags, *objects, "-o", str(linked)])
        # Next to the target first: a program that has the old library open keeps it.
        waiting = output.with_name(f"{output.name}.{os.getpid()}")
        shutil.copyfile(linked, waiting)
        os.replace(waiting, output)
    return output


def _call(command: List[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()[-4000:]}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=LIBRARY)
    parser.add_argument("--sanitize", action="store_true", help="address and undefined behaviour")
    parser.add_argument("--machine", help="what $CXX compiles for, such as aarch64")
    args = parser.parse_args(arguments)
    try:
        print(compile_library(args.output, SANITIZE if args.sanitize else (), args.machine))
    except BuildError as error:
        print(f"kernels not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
