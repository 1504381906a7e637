#!/usr/bin/env bash
# From AN4 speech to a packed low-bit language model inside ESPnet's own beam search, stage by stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
script=${PWD}/${0##*/}

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
lm_type=rnn        # rnn or transformer
sensitivity=kl     # harm of low bits: kl, hessian (also kl_printed, fisher), nas; uniform: the uniform LM only
token_type=char    # char or bpe
nbpe=100           # sentencepiece units for token_type bpe
asr_config=        # default conf/train_asr.yaml (mini: conf/mini/train_asr.yaml), and so on
lm_config=         # default conf/train_lm.yaml, of a Transformer conf/train_lm_transformer.yaml
mpq_config=
nas_config=
decode_config=
inference_asr=valid.cer_ctc.ave.pth # ASR checkpoint for decoding
budget=            # effective bits of the mixed precision LM, every stored byte counted; default 2.0 (mini: 4.0)
uniform_bits=2     # bits of every cluster of the uniform LM
sensitivity_tokens=10000 # tokens of training text that the sensitivity is measured on
hessian_tokens=2000 # likewise, for the traces of hessian and fisher
lm_weights=        # LM scales tried on the dev set with the fp LM

help_message=$(cat <<EOF
Usage: $0 [--stage 1] [--stop_stage 13] [options]
Stages: 1 data, 2 token list, 3 host statistics, 4 ASR training, 5 fp LM training, 6 sensitivity, 7 plans,
        8 ADMM training, 9 packing, 10 perplexity, 11 decoding, 12 scoring with significance, 13 RESULTS.md
A stage whose options and input files have not changed since it finished is skipped; naming one stage alone
(--stage N --stop_stage N) runs it again. A killed run goes on from the host's last checkpoint.
Options and their defaults:
$(sed -n '/^# General/,/^help_message/p' "${script}" | grep -E '^[a-z_]+=' | grep -v help_message \
    | sed -E 's/^([a-z_]+)=([^ ]*) */  --\1 (\2) /')
Example: $0 --data_root /data --nj 2
EOF
)
root=${MPQ_ROOT:-${PWD}/../../..} # of the checkout; for a copy of this folder elsewhere
export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}"
. "${root}/espnet_mpq/recipe/parse_options.sh"
. "${root}/espnet_mpq/recipe/stages.sh"
check_choice --sensitivity "${sensitivity}" kl hessian nas uniform kl_printed fisher
check_choice --token_type "${token_type}" char bpe

token_tag=${token_type}; [ "${token_type}" = char ] || token_tag=${token_type}${nbpe}
if ${mini}; then
    profile=mini_an4; conf=conf/mini; data=data/mini; exp=exp/mini${tag}_${token_tag}; downloads=downloads/mini; dev_utts=1
    : "${lm_weights:=0.3}" "${budget:=4.0}"  # of a tiny LM the file's header is a large part
else
    profile=an4; conf=conf; data=data; exp=exp/full${tag}_${token_tag}; downloads=downloads; dev_utts=100
    : "${lm_weights:=0.1 0.2 0.3 0.4 0.5 0.6}" "${budget:=2.0}"
fi
lm_suffix=; [ "${lm_type}" = rnn ] || lm_suffix=_${lm_type}
: "${asr_config:=${conf}/train_asr.yaml}" "${lm_config:=${conf}/train_lm${lm_suffix}.yaml}"
: "${mpq_config:=${conf}/train_lm_mpq.yaml}" "${decode_config:=${conf}/decode.yaml}"
: "${nas_config:=${conf}/nas.yaml}"
methods=uniform; [ "${sensitivity}" = uniform ] || methods="uniform ${sensitivity}"
token_dir=${data}/token_list/${token_tag}
asr_exp=${exp}/asr
lm_stats=${exp}/lm_stats
lm_dir=${exp}/${lm_type}
marks=${exp}/.stages
# what runs with other tags, token lists and LMs share is marked beside it
marks_data=${data}/.stages marks_token_list=${token_dir}.stages

train_text=${data}/train/text
dev_text=${data}/dev/text
tokens=${token_dir}/tokens.txt
test_texts=test=${data}/test/text
check_options
. "${root}/espnet_mpq/recipe/lm_stages.sh"
stages="data token_list stats asr ${lm_stage_names} decode score report"

asr_data=(
    "${token_options[@]}"
    --train_data_path_and_name_and_type "${data}/train/wav.scp,speech,sound"
    --train_data_path_and_name_and_type "${train_text},text,text"
    --valid_data_path_and_name_and_type "${data}/dev/wav.scp,speech,sound"
    --valid_data_path_and_name_and_type "${dev_text},text,text"
)
asr_shapes=(
    --train_shape_file "${asr_exp}_stats/train/speech_shape" --train_shape_file "${asr_exp}_stats/train/text_shape"
    --valid_shape_file "${asr_exp}_stats/valid/speech_shape" --valid_shape_file "${asr_exp}_stats/valid/text_shape"
)

title_data="data preparation (${profile})"
options_data() { echo "${profile} ${dev_utts}"; }
inputs_data() { echo local/prepare_data.py; }
outputs_data() { echo "${data}/train ${data}/dev ${data}/test"; }
stage_data() {
    ${python} local/prepare_data.py --corpus "${profile}" --data_root "${data_root}" \
        --downloads "${downloads}" --data "${data}" --dev_utts "${dev_utts}"
}

