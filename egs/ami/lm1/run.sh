#!/usr/bin/env bash
# The whole LM road on the AMI transcripts: fp LM, sensitivities, plans, ADMM, packing, perplexity, table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
script=${PWD}/${0##*/}

# General
stage=1
stop_stage=10
ngpu=0             # GPUs for training
nj=2               # jobs at a time
threads=1          # threads of the fp LM training
python=python3     # a python that has the plugin and the host
mini=false         # tiny models on 400 sentences: proves that every stage works, says nothing about accuracy
data_root="${MPQ_DATA_ROOT:-}" # folder with ami_lm/; empty: the corpus' annotations
annotations=       # AMI annotations (folder or zip), read with lhotse; empty: download
tag=               # suffix of the experiment folder

# Models
lm_type=rnn        # rnn or transformer
sensitivity="kl hessian nas" # one or more of kl, hessian, nas (also kl_printed, fisher); uniform: the uniform LM only
token_type=bpe     # bpe, char or word
nbpe=1000          # sentencepiece units, or words
lm_config=         # default conf/train_lm.yaml, of a Transformer conf/train_lm_transformer.yaml
mpq_config=        # default conf/train_lm_mpq.yaml (mini: conf/mini/train_lm_mpq.yaml)
nas_config=        # default conf/nas.yaml (mini: conf/mini/nas.yaml)
budget=            # effective bits of the mixed precision LMs, every stored byte counted; default: the size of the uniform LM, 2.21, transformer 2.53
uniform_bits=2     # bits of every cluster of the uniform LM
sensitivity_tokens=10000 # tokens of training text that the sensitivity is measured on
hessian_tokens=2000 # likewise, for the traces of hessian and fisher

help_message=$(cat <<EOF
Usage: $0 [--stage 1] [--stop_stage 10] [options]
Stages: 1 data, 2 token list, 3 host statistics, 4 fp LM training, 5 sensitivities, 6 plans, 7 ADMM training,
        8 packing, 9 perplexity, 10 RESULTS.md
A stage whose options and input files have not changed since it finished is skipped, sensitivity by sensitivity;
naming one stage alone (--stage N --stop_stage N) runs it again. A killed run goes on from the host's last checkpoint.
Options and their defaults:
$(sed -n '/^# General/,/^help_message/p' "${script}" | grep -E '^[a-z_]+=' | grep -v help_message \
    | sed -E 's/^([a-z_]+)=("[^"]*"|[^ ]*) */  --\1 (\2) /')
Example: $0 --lm_type transformer --sensitivity "kl hessian"
EOF
)
root=${MPQ_ROOT:-${PWD}/../../..} # of the checkout; for a copy of this folder elsewhere
export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}"
. "${root}/espnet_mpq/recipe/parse_options.sh"
. "${root}/espnet_mpq/recipe/stages.sh"

if ${mini}; then
    profile=mini; conf=conf/mini; data=data/mini; n_sentences=400
    nbpe=100 sensitivity_tokens=1000 hessian_tokens=500
    : "${budget:=4.0}"  # of a tiny LM the file's header is a large part
else
    profile=full; conf=conf; data=data; n_sentences=0
    # what the uniform 2-bit LM of this size takes, header, scales and biases included: mixed against uniform bits at equal size
    if [ "${lm_type}" = rnn ]; then : "${budget:=2.21}"; else : "${budget:=2.53}"; fi
fi
token_tag=${token_type}; [ "${token_type}" = char ] || token_tag=${token_type}${nbpe}
exp=exp/${profile}${tag}_${token_tag}
lm_suffix=; [ "${lm_type}" = rnn ] || lm_suffix=_${lm_type}
: "${lm_config:=${conf}/train_lm${lm_suffix}.yaml}" "${mpq_config:=${conf}/train_lm_mpq.yaml}" \
    "${nas_config:=${conf}/nas.yaml}"
# float: the fp LM trained on as long as the others, without low bits
methods="float uniform $(for method in ${sensitivity}; do [ "${method}" = uniform ] || echo "${method}"; done | xargs)"
token_dir=${data}/token_list/${token_tag}
lm_stats=${exp}/lm_stats
lm_dir=${exp}/${lm_type}
marks=${exp}/.stages
# what runs with other tags, token lists and LMs share is marked beside it
marks_data=${data}/.stages marks_token_list=${token_dir}.stages

train_text=${data}/train/text
dev_text=${data}/dev/text
tokens=${token_dir}/tokens.txt
test_texts="dev=${data}/dev/text eval=${data}/eval/text"
check_options
. "${root}/espnet_mpq/recipe/lm_stages.sh"
stages="data token_list stats ${lm_stage_names} report"

title_data="text of the AMI transcripts"
options_data() { echo "${n_sentences} ${annotations}"; }
inputs_data() { echo local/prepare_data.py; }
outputs_data() { echo "${data}/train ${data}/dev ${data}/eval"; }
stage_data() {
    ${python} local/prepare_data.py --data_root "${data_root}" --annotations "${annotations}" \
        --downloads downloads --data "${data}" --n_sentences "${n_sentences}"
}

title_stats="statistics of the host"
inputs_stats() { echo "${train_text} ${dev_text} ${tokens}"; }
outputs_stats() { echo "${lm_stats}"; }
stage_stats() {
    collect_lm_stats "${conf}/train_lm.yaml"
}

# Stages 2 and 4 to 9 are those of lm_stages.sh.
results=${exp}/RESULTS.md
title_report="report (${results})"
marks_report=${lm_marks}
inputs_report() {
    local unit
    echo utils/results.py
    for unit in ${units_perplexity}; do outputs_perplexity "${unit}"; done
}
outputs_report() { echo "${results}"; }
stage_report() {
    ${python} utils/results.py --exp "${exp}" --profile "${profile}" --output "${results}"
    [ "${profile}${tag} ${token_tag}" != "full bpe1000" ] || cp "${results}" RESULTS.md
}

run_stages
