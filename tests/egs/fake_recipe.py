"""A recipe folder whose run.sh and Python note what they are asked and leave the files behind."""

import os
import stat
import subprocess
import sys
from pathlib import Path

PARSE_OPTIONS = """while [ $# -gt 0 ]; do
  case "$1" in
    --help) printf "${help_message}\\n" 1>&2; exit 0 ;;
    --*) name=${1#--}; name=${name//-/_}
         eval '[ -z "${'$name'+xxx}" ]' && echo "$0: invalid option $1" 1>&2 && exit 1
         eval "$name=\\"$2\\""; shift 2 ;;
    *) break ;;
  esac
done
"""
# Like the host's: `run.pl [--gpu N] [JOB=1:n] LOG COMMAND...`.
RUN_PL = """#!/usr/bin/env bash
note "$(basename "$0")" "$@"
[ "$1" != --gpu ] || shift 2
n=
case "$1" in JOB=1:*) n=${1#JOB=1:}; shift ;; esac
for job in $(seq ${n:-1}); do
  "${@:2}" > /dev/null || exit 1
done
"""
RUN_SH = """#!/usr/bin/env bash
set -e
note run.sh "$@"
while [ $# -gt 0 ]; do
  case "$1" in --*) eval "${1#--}=\\$2"; shift 2 ;; *) shift ;; esac
done
if [ -e fail_at_${stage} ]; then echo "stage ${stage} breaks"; exit 3; fi
case ${stage} in
  6) mkdir -p "${lm_exp}" exp/lm_stats/train; echo 1 > exp/lm_stats/train/text_shape.char
     c="${lm_exp}/config.yaml"
     { echo train_data_path_and_name_and_type:; echo "-   - dump/raw/lm_train.txt"; } > "$c"
     echo "lm: ${lm:-seq_rnn}" >> "$c"
     { echo train_shape_file:; echo "- exp/lm_stats/train/text_shape.char"; } >> "$c"
     echo fp > "${lm_exp}/valid.loss.ave.pth" ;;
  7) mkdir -p "${lm_exp}"; echo "${lm_config}" > "${lm_exp}/config.yaml"
     echo q > "${lm_exp}/valid.loss.best.pth" ;;
  12) for t in ${test_sets}; do
        mkdir -p "${asr_exp}/${inference_tag}/$t"
        cp dump/raw/$t/text "${asr_exp}/${inference_tag}/$t/text"
      done ;;
esac
"""
# Stands for a Python with espnet_mpq: heavy commands are noted and faked, light ones are real.
PYTHON = """#!/usr/bin/env bash
set -e
note python "$@"
option() {
  local o=$1; shift
  while [ $# -gt 0 ]; do if [ "$1" = "$o" ]; then echo "$2"; return; fi; shift; done
}
all=("$@")
case "$*" in
  "-c import "* | *espnet_mpq.recipe.check*) exec "$REAL_PYTHON" "$@" ;;
  *"bin.mpq sensitivity"*) echo '{}' > "$(option --output "${all[@]}")" ;;
  *"bin.mpq nas"*) d=$(option --output_dir "${all[@]}"); mkdir -p "$d"
     echo '{}' > "$d/sensitivity.json" ;;
  *"bin.mpq plan"*) d=$(option --output_dir "${all[@]}"); mkdir -p "$d"
     echo '{}' > "$d/plan.json"
     echo "budget $(option --budget "${all[@]}")" > "$d/train_lm_mpq.yaml"
     echo png > "$d/pareto.png" ;;
  *"bin.mpq pack"*) d=$(option --output_dir "${all[@]}"); mkdir -p "$d"; echo c > "$d/config.yaml"
     echo packed > "$d/packed.safetensors"
     echo '{"totals": {"effective_bits": 1.99, "n_bytes": 7}}' > "$d/receipt.json" ;;
  *"bin.mpq info"*) echo "embedding 2 bit" ;;
  *"bin.mpq compare"*) shift 3; exec "$REAL_PYTHON" "$COMPARE" "$@" ;;
  *lm_calc_perplexity*) d=$(option --output_dir "${all[@]}"); mkdir -p "$d"; echo 12.5 > "$d/ppl" ;;
  *report.table*) exec "$REAL_PYTHON" "$@" ;;
  *) echo "unexpected: $*" 1>&2; exit 9 ;;
esac
"""
# One line a command, arguments separated by the unit separator.
NOTE = """#!/usr/bin/env bash
(IFS=$'\\x1f'; echo "$*") >> "$NOTES"
"""
COMPARE = """import argparse
from espnet_mpq.bin import compare
parser = argparse.ArgumentParser()
compare.add_arguments(parser)
compare.main(parser.parse_args())
"""