title_stats="statistics of the host"
inputs_stats() {
    echo "${asr_config} ${train_text} ${dev_text} ${data}/train/wav.scp ${data}/dev/wav.scp ${tokens}"
}
outputs_stats() { echo "${asr_exp}_stats ${lm_stats}"; }
stage_stats() {
    collect_lm_stats "${conf}/train_lm.yaml"
    job "${asr_exp}_stats/stats.log" espnet2.bin.asr_train --collect_stats true --config "${asr_config}" \
        "${asr_data[@]}" --train_shape_file "${data}/train/wav.scp" --valid_shape_file "${data}/dev/wav.scp" \
        --output_dir "${asr_exp}_stats"
}

title_asr="ASR training (log: ${asr_exp}/train.log)"
threads_asr=${threads}
inputs_asr() { echo "${asr_config} ${data}/train/wav.scp ${train_text} ${dev_text} ${tokens} ${asr_exp}_stats/train/speech_shape"; }
outputs_asr() { echo "${asr_exp}"; }
stage_asr() {
    job "${asr_exp}/train.log" espnet2.bin.asr_train --config "${asr_config}" "${asr_data[@]}" "${asr_shapes[@]}" \
        --ngpu "${ngpu}" --resume true --output_dir "${asr_exp}"
}

# Stages 2 and 5 to 10 are those of lm_stages.sh. From here on everything belongs to one sensitivity.
lms=$(for lm in fp ${methods}; do lm_names "${lm}"; done)
decode_dir=${lm_dir}/decode_${sensitivity}
marks_decode=${lm_marks} marks_score=${lm_marks} marks_report=${lm_marks}
units_decode=${sensitivity} units_score=${sensitivity} units_report=${sensitivity}
hyp() { echo "${decode_dir}/test_${1//\//_}"; } # folder of a decoded test set
lm_inputs() { local lm; for lm in ${lms}; do lm_weights_of "${lm}"; done; }
decode() { # decode SET OUTPUT [LM LM_SCALE]
    local lm_opts=()
    [ -z "${3:-}" ] || lm_opts=(--lm_train_config "${lm_dir}/$3/config.yaml" --lm_file "$(lm_weights_of "$3")" --lm_weight "$4")
    job "$2/decode.log" espnet2.bin.asr_inference --config "${decode_config}" --ngpu "${ngpu}" \
        --data_path_and_name_and_type "${data}/$1/wav.scp,speech,sound" \
        --asr_train_config "${asr_exp}/config.yaml" --asr_model_file "${asr_exp}/${inference_asr}" \
        "${lm_opts[@]}" --output_dir "$2"
}

title_decode="decoding: LM scale tuned on dev with the fp LM, then every system on test"
options_decode() { echo "${lm_weights}"; }
inputs_decode() { lm_inputs; echo "${asr_exp}/${inference_asr} ${decode_config} ${data}/dev/wav.scp ${data}/test/wav.scp"; }
outputs_decode() { echo "${decode_dir}"; }
stage_decode() {
    local scale lm
    for scale in ${lm_weights}; do decode dev "${decode_dir}/dev_fp_${scale}" fp "${scale}"; done
    decode test "$(hyp no_lm)"
    run_jobs 1
    scale=$(${python} utils/best_scale.py --ref "${dev_text}" --decode_dir "${decode_dir}" ${lm_weights})
    echo "${scale}" > "${decode_dir}/lm_scale"
    for lm in ${lms}; do decode test "$(hyp "${lm}")" "${lm}" "${scale}"; done
}

others=$(for lm in no_lm ${lms}; do [ "${lm}" = fp ] || echo "${lm}"; done)
comparison() { echo "${decode_dir}/fp_against_${1//\//_}.json"; }
title_score=scoring
inputs_score() { local lm; echo "${data}/test/text"; for lm in no_lm ${lms}; do echo "$(hyp "${lm}")/1best_recog/text"; done; }
outputs_score() { local lm; for lm in ${others}; do comparison "${lm}"; done; }
stage_score() {
    local lm json
    for lm in ${others}; do
        json=$(comparison "${lm}")
        job "${json%.json}.log" espnet_mpq.bin.mpq compare --ref "${data}/test/text" \
            --hyp_a "$(hyp fp)/1best_recog/text" --hyp_b "$(hyp "${lm}")/1best_recog/text" \
            --text_format kaldi --names fp "${lm//\//_}" --json "${json}"
    done
}

results=${lm_dir}/RESULTS_${sensitivity}.md
title_report="report (${results})"
options_report() { echo "${profile}"; }
inputs_report() {
    local unit
    echo utils/results.py
    outputs_score
    echo "${decode_dir}/lm_scale"
    for unit in ${units_perplexity}; do outputs_perplexity "${unit}"; done
}
outputs_report() { echo "${results}"; }
stage_report() {
    ${python} utils/results.py --exp "${exp}" --lm_type "${lm_type}" --sensitivity "${sensitivity}" \
        --stages "${stages}" --command "./run.sh --lm_type ${lm_type} --sensitivity ${sensitivity}" \
        --corpus "${profile}" --output "${results}"
    # the recipe's own table is that of the default run
    [ "${mini} ${tag} ${token_tag} ${lm_type} ${sensitivity}" != "false  char rnn kl" ] || cp "${results}" RESULTS.md
}

run_stages
