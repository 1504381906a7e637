# The LM stages of mpq.sh: fp_lm, sensitivity, plan, admm, pack, perplexity. To be sourced after stages.sh.
#
# mpq.sh sets its options and sources the recipe's path.sh and cmd.sh. The recipe's own script (run_recipe) and jobs
# (on_cpu, on_gpu: by the recipe's cmd.sh) log to ${mpq_exp}/log.
# shellcheck shell=bash disable=SC2034,SC2086,SC2154

[ "${interface:-}" = 1 ] \
    || die "this mpq.sh is not of the installed espnet_mpq (${package}): python3 -m espnet_mpq.setup_recipe . --force"

check_options "cuda_cmd=${cuda_cmd:-}"

mpq_exp="${expdir}/mpq_${tag}"
logdir="${mpq_exp}/log"
marks="${mpq_exp}/marks"
plan_dir="${mpq_exp}/plan"
quantized_exp="${mpq_exp}/lm"
packed_exp="${mpq_exp}/packed"
nas_dir="${mpq_exp}/nas"
sensitivity_json="${mpq_exp}/sensitivity.json"
[ "${sensitivity}" != nas ] || sensitivity_json="${nas_dir}/sensitivity.json"
fp_lm="${lm_exp}/${inference_lm}"
launcher="${python} -m espnet_mpq"
mkdir -p "${logdir}" "${marks}"
printf '%q ' "${command_line[@]}" >> "${logdir}/commands.txt"
echo >> "${logdir}/commands.txt"
lm_stage_names="fp_lm sensitivity plan admm pack perplexity"

# How the weights are stored: the same for sensitivities and plans.
storage=(${grid:+--grid ${grid}} ${tying:+--tying ${tying}} ${group_size:+--group_size ${group_size}})
# Without training the rounding is all there is: measured, planned and packed alike.
rounding=()
! "${no_train}" || rounding=(--rounding second_order)
common=(--lm_exp "${lm_exp}" --lm_file "${inference_lm}")

run_recipe() { # run_recipe LOG OPTIONS...: the recipe's own script with the plugin registered
    local log="${logdir}/$1.log"
    shift
    ${run} "$@" --python "${launcher}" --use_lm true 2>&1 | tee "${log}" || die "'${run}' failed; look at ${log}"
}
on_gpu() { # on_gpu LOG MODULE ARGUMENTS...
    job_cmd="${cuda_cmd} --gpu ${ngpu}" job "${logdir}/$1.log" "${@:2}"
}
on_cpu() { # on_cpu LOG MODULE ARGUMENTS...
    job_cmd="${train_cmd}" job "${logdir}/$1.log" "${@:2}"
}

title_fp_lm="check the recipe; fp LM: ${lm_exp}"
stage_fp_lm() {
    local shapes
    if "${missing_lm}"; then
        hold "${lm_exp}/.mpq" # runs of other names train there too
        log "there is no finished LM in ${lm_exp}: the recipe trains one"
        touch "${lm_exp}/.mpq/unfinished"
        run_recipe fp_lm --stage 6 --stop_stage 8 --ngpu "${ngpu}" --lm_exp "${lm_exp}" --inference_lm "${inference_lm}"
        rm "${lm_exp}/.mpq/unfinished"
        check_options "cuda_cmd=${cuda_cmd:-}"
        ! "${missing_lm}" || die "the recipe trained no ${fp_lm}; look at ${logdir}/fp_lm.log"
    fi
    # With --num_splits_lm the shapes are a folder.
    shapes=$(awk '$1 == "train_shape_file:" && NF == 1 { getline; if ($1 == "-") print $NF; exit }' "${lm_exp}/config.yaml")
    if ! "${no_train}" && [ -n "${shapes}" ] && [ ! -e "${shapes}" ]; then
        hold "${lm_exp}/.mpq"
        log "${shapes} does not exist: the recipe collects the LM statistics again"
        run_recipe lm_stats --stage 6 --stop_stage 6 --lm_exp "${lm_exp}"
    fi
}

