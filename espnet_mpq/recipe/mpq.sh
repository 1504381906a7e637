#!/usr/bin/env bash
# Makes the language model of a recipe that has already been run low-bit, and tests it.
#
# It stands beside the recipe's run.sh, drives that script with options (an option given
# again wins) and edits nothing: new files go to ${expdir}/mpq_<tag>/ and, for decoding, to
# ${asr_exp}/mpq_<tag>_*/. Finished stages are not repeated; a killed one continues.
# This file holds the options; the stages are those of the installed espnet_mpq.
# shellcheck disable=SC1090,SC1091,SC2034,SC2086,SC2154
set -euo pipefail
interface=1          # with the stages of the installed package

# General
stage=1              # First stage to run.
stop_stage=9         # Last stage to run.
run="./run.sh"       # The recipe's own script, with the options you always give it.
python=python3       # Python of the host, with espnet_mpq installed.
ngpu=1               # GPUs for LM training and perplexity, 0: CPU.
nj=4                 # Parallel jobs of the sensitivity stage.
expdir=exp           # Where the results go.
tag=                 # Name of this run (default: LM, budget, sensitivity if not kl).
force=false          # true: repeat the selected stages although they are finished.
config=              # Options from a file, shell lines name=value; the command line wins.

# Language model
lm_exp=                          # Trained LM of the recipe, e.g. exp/lm_train_lm_en_bpe5000.
train_lm=false                   # true: if there is no LM in lm_exp yet, the recipe trains one there.
inference_lm=valid.loss.ave.pth  # Its checkpoint.
lm_type=                         # rnn or transformer: what the LM must be (default: what it is).
lm_train_text=                   # Training text, an id before each line (default: as the LM was trained).
lm_dev_text=                     # Development text, likewise (default: as the LM was trained).
lm_test_text=                    # Text for perplexity (default: that of the first test set).

# Quantization
budget=2.0           # Effective bits a weight, every stored byte counted.
sensitivity=kl       # Harm of low bits: kl, hessian (also kl_printed, fisher), nas; uniform: --bits for all.
bits=                # Choices for a cluster, e.g. "1 2 4 8" (default: all four; uniform: 2).
grid=                # Grid (default: that of mpq).
tying=               # Scale tying (default: that of mpq).
group_size=          # Columns that share a scale, for --tying group.
max_tokens=10000     # Tokens of training text for the sensitivity.
nas_config=          # YAML with options of mpq nas (default: its own).
seed=0               # Of the sensitivity's sample and of the bootstrap.
train_config=        # YAML with host options for ADMM training (epochs, optimizer, batches...).
lm_args=             # More options for ADMM training on the command line.
quantized_lm=valid.loss.best.pth # Checkpoint of ADMM training that is packed.
no_train=false       # true: pack the fp LM with the plan, without ADMM training: minutes, not hours.

# Decoding and scoring
asr_exp=             # Trained ASR model of the recipe, e.g. exp/asr_train_asr_raw_en_bpe5000.
test_sets=           # Test sets below ${data_feats}.
data_feats=dump/raw  # Where the recipe's stages 3-4 put the data.
ref_text=text        # Reference file in a test set.
inference_asr_model= # ASR checkpoint (default: the recipe's).
inference_config=    # Decoding configuration (default: the recipe's).
inference_args=      # More decoding options (default: the recipe's).
inference_nj=        # Parallel decoding jobs (default: the recipe's).
fp_inference_tag=    # Use this finished decoding with the fp LM instead of a new one.
score_unit=word      # word or char.

# The help is made of the lines above: one option each, with its default.
help_message=$(
    echo "Usage: $0 --lm_exp exp/lm_... --asr_exp exp/asr_... --test_sets '...' [options]"
    echo "Example: $0 --run './run.sh --ngpu 4' --lm_exp exp/lm_train_lm_rnn_en_bpe5000" \
        "--asr_exp exp/asr_train_asr_raw_en_bpe5000 --budget 2.0 --test_sets 'test_clean test_other'"
    echo "Stages: 1 check, fp LM  2 sensitivity or NAS  3 plan  4 ADMM training  5 pack"
    echo "        6 perplexity  7 decoding  8 scoring  9 report"
    echo "Options:"
    sed -n '/^# General/,$ s/^\([a-z_]*\)=\([^#]*[^# ]\)\{0,1\} *# \(.*\)$/    --\1 (\2) \3/p' "$0"
)

for needed in path.sh cmd.sh; do
    [ -f "${needed}" ] || {
        echo "$0: error: no ${needed} here: start this in a recipe folder (egs2/<corpus>/asr1)" >&2
        exit 1
    }
done
. ./path.sh
# Where the rest is, only a Python with the package knows; all options are read there.
word=
for next in "$@"; do
    case "${word}" in
        --python) python=${next} ;;
        --config) if [ -f "${next}" ]; then . "$(realpath "${next}")"; fi ;;
    esac
    case "${next}" in --python=*) python=${next#*=} ;; esac
    word=${next}
done
package=$(${python} -c "import espnet_mpq; print(espnet_mpq.__path__[0])") || {
    echo "$0: error: '${python}' cannot import espnet_mpq: pip install espnet_mpq there, or give --python" >&2
    exit 1
}
. "${package}/recipe/parse_options.sh"
. ./cmd.sh
. "${package}/recipe/stages.sh"
. "${package}/recipe/mpq_stages.sh"
. "${package}/recipe/mpq_scores.sh"
stages="${lm_stage_names} decode score report"
run_stages
log "Successfully finished. [elapsed=${SECONDS}s]"
