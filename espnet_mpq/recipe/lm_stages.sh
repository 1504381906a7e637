# The LM stages of a recipe: token_list, fp_lm, sensitivity, plan, admm, pack, perplexity. To be sourced after stages.sh.
#
# The recipe sets lm_type, lm_dir (folder of the results of this LM type), methods (how the sensitivity is
# measured: kl, hessian, nas...; uniform: the same bits for all; float: 32 bits for all, the control that
# trains like the others), token_type, token_dir and tokens (a file in it), nbpe, lm_config, mpq_config, lm_stats
# (folder of the host's statistics), train_text, dev_text, test_texts (SET=FILE...), budget, uniform_bits,
# sensitivity_tokens, hessian_tokens, nas_config (options of mpq nas), ngpu and threads. Everything of a method
# is in ${lm_dir}/METHOD: sensitivity.json, plan/, lm/ (quantized), packed/.
# shellcheck shell=bash disable=SC2034,SC2154

lm_file=valid.loss.best.pth
fp_exp=${lm_dir}/fp
mpq_ngpu=$((ngpu > 0))
lm_marks=${lm_dir}/.stages
for _name in fp_lm sensitivity plan admm pack perplexity; do printf -v "marks_${_name}" '%s' "${lm_marks}"; done
lm_stage_names="fp_lm sensitivity plan admm pack perplexity"

# Options of the host's training: how to make tokens, the texts, their lengths.
token_options=(--use_preprocessor true --token_type "${token_type}" --token_list "${tokens}")
[ "${token_type}" != bpe ] || token_options+=(--bpemodel "${token_dir}/bpe.model")
lm_data=(
    "${token_options[@]}"
    --train_data_path_and_name_and_type "${train_text},text,text"
    --valid_data_path_and_name_and_type "${dev_text},text,text"
)
lm_shapes=(
    --train_shape_file "${lm_stats}/train/text_shape"
    --valid_shape_file "${lm_stats}/valid/text_shape"
)

title_token_list="token list (${token_dir})"
inputs_token_list() { echo "${train_text}"; }
outputs_token_list() { echo "${token_dir}"; }
stage_token_list() {
    ${python} -m espnet_mpq.recipe.token_list --text "${train_text}" --output "${token_dir}" \
        --token_type "${token_type}" --n_units "${nbpe}"
}

collect_lm_stats() { # collect_lm_stats CONFIG: note the job that measures the lengths of texts, the same for every LM
    job "${lm_stats}/stats.log" espnet2.bin.lm_train --collect_stats true --config "$1" "${lm_data[@]}" \
        --train_shape_file "${train_text}" --valid_shape_file "${dev_text}" --output_dir "${lm_stats}"
}

title_fp_lm="training of the fp ${lm_type} LM (log: ${fp_exp}/train.log)"
threads_fp_lm=${threads}
inputs_fp_lm() { echo "${lm_config} ${train_text} ${dev_text} ${tokens} ${lm_stats}/train/text_shape"; }
outputs_fp_lm() { echo "${fp_exp}"; }
stage_fp_lm() {
    job "${fp_exp}/train.log" espnet2.bin.lm_train --config "${lm_config}" "${lm_data[@]}" "${lm_shapes[@]}" \
        --ngpu "${ngpu}" --resume true --output_dir "${fp_exp}"
}

title_sensitivity="sensitivity (${methods})"
threads_sensitivity=${threads}
units_sensitivity=$(for _name in ${methods}; do case ${_name} in uniform | float) ;; *) echo "${_name}" ;; esac; done)
[ -n "${units_sensitivity}" ] || units_sensitivity=uniform
tokens_of() { case $1 in hessian | fisher) echo "${hessian_tokens}" ;; *) echo "${sensitivity_tokens}" ;; esac; }
options_sensitivity() { tokens_of "$1"; [ "$1" != nas ] || echo "${budget}"; }
inputs_sensitivity() { echo "${fp_exp}/${lm_file} ${train_text}"; [ "$1" != nas ] || echo "${nas_config}"; }
outputs_sensitivity() {
    case $1 in
        uniform) ;;
        nas) echo "${lm_dir}/nas/search" ;;
        *) echo "${lm_dir}/$1/sensitivity.json ${lm_dir}/$1/sensitivity.log" ;;
    esac
}
sensitivity_json() { case $1 in nas) echo "${lm_dir}/nas/search/sensitivity.json" ;; *) echo "${lm_dir}/$1/sensitivity.json" ;; esac; }
stage_sensitivity() {
    local common=(--lm_exp "${fp_exp}" --lm_file "${lm_file}" --text "${train_text}" --text_format kaldi)
    case $1 in
        uniform) log "a uniform plan needs no sensitivity" ;;
        nas)
            job "${lm_dir}/nas/search/nas.log" espnet_mpq.bin.mpq nas "${common[@]}" --budget "${budget}" \
                --config "${nas_config}" --ngpu "${ngpu}" --output_dir "${lm_dir}/nas/search"
            ;;
        *)
            [ "$1" = kl ] || common+=(--method "$1")
            job "${lm_dir}/$1/sensitivity.log" espnet_mpq.bin.mpq sensitivity "${common[@]}" \
                --ngpu "${mpq_ngpu}" --max_tokens "$(tokens_of "$1")" --output "$(sensitivity_json "$1")"
            ;;
    esac
}