class FakeRecipe:
    """The folder, the environment to run mpq.sh in, and what was asked so far."""

    def __init__(self, folder: Path):
        self.path = folder / "asr1"
        self.notes = folder / "notes"
        tools = folder / "tools"
        for name, content in {
            "run.sh": RUN_SH,
            "fake_python": PYTHON,
            "utils/parse_options.sh": PARSE_OPTIONS,
            "path.sh": "export PATH=$PWD/utils:$PATH\nexport LC_ALL=C\n",
            "cmd.sh": "export train_cmd=run.pl cuda_cmd=cuda.pl decode_cmd=run.pl\n",
            "utils/run.pl": RUN_PL,
            "utils/cuda.pl": RUN_PL,
            "conf/decode.yaml": "beam_size: 2\n",
            "dump/raw/lm_train.txt": "t1 one two\n",
            "dump/raw/test_a/text": "u1 one two\n",
            "dump/raw/test_a/wav.scp": "u1 u1.wav\n",
            "dump/raw/test_b/text": "u1 three four\nu2 five\n",
            "dump/raw/test_b/wav.scp": "u1 u1.wav\nu2 u2.wav\n",
            "exp/asr/config.yaml": "asr\n",
            "exp/asr/valid.acc.ave.pth": "asr\n",
            "exp/asr/decode_old/test_a/text": "u1 mine\n",
        }.items():
            self.write(self.path / name, content)
        self.write(tools / "note", NOTE)
        self.write(tools / "compare.py", COMPARE)
        root = Path(__file__).resolve().parents[2]
        self.env = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(root),
            "NOTES": str(self.notes),
            "REAL_PYTHON": sys.executable,
            "COMPARE": str(tools / "compare.py"),
        }

    def make_lm(self, folder: str, config: str = "lm: seq_rnn\n") -> None:
        """A trained LM of the recipe."""
        self.write(self.path / folder / "config.yaml", config)
        self.write(self.path / folder / "valid.loss.ave.pth", "fp\n")

    def run_mpq(self, *options: str, ok: bool = True) -> str:
        """Run mpq.sh with the usual options and more, which must go well or not; its output."""
        usual = ["--python", "./fake_python", "--lm_exp", "exp/lm", "--asr_exp", "exp/asr"]
        usual += ["--test_sets", "test_a test_b", "--ngpu", "0", "--nj", "2"]
        done = subprocess.run(
            ["./mpq.sh", *usual, *options],
            cwd=self.path,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert (done.returncode == 0) == ok, done.stdout
        return done.stdout

    @staticmethod
    def write(path: Path, content: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        if content.startswith("#!"):
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def take_notes(self) -> list:
        """Commands noted since the last call, each a list of arguments (who, what...)."""
        if not self.notes.exists():
            return []
        commands = [line.split("\x1f") for line in self.notes.read_text().split("\n")[:-1]]
        self.notes.unlink()
        return commands

    def snapshot(self) -> dict:
        """Content of every file."""
        return {p: p.read_bytes() for p in sorted(self.path.rglob("*")) if p.is_file()}