title_sensitivity="${sensitivity} of every cluster at every bit-width: ${sensitivity_json}"
[ "${sensitivity}" != uniform ] || title_sensitivity="a uniform plan needs no sensitivity"
sensitivity_options() {
    local words=("${common[@]}" --text "${lm_train_text}" --text_format kaldi --seed "${seed}" ${bits:+--bits ${bits}} "${storage[@]}")
    case ${sensitivity} in
        nas) words+=(--budget "${budget}") ;; # the search trains under it
        kl) words+=(--max_tokens "${max_tokens}" "${rounding[@]}") ;;
        *) words+=(--max_tokens "${max_tokens}" --method "${sensitivity}") ;;
    esac
    printf '%s\n' "${words[@]}"
}
options_sensitivity() { [ "${sensitivity}" = uniform ] || sensitivity_options; }
inputs_sensitivity() {
    [ "${sensitivity}" != uniform ] || return 0
    echo "${lm_exp}/config.yaml ${fp_lm} ${lm_train_text}"
    [ "${sensitivity}" != nas ] || echo "${nas_config}"
}
outputs_sensitivity() {
    case ${sensitivity} in
        uniform) ;;
        nas) echo "${sensitivity_json} ${nas_dir}" ;;
        *) echo "${sensitivity_json}" ;;
    esac
}
measured_before() { # another run that has measured the same: where its table is
    local mark table
    for mark in "${expdir}"/mpq_*/marks/sensitivity.-.done; do
        table=${mark%/marks/*}/sensitivity.json
        if [ "${sensitivity}" != nas ] && [ -s "${table}" ] && [ "${keys[-]}" = "$(cat "${mark}" 2> /dev/null)" ]; then
            echo "${table}"
            return
        fi
    done
}
stage_sensitivity() {
    local words table
    mapfile -t words < <(sensitivity_options)
    case ${sensitivity} in
        uniform) return ;;
        nas)
            on_gpu nas espnet_mpq.bin.mpq nas "${words[@]}" ${nas_config:+--config "${nas_config}"} \
                --ngpu "${ngpu}" --output_dir "${nas_dir}"
            return
            ;;
    esac
    table=$(measured_before)
    if [ -n "${table}" ] && ! "${force}"; then
        log "${table} was measured with the same inputs: copied"
        cp "${table}" "${sensitivity_json}.part"
        mv "${sensitivity_json}.part" "${sensitivity_json}"
        return
    fi
    # other measurements and other numbers of jobs cannot go on from these
    if [ "$(cat "${marks}/shards" 2> /dev/null)" != "${nj} ${keys[-]}" ]; then rm -f "${sensitivity_json%.json}".[0-9]*.json; fi
    echo "${nj} ${keys[-]}" > "${marks}/shards"
    words+=(--output "${sensitivity_json}")
    job_cmd="${train_cmd} JOB=1:${nj}" job "${logdir}/sensitivity.JOB.log" \
        espnet_mpq.bin.mpq sensitivity "${words[@]}" --job JOB --n_jobs "${nj}"
    on_cpu sensitivity_merge espnet_mpq.bin.mpq sensitivity "${words[@]}" --merge "${nj}"
}

title_plan="plan for ${budget} effective bits: ${plan_dir}"
[ "${sensitivity}" != uniform ] || title_plan="plan with ${bits} bit for every cluster: ${plan_dir}"
plan_options() {
    if [ "${sensitivity}" = uniform ]; then
        printf '%s\n' --uniform "${bits}" "${storage[@]}" "${rounding[@]}"
    else
        printf '%s\n' --sensitivity "${sensitivity_json}" --budget "${budget}"
    fi
}
options_plan() { plan_options; }
inputs_plan() {
    echo "${lm_exp}/config.yaml ${fp_lm} ${lm_dev_text} ${train_config}"
    [ "${sensitivity}" = uniform ] || echo "${sensitivity_json}"
}
outputs_plan() { echo "${plan_dir}/plan.json ${plan_dir}/train_lm_mpq.yaml ${plan_dir}"; }
stage_plan() {
    local words
    mapfile -t words < <(plan_options)
    on_cpu plan espnet_mpq.bin.mpq plan "${common[@]}" --text "${lm_dev_text}" --text_format kaldi \
        --output_dir "${plan_dir}" "${words[@]}" ${train_config:+--train_config "${train_config}"}
}

title_admm="ADMM training: ${quantized_exp}"
! "${no_train}" || title_admm="no ADMM training: the fp LM is rounded and packed"
options_admm() { "${no_train}" || echo "${run} ${lm_args}"; }
inputs_admm() { "${no_train}" || echo "${plan_dir}/train_lm_mpq.yaml ${fp_lm} ${lm_train_text}"; }
outputs_admm() { "${no_train}" || echo "${quantized_exp}/config.yaml ${quantized_exp}/${quantized_lm} ${quantized_exp}"; }
stage_admm() {
    "${no_train}" || run_recipe admm --stage 7 --stop_stage 7 --ngpu "${ngpu}" \
        --lm_config "${plan_dir}/train_lm_mpq.yaml" --lm_exp "${quantized_exp}" \
        --lm_args "--init_param ${fp_lm}${lm_args:+ ${lm_args}}"
}

title_pack="pack: ${packed_exp}"
options_pack() { echo "${no_train} ${lm_exp} ${inference_lm}"; }
inputs_pack() {
    if "${no_train}"; then
        echo "${lm_exp}/config.yaml ${fp_lm} ${plan_dir}/plan.json ${lm_train_text}"
    else
        echo "${quantized_exp}/config.yaml ${quantized_exp}/${quantized_lm}"
    fi
}
outputs_pack() { echo "${packed_exp}/config.yaml ${packed_exp}/packed.safetensors ${packed_exp}/receipt.json ${packed_exp}"; }
stage_pack() {
    local words=(--lm_exp "${quantized_exp}" --lm_file "${quantized_lm}")
    ! "${no_train}" || words=("${common[@]}" --plan "${plan_dir}/plan.json" --text "${lm_train_text}"
        --text_format kaldi --seed "${seed}" "${rounding[@]}")
    on_cpu pack espnet_mpq.bin.mpq pack --fp_exp "${lm_exp}" --fp_file "${inference_lm}" --output_dir "${packed_exp}" "${words[@]}"
}

lm_of() { # lm_of SYSTEM: folder and checkpoint
    case $1 in
        fp) echo "${lm_exp} ${inference_lm}" ;;
        quantized) echo "${quantized_exp} ${quantized_lm}" ;;
        packed) echo "${packed_exp} packed.safetensors" ;;
    esac
}
lm_files() { # lm_files SYSTEM: config.yaml and checkpoint
    local lm
    read -r -a lm < <(lm_of "$1")
    echo "${lm[0]}/config.yaml ${lm[0]}/${lm[1]}"
}

title_perplexity="perplexity: ${lm_test_text}"
units_perplexity="fp quantized packed"
! "${no_train}" || units_perplexity="fp packed"
inputs_perplexity() { echo "${lm_test_text} $(lm_files "$1")"; }
outputs_perplexity() { echo "${mpq_exp}/ppl_$1/ppl ${mpq_exp}/ppl_$1"; }
stage_perplexity() {
    local files
    read -r -a files < <(lm_files "$1")
    on_gpu "ppl_$1" espnet2.bin.lm_calc_perplexity --ngpu "${ngpu}" \
        --data_path_and_name_and_type "${lm_test_text},text,text" \
        --train_config "${files[0]}" --model_file "${files[1]}" --output_dir "${mpq_exp}/ppl_$1"
}
after_perplexity() {
    local system
    for system in ${units_perplexity}; do log "PPL ${system}: $(cat "${mpq_exp}/ppl_${system}/ppl")"; done
}
