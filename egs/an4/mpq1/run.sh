#!/usr/bin/env bash
# From AN4 speech to a packed low-bit language model inside ESPnet's own beam search, stage by stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# General
stage=1
stop_stage=13
ngpu=0             # GPUs for training and decoding
nj=2               # jobs at a time, and threads of the ASR training
python=python3     # a python that has the plugin and the host
mini=false         # tiny models on mini_an4: proves that every stage works, says nothing about accuracy
data_root="${MPQ_DATA_ROOT:-}" # folder with an4/ and mini_an4/; empty: download
tag=               # suffix of the experiment folder

# Models
token_type=char    # char or bpe
nbpe=100           # sentencepiece units for token_type bpe
asr_config=        # default conf/train_asr.yaml (mini: conf/mini/train_asr.yaml), and so on
lm_config=
mpq_config=
decode_config=
inference_asr=     # ASR checkpoint for decoding; default valid.loss.ave.pth
budget=2.0         # effective bits of the mixed precision LM, every stored byte counted
uniform_bits=2     # bits of every cluster of the uniform LM
lm_weights=        # LM scales tried on the dev set with the fp LM

help_message=$(cat <<EOF
Usage: $0 [--stage 1] [--stop_stage 13] [options]
Stages: 1 data, 2 token list, 3 host statistics, 4 ASR training, 5 fp LM training, 6 sensitivity, 7 plans,
        8 ADMM training, 9 packing, 10 perplexity, 11 decoding, 12 scoring with significance, 13 RESULTS.md
A stage whose options and input files have not changed since it finished is skipped; naming one stage alone
(--stage N --stop_stage N) runs it again. A killed run goes on from the host's last checkpoint.
Options and their defaults:
$(sed -n '/^# General/,/^help_message/p' "${BASH_SOURCE[0]}" | grep -E '^[a-z_]+=' | grep -v help_message \
    | sed -E 's/^([a-z_]+)=([^ ]*) */  --\1 (\2) /')
Example: $0 --data_root /data --nj 2
EOF
)
. utils/parse_options.sh

if ${mini}; then
    profile=mini_an4; conf=conf/mini; data=data_mini; exp=exp_mini${tag}; downloads=downloads_mini; dev_utts=1
    : "${lm_weights:=0.3}"
else
    profile=an4; conf=conf; data=data; exp=exp${tag}; downloads=downloads; dev_utts=100
    : "${lm_weights:=0.1 0.2 0.3 0.4 0.5 0.6}"
fi
: "${asr_config:=${conf}/train_asr.yaml}" "${lm_config:=${conf}/train_lm.yaml}"
: "${mpq_config:=${conf}/train_lm_mpq.yaml}" "${decode_config:=${conf}/decode.yaml}"
: "${inference_asr:=valid.loss.ave.pth}"
token_tag=${token_type}; [ "${token_type}" = char ] || token_tag=${token_type}${nbpe}
token_dir=${data}/token_list/${token_tag}
asr_exp=${exp}/asr_${token_tag}
lm_exp=${exp}/lm_fp_${token_tag}
mpq_dir=${exp}/mpq_${token_tag}
marks=${exp}/.stages
lm_file=valid.loss.best.pth
export PYTHONPATH="${PWD}/../../..${PYTHONPATH:+:${PYTHONPATH}}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${nj}}

log() { echo "$(date '+%H:%M:%S') $*"; }

jobs_file=
job() { # job LOG MODULE ARGUMENTS...: note one command for run_jobs
    local word
    for word in "$@"; do printf '%q ' "${word}"; done >> "${jobs_file}"
    echo >> "${jobs_file}"
}
host_pid=
run_jobs() { # run_jobs THREADS: run the noted commands, ${nj} at a time, in one program that imports the host once
    local status
    if [ -z "${host_pid}" ]; then
        coproc HOST { exec ${python} utils/host_jobs.py; }
        host_pid=${HOST_PID}
    fi
    echo "${nj} $1 ${jobs_file}" >&"${HOST[1]}"
    read -r status <&"${HOST[0]}" || return 1
    return "${status}"
}

lm_data=(
    --use_preprocessor true --token_type "${token_type}" --token_list "${token_dir}/tokens.txt"
    --train_data_path_and_name_and_type "${data}/train/text,text,text"
    --valid_data_path_and_name_and_type "${data}/dev/text,text,text"
)
asr_data=(
    --use_preprocessor true --token_type "${token_type}" --token_list "${token_dir}/tokens.txt"
    --train_data_path_and_name_and_type "${data}/train/wav.scp,speech,sound"
    --train_data_path_and_name_and_type "${data}/train/text,text,text"
    --valid_data_path_and_name_and_type "${data}/dev/wav.scp,speech,sound"
    --valid_data_path_and_name_and_type "${data}/dev/text,text,text"
)
if [ "${token_type}" = bpe ]; then
    lm_data+=(--bpemodel "${token_dir}/bpe.model")
    asr_data+=(--bpemodel "${token_dir}/bpe.model")
