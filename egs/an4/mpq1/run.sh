#!/usr/bin/env bash
# From AN4 speech to a packed low-bit language model inside ESPnet's own beam search, stage by stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# General
stage=1
stop_stage=13
ngpu=0             # GPUs for training and decoding
nj=2               # jobs at a time
threads=1          # threads of the ASR and fp LM training; more pays only where nothing else runs
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
inference_asr=valid.cer_ctc.ave.pth # ASR checkpoint for decoding
budget=            # effective bits of the mixed precision LM, every stored byte counted; default 2.0 (mini: 4.0)
uniform_bits=2     # bits of every cluster of the uniform LM
sensitivity_tokens=10000 # tokens of training text that the sensitivity is measured on
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
    profile=mini_an4; conf=conf/mini; data=data/mini; exp=exp/mini${tag}; downloads=downloads/mini; dev_utts=1
    : "${lm_weights:=0.3}" "${budget:=4.0}"  # of a tiny LM the file's header is a large part
else
    profile=an4; conf=conf; data=data; exp=exp/full${tag}; downloads=downloads; dev_utts=100
    : "${lm_weights:=0.1 0.2 0.3 0.4 0.5 0.6}" "${budget:=2.0}"
fi
: "${asr_config:=${conf}/train_asr.yaml}" "${lm_config:=${conf}/train_lm.yaml}"
: "${mpq_config:=${conf}/train_lm_mpq.yaml}" "${decode_config:=${conf}/decode.yaml}"
[[ "${stage} ${stop_stage}" =~ ^[0-9]+\ [0-9]+$ ]] || { echo "$0: --stage and --stop_stage are numbers" >&2; exit 2; }
[ "${stop_stage}" -le 13 ] || stop_stage=13
token_tag=${token_type}; [ "${token_type}" = char ] || token_tag=${token_type}${nbpe}
token_dir=${data}/token_list/${token_tag}
asr_exp=${exp}/asr_${token_tag}
lm_exp=${exp}/lm_fp_${token_tag}
mpq_dir=${exp}/mpq_${token_tag}
marks=${exp}/.stages
lm_file=valid.loss.best.pth
mpq_ngpu=$((ngpu > 0))
export PYTHONPATH="${PWD}/../../..${PYTHONPATH:+:${PYTHONPATH}}"

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
    run_jobs "${threads}"
}

name_5="fp LM training (log: ${lm_exp}/train.log)"
options_5="${token_tag}"
inputs_5="${lm_config} ${text_files} ${token_dir}/tokens.txt ${lm_exp}_stats/train/text_shape"
outputs_5="${lm_exp}"
stage_5() {
    job "${lm_exp}/train.log" espnet2.bin.lm_train --config "${lm_config}" "${lm_data[@]}" "${lm_shapes[@]}" \
        --ngpu "${ngpu}" --resume true --output_dir "${lm_exp}"
    run_jobs "${threads}"
}

name_6="sensitivity of every cluster at 1, 2, 4 and 8 bits"
options_6="${sensitivity_tokens}"
inputs_6="${lm_exp}/${lm_file} ${data}/train/text"
outputs_6="${mpq_dir}/sensitivity.json ${mpq_dir}/sensitivity.log"
stage_6() {
    job "${mpq_dir}/sensitivity.log" espnet_mpq.bin.mpq sensitivity --lm_exp "${lm_exp}" --lm_file "${lm_file}" \
        --ngpu "${mpq_ngpu}" --text "${data}/train/text" --text_format kaldi \
        --max_tokens "${sensitivity_tokens}" --output "${mpq_dir}/sensitivity.json"
    run_jobs "${threads}"
}

name_7="plans: uniform ${uniform_bits} bit, mixed with ${budget} effective bits"
options_7="${budget} ${uniform_bits}"
inputs_7="${mpq_dir}/sensitivity.json ${lm_exp}/${lm_file} ${mpq_config} ${data}/train/text"
outputs_7="${mpq_dir}/uniform ${mpq_dir}/mixed ${mpq_dir}/plan_uniform.log ${mpq_dir}/plan_mixed.log"
stage_7() {
    local plan
    for plan in uniform mixed; do
        local how=(--uniform "${uniform_bits}" --text "${data}/train/text" --text_format kaldi --max_tokens "${sensitivity_tokens}")
        [ "${plan}" = uniform ] || how=(--sensitivity "${mpq_dir}/sensitivity.json" --budget "${budget}")
        job "${mpq_dir}/plan_${plan}.log" espnet_mpq.bin.mpq plan --lm_exp "${lm_exp}" --lm_file "${lm_file}" \
            "${how[@]}" --train_config "${mpq_config}" --ngpu "${mpq_ngpu}" --output_dir "${mpq_dir}/${plan}"
    done
    run_jobs 1
    cat "${mpq_dir}/plan_mixed.log"
}

name_8="ADMM training of both plans (logs: ${exp}/lm_{uniform,mixed}_${token_tag}/train.log)"
options_8="${token_tag}"
inputs_8="${mpq_dir}/uniform/train_lm_mpq.yaml ${mpq_dir}/mixed/train_lm_mpq.yaml ${lm_exp}/${lm_file} ${text_files}"
outputs_8="${exp}/lm_uniform_${token_tag} ${exp}/lm_mixed_${token_tag}"
stage_8() {
    local plan out
    for plan in uniform mixed; do
        out=${exp}/lm_${plan}_${token_tag}
        job "${out}/train.log" espnet2.bin.lm_train --config "${mpq_dir}/${plan}/train_lm_mpq.yaml" \
            "${lm_data[@]}" "${lm_shapes[@]}" --init_param "${lm_exp}/${lm_file}" \
            --ngpu "${ngpu}" --resume true --output_dir "${out}"
    done
    run_jobs 1
}

