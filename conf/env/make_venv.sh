#!/usr/bin/env bash
# Makes (or reuses) a virtual environment with exactly the packages of a constraints file,
# and this checkout installed into it in editable mode.
#   conf/env/make_venv.sh DIR PYTHON_VERSION CONSTRAINTS
# e.g. conf/env/make_venv.sh .venv 3.11 conf/env/newest.txt
# PYTHON=/path/to/python chooses the interpreter; otherwise python3.X, python3 and pyenv's are tried.
set -euo pipefail
dir=$1; version=$2; constraints=${3:-}

is_wanted() { "$1" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} "python$version" python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
        if is_wanted "$candidate"; then echo "$candidate"; return 0; fi
    done
    return 1
}

if [ "$dir" = --find ]; then find_python; exit; fi

hash_of() { cat "$@" | sha256sum | cut -d' ' -f1; }
key=$(hash_of "$constraints" setup.py "$0")
# The installation compiles the kernels; when only their sources changed, only they are compiled again.
kernels=$(hash_of espnet_mpq/kernels/build.py espnet_mpq/kernels/csrc/*)
if [ "$(head -n 1 "$dir/.ready" 2>/dev/null)" = "$key" ] && "$dir/bin/python" -c "" 2>/dev/null; then
    [ "$(tail -n +2 "$dir/.ready")" = "$kernels" ] || "$dir/bin/python" -m espnet_mpq.kernels.build || echo "the kernels stay as they were" >&2
    printf '%s\n' "$key" "$kernels" > "$dir/.ready"
    exit 0
fi
if ! python=$(find_python); then
    echo "make_venv.sh: no Python $version found (with the venv module); expected python$version on the path;" \
         "install it or set PYTHON=/path/to/python$version" >&2
    exit 1
fi
echo "making $dir: Python $version, packages of $constraints (a few minutes, once)"
rm -rf "$dir"
"$python" -m venv "$dir"
pip() { "$dir/bin/python" -m pip --disable-pip-version-check "$@"; }
pin() { grep -E "^$1==" "$constraints"; }
# The environment carries its own installer: ESPnet's source packages do not build with every pip.
pip install -q "$(pin pip)" "$(pin setuptools)" wheel
# torch with its dependencies (a CUDA build brings its own libraries), all else exactly as listed.
pip install -q -c "$constraints" "$(pin torch)"
pip install -q --no-deps -r "$constraints"
pip install -q --no-deps --no-build-isolation -e .
printf '%s\n' "$key" "$kernels" > "$dir/.ready"
