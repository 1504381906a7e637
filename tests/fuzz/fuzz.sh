#!/usr/bin/env bash
# make fuzz: every reader and the C entry points, MPQ_FUZZ_SECONDS (default 60) each.
set -euo pipefail
python=$1 seconds=${MPQ_FUZZ_SECONDS:-60}
here=tests/fuzz work=build/fuzz
mkdir -p "${work}"
if [ ! -d "${work}/python/atheris" ]; then
    "${python}" -m pip install -q --target "${work}/python" -r conf/env/fuzz.txt ||
        echo "atheris cannot be installed: the readers are fuzzed by mutations, without coverage"
fi
export PYTHONPATH="${PWD}:${PWD}/${work}/python${PYTHONPATH:+:${PYTHONPATH}}"
for target in packed sealed plan table nas_options text; do
    "${python}" "${here}/fuzz_readers.py" "${target}" --seconds "${seconds}"
done
clang=$(command -v clang++ clang++-16 clang++-15 clang++-14 | head -n 1 || true)
if [ -z "${clang}" ]; then
    echo "no clang++: apt-get install clang libclang-rt-16-dev, then make fuzz also fuzzes the C entry points" >&2
    exit 1
fi
CXX="${clang}" "${python}" "${here}/build_kernels.py" "${work}/fuzz_kernels"
mkdir -p "${work}/kernels"
"${work}/fuzz_kernels" -max_total_time="${seconds}" -max_len=256 -artifact_prefix="${work}/" "${work}/kernels"