name_9="packing"
options_9=
inputs_9="${exp}/lm_uniform_${token_tag}/${lm_file} ${exp}/lm_mixed_${token_tag}/${lm_file}"
outputs_9="${exp}/lm_uniform_packed_${token_tag} ${exp}/lm_mixed_packed_${token_tag}"
stage_9() {
    local plan
    for plan in uniform mixed; do
        job "${mpq_dir}/pack_${plan}.log" espnet_mpq.bin.mpq pack --lm_exp "${exp}/lm_${plan}_${token_tag}" \
            --lm_file "${lm_file}" --fp_exp "${lm_exp}" --output_dir "${exp}/lm_${plan}_packed_${token_tag}"
    done
    run_jobs 1
}

# every LM that is measured: name, folder, weight file
lms="fp uniform mixed uniform_packed mixed_packed"
lm_folder() { echo "${exp}/lm_$1_${token_tag}"; }
lm_weights_of() { case $1 in *_packed) echo "$(lm_folder "$1")/packed.safetensors" ;; *) echo "$(lm_folder "$1")/${lm_file}" ;; esac; }
lm_inputs=$(for lm in ${lms}; do lm_weights_of "${lm}"; done)

name_10="perplexity of the test set"
options_10=
inputs_10="${lm_inputs} ${data}/test/text"
outputs_10=$(for lm in ${lms}; do echo "$(lm_folder "${lm}")/perplexity_test"; done)
stage_10() {
    local lm out
    for lm in ${lms}; do
        out=$(lm_folder "${lm}")/perplexity_test
        job "${out}/ppl.log" espnet2.bin.lm_calc_perplexity --ngpu "${ngpu}" \
            --data_path_and_name_and_type "${data}/test/text,text,text" \
            --train_config "$(lm_folder "${lm}")/config.yaml" --model_file "$(lm_weights_of "${lm}")" --output_dir "${out}"
    done
    run_jobs 1
    for lm in ${lms}; do echo "${lm} $(cat "$(lm_folder "${lm}")/perplexity_test/ppl")"; done
}

decode_dir=${exp}/decode_${token_tag}
decode() { # decode SET OUTPUT [LM LM_SCALE]
    local lm_opts=()
    [ -z "${3:-}" ] || lm_opts=(--lm_train_config "$(lm_folder "$3")/config.yaml" --lm_file "$(lm_weights_of "$3")" --lm_weight "$4")
    job "${decode_dir}/$2/decode.log" espnet2.bin.asr_inference --config "${decode_config}" --ngpu "${ngpu}" \
        --data_path_and_name_and_type "${data}/$1/wav.scp,speech,sound" \
        --asr_train_config "${asr_exp}/config.yaml" --asr_model_file "${asr_exp}/${inference_asr}" \
        "${lm_opts[@]}" --output_dir "${decode_dir}/$2"
}

name_11="decoding: LM scale tuned on dev with the fp LM, then every system on test"
options_11="${lm_weights}"
inputs_11="${lm_inputs} ${asr_exp}/${inference_asr} ${decode_config} ${data}/dev/wav.scp ${data}/test/wav.scp"
outputs_11="${decode_dir}"
stage_11() {
    local scale lm
    for scale in ${lm_weights}; do decode dev "dev_fp_${scale}" fp "${scale}"; done
    decode test test_no_lm
    run_jobs 1
    : > "${jobs_file}"
    scale=$(${python} utils/best_scale.py --ref "${data}/dev/text" --decode_dir "${decode_dir}" ${lm_weights})
    echo "${scale}" > "${decode_dir}/lm_scale"
    for lm in ${lms}; do decode test "test_${lm}" "${lm}" "${scale}"; done
    run_jobs 1
}

name_12="scoring"
options_12=
inputs_12="${data}/test/text $(for lm in no_lm ${lms}; do echo "${decode_dir}/test_${lm}/1best_recog/text"; done)"
outputs_12=$(for lm in no_lm ${lms#fp}; do echo "${decode_dir}/fp_against_${lm}.json"; done)
stage_12() {
    local lm
    for lm in no_lm ${lms#fp}; do
        job "${decode_dir}/fp_against_${lm}.log" espnet_mpq.bin.mpq compare --ref "${data}/test/text" \
            --hyp_a "${decode_dir}/test_fp/1best_recog/text" --hyp_b "${decode_dir}/test_${lm}/1best_recog/text" \
            --names fp "${lm}" --json "${decode_dir}/fp_against_${lm}.json"
    done
    run_jobs 1
}

results=${exp}/RESULTS.md
name_13="report (${results})"
options_13="${profile}"
inputs_13="utils/results.py ${outputs_12} ${decode_dir}/lm_scale $(for out in ${outputs_10}; do echo "${out}/ppl"; done)"
outputs_13="${results}"
stage_13() {
    ${python} utils/results.py --exp "${exp}" --token_tag "${token_tag}" --corpus "${profile}" --output "${results}"
    ${mini} || [ -n "${tag}" ] || cp "${results}" RESULTS.md
}

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