fi
lm_shapes=(
    --train_shape_file "${lm_exp}_stats/train/text_shape"
    --valid_shape_file "${lm_exp}_stats/valid/text_shape"
)
asr_shapes=(
    --train_shape_file "${asr_exp}_stats/train/speech_shape" --train_shape_file "${asr_exp}_stats/train/text_shape"
    --valid_shape_file "${asr_exp}_stats/valid/speech_shape" --valid_shape_file "${asr_exp}_stats/valid/text_shape"
)

# For every stage: name, options and input files (their contents decide whether it has to run), outputs, commands.
text_files="${data}/train/text ${data}/dev/text"
plans="uniform mixed"

name_1="data preparation (${profile})"
options_1="${profile} ${dev_utts}"
inputs_1="local/prepare_data.py"
outputs_1="${data}/train ${data}/dev ${data}/test"
stage_1() {
    ${python} local/prepare_data.py --corpus "${profile}" --data_root "${data_root}" \
        --downloads "${downloads}" --data "${data}" --dev_utts "${dev_utts}"
}

name_2="token list (${token_tag})"
options_2="${token_tag}"
inputs_2="local/token_list.py ${data}/train/text"
outputs_2="${token_dir}"
stage_2() {
    ${python} local/token_list.py --text "${data}/train/text" --output "${token_dir}" \
        --token_type "${token_type}" --nbpe "${nbpe}"
}

name_3="statistics of the host"
options_3="${token_tag}"
inputs_3="${asr_config} ${lm_config} ${text_files} ${data}/train/wav.scp ${data}/dev/wav.scp ${token_dir}/tokens.txt"
outputs_3="${asr_exp}_stats ${lm_exp}_stats"
stage_3() {
    job "${lm_exp}_stats/stats.log" espnet2.bin.lm_train --collect_stats true --config "${lm_config}" \
        "${lm_data[@]}" --train_shape_file "${data}/train/text" --valid_shape_file "${data}/dev/text" \
        --output_dir "${lm_exp}_stats"
    job "${asr_exp}_stats/stats.log" espnet2.bin.asr_train --collect_stats true --config "${asr_config}" \
        "${asr_data[@]}" --train_shape_file "${data}/train/wav.scp" --valid_shape_file "${data}/dev/wav.scp" \
        --output_dir "${asr_exp}_stats"
    run_jobs 1
}

name_4="ASR training (log: ${asr_exp}/train.log)"
options_4="${token_tag}"
inputs_4="${asr_config} ${data}/train/wav.scp ${text_files} ${token_dir}/tokens.txt ${asr_exp}_stats/train/speech_shape"
outputs_4="${asr_exp}"
stage_4() {
    job "${asr_exp}/train.log" espnet2.bin.asr_train --config "${asr_config}" "${asr_data[@]}" "${asr_shapes[@]}" \
        --ngpu "${ngpu}" --resume true --output_dir "${asr_exp}"
    run_jobs "${nj}"
}

name_5="fp LM training (log: ${lm_exp}/train.log)"
options_5="${token_tag}"
inputs_5="${lm_config} ${text_files} ${token_dir}/tokens.txt ${lm_exp}_stats/train/text_shape"
outputs_5="${lm_exp}"
stage_5() {
    job "${lm_exp}/train.log" espnet2.bin.lm_train --config "${lm_config}" "${lm_data[@]}" "${lm_shapes[@]}" \
        --ngpu "${ngpu}" --resume true --output_dir "${lm_exp}"
    run_jobs "${nj}"
}

# shellcheck source=/dev/null
[ ! -f stages_mpq.sh ] || . stages_mpq.sh

key_of() { # key_of N: what the stage depends on
    local options=options_$1 inputs=inputs_$1 file
    echo "${!options}"
    for file in ${!inputs}; do
        if [ ! -f "${file}" ]; then
            echo "stage $1 needs ${file}, which does not exist: run the stages before it first" >&2
            return 1
        fi
        sha256sum "${file}"
    done
}

mkdir -p "${marks}"
SECONDS=0
for n in $(seq "${stage}" "${stop_stage}"); do
    name=name_${n} outputs=outputs_${n}
    key_of "${n}" > "${marks}/${n}.new" || exit 1
    forced=false
    [ "${stage}" != "${stop_stage}" ] || forced=true
    complete=true
    for output in ${!outputs}; do [ -e "${output}" ] || complete=false; done
    if ${complete} && ! ${forced} && cmp -s "${marks}/${n}.new" "${marks}/${n}.done"; then
        log "stage ${n}: ${!name}: finished before, skipped"
        continue
    fi
    # a stage that was killed goes on where it stopped; anything else starts afresh
    if ! cmp -s "${marks}/${n}.new" "${marks}/${n}.started"; then
        for output in ${!outputs}; do rm -rf "${output}"; done
    fi
    rm -f "${marks}/${n}.done"
    mv "${marks}/${n}.new" "${marks}/${n}.started"
    log "stage ${n}: ${!name}"
    begin=${SECONDS}
    jobs_file=${marks}/${n}.jobs
    : > "${jobs_file}"
    "stage_${n}"
    mv "${marks}/${n}.started" "${marks}/${n}.done"
    echo "$((SECONDS - begin))" > "${marks}/${n}.seconds"
    log "stage ${n}: done in $((SECONDS - begin)) s"
done
log "finished stages ${stage} to ${stop_stage} in ${SECONDS} s"