title_plan="plans (uniform: ${uniform_bits} bit, all others: ${budget} effective bits)"
units_plan=${methods}
plan_options() { # plan_options METHOD: what mpq plan is asked for
    case $1 in
        float) echo "--uniform 32" ;;
        uniform) echo "--uniform ${uniform_bits}" ;;
        *) echo "--budget ${budget} --sensitivity $(sensitivity_json "$1")" ;;
    esac
}
options_plan() { plan_options "$1"; }
inputs_plan() {
    echo "${fp_exp}/${lm_file} ${mpq_config} ${train_text}"
    case $1 in uniform | float) ;; *) sensitivity_json "$1" ;; esac
}
outputs_plan() { echo "${lm_dir}/$1/plan ${lm_dir}/$1/plan.log"; }
stage_plan() {
    # shellcheck disable=SC2046
    job "${lm_dir}/$1/plan.log" espnet_mpq.bin.mpq plan --lm_exp "${fp_exp}" --lm_file "${lm_file}" $(plan_options "$1") \
        --text "${train_text}" --text_format kaldi --max_tokens "${sensitivity_tokens}" \
        --train_config "${mpq_config}" --ngpu "${mpq_ngpu}" --output_dir "${lm_dir}/$1/plan"
}
after_plan() { local method; for method in ${methods}; do echo "${method}:"; grep -v '^next:' "${lm_dir}/${method}/plan.log"; done; }

title_admm="ADMM training from the fp LM (logs: ${lm_dir}/*/lm/train.log)"
units_admm=${methods}
inputs_admm() { echo "${lm_dir}/$1/plan/train_lm_mpq.yaml ${fp_exp}/${lm_file} ${train_text} ${dev_text}"; }
outputs_admm() { echo "${lm_dir}/$1/lm"; }
stage_admm() {
    job "${lm_dir}/$1/lm/train.log" espnet2.bin.lm_train --config "${lm_dir}/$1/plan/train_lm_mpq.yaml" \
        "${lm_data[@]}" "${lm_shapes[@]}" --init_param "${fp_exp}/${lm_file}" \
        --ngpu "${ngpu}" --resume true --output_dir "${lm_dir}/$1/lm"
}

title_pack=packing
units_pack=$(for _name in ${methods}; do [ "${_name}" = float ] || echo "${_name}"; done)
inputs_pack() { echo "${lm_dir}/$1/lm/${lm_file}"; }
outputs_pack() { echo "${lm_dir}/$1/packed ${lm_dir}/$1/pack.log"; }
stage_pack() {
    job "${lm_dir}/$1/pack.log" espnet_mpq.bin.mpq pack --lm_exp "${lm_dir}/$1/lm" --lm_file "${lm_file}" \
        --fp_exp "${fp_exp}" --output_dir "${lm_dir}/$1/packed"
}

# Every LM that is measured: the fp LM, and of each method the quantized and the packed one.
lm_names() { case $1 in fp) echo fp ;; float) echo float/lm ;; *) echo "$1/lm $1/packed" ;; esac; }
lm_weights_of() { case $1 in */packed) echo "${lm_dir}/$1/packed.safetensors" ;; *) echo "${lm_dir}/$1/${lm_file}" ;; esac; }

title_perplexity="perplexity (${test_texts})"
units_perplexity="fp ${methods}"
inputs_perplexity() {
    local name set
    for name in $(lm_names "$1"); do lm_weights_of "${name}"; done
    for set in ${test_texts}; do echo "${set#*=}"; done
}
outputs_perplexity() {
    local name set
    for name in $(lm_names "$1"); do for set in ${test_texts}; do echo "${lm_dir}/${name}/perplexity_${set%%=*}.json"; done; done
}
stage_perplexity() {
    local name set out
    for name in $(lm_names "$1"); do
        for set in ${test_texts}; do
            out=${lm_dir}/${name}/perplexity_${set%%=*}
            job "${out}.log" espnet_mpq.bin.mpq perplexity "${lm_dir}/${name}" --lm_file "$(basename "$(lm_weights_of "${name}")")" \
                --text "${set#*=}" --text_format kaldi --json "${out}.json"
        done
    done
}
