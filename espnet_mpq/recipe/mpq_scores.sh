# The last stages of mpq.sh: decode, score, report. To be sourced after mpq_stages.sh.
# shellcheck shell=bash disable=SC2034,SC2046,SC2086,SC2154

fp_tag=${fp_inference_tag:-mpq_${tag}_fp}
packed_tag="mpq_${tag}_packed"
# Beside what it stands for: a run with another --expdir decodes there too.
[ -z "${asr_exp}" ] || marks_decode="${asr_exp}/mpq_${tag}_marks"

# Set by set, so that a killed decoding goes on with the next one.
title_decode="decoding with shallow fusion: ${asr_exp}/{${fp_tag},${packed_tag}}"
units_decode=
for _name in fp packed; do
    if [ "${_name}" = packed ] || [ -z "${fp_inference_tag}" ]; then
        for dset in ${test_sets}; do units_decode+=" ${_name}:${dset}"; done
    fi
done
units_decode=${units_decode# }
decode_tag() { case $1 in fp:*) echo "${fp_tag}" ;; *) echo "${packed_tag}" ;; esac; }
options_decode() { echo "${run} ${asr_exp} ${inference_asr_model} ${inference_args} ${inference_nj}"; }
inputs_decode() {
    local file
    lm_files "${1%%:*}"
    echo "${asr_exp}/config.yaml ${inference_config}"
    # the names of these are up to the recipe
    for file in "${asr_exp}/${inference_asr_model:-valid.acc.ave.pth}" "${data_feats}/${1#*:}"/{wav,feats}.scp; do
        [ ! -f "${file}" ] || echo "${file}"
    done
}
outputs_decode() { echo "${asr_exp}/$(decode_tag "$1")/${1#*:}/text ${asr_exp}/$(decode_tag "$1")/${1#*:}"; }
stage_decode() {
    local lm words=(--asr_exp "${asr_exp}")
    read -r -a lm < <(lm_of "${1%%:*}")
    [ -z "${inference_asr_model}" ] || words+=(--inference_asr_model "${inference_asr_model}")
    [ -z "${inference_config}" ] || words+=(--inference_config "${inference_config}")
    [ -z "${inference_args}" ] || words+=(--inference_args "${inference_args}")
    [ -z "${inference_nj}" ] || words+=(--inference_nj "${inference_nj}")
    run_recipe "decode_${1//[:\/]/_}" --stage 12 --stop_stage 12 "${words[@]}" --test_sets "${1#*:}" \
        --lm_exp "${lm[0]}" --inference_lm "${lm[1]}" --inference_tag "$(decode_tag "$1")"
}

title_score="scoring: ${mpq_exp}/compare/*.json"
units_score=${test_sets}
score_files() { # score_files SET: reference, hypotheses with the fp and the packed LM
    echo "${data_feats}/$1/${ref_text} ${asr_exp}/${fp_tag}/$1/text ${asr_exp}/${packed_tag}/$1/text"
}
comparison() { echo "${mpq_exp}/compare/${1//\//_}.json"; }
options_score() { echo "${score_unit} ${seed}"; }
inputs_score() { score_files "$1"; }
outputs_score() { comparison "$1"; }
stage_score() {
    local files log="${logdir}/score_${1//\//_}.log"
    read -r -a files < <(score_files "$1")
    mkdir -p "${mpq_exp}/compare"
    ${python} -m espnet_mpq.bin.mpq compare --ref "${files[0]}" --hyp_a "${files[1]}" --hyp_b "${files[2]}" \
        --text_format kaldi --names fp packed --unit "${score_unit}" --seed "${seed}" --json "$(comparison "$1")" 2>&1 | tee "${log}" \
        || die "scoring failed; look at ${log}"
}

results="${mpq_exp}/RESULTS.md"
title_report="report: ${results}"
systems_of() { # systems_of SET: the rows of its table, or with "" of that of the language models
    local wer='' system
    [ -z "$1" ] || wer="wer=$(comparison "$1")"
    for system in ${units_perplexity}; do
        case ${system} in
            fp) echo "--system name=fp weights=${fp_lm} bits=32" ;;
            packed) echo "--system name=packed receipt=${packed_exp}/receipt.json weights=${packed_exp}/packed.safetensors" ;;
            quantized)
                # its words are those of the packed one
                if [ -n "$1" ] || [ ! -f "${mpq_exp}/ppl_quantized/ppl" ]; then continue; fi
                echo "--system name=quantized"
                ;;
        esac
        [ ! -f "${mpq_exp}/ppl_${system}/ppl" ] || echo "ppl=${mpq_exp}/ppl_${system}/ppl"
        [ "${system}" = quantized ] || echo "${wer}"
    done
}
stage_report() {
    local dset figure part="${results}.part" what="at ${budget} effective bits (${sensitivity})"
    [ "${sensitivity}" != uniform ] || what="with ${bits} bit for every cluster"
    {
        printf '# %s: %s %s\n\n' "${tag}" "${lm_exp}" "${what}"
        echo "fp LM ${fp_lm}, ASR model ${asr_exp:-none}, perplexity on ${lm_test_text}."
        echo "The p-value is that of MAPSSWE (two-sided) against the fp LM."
        ! "${no_train}" || echo "Quantized after training, without ADMM."
        echo
    } > "${part}"
    # The first table without WER, then one for each test set that was scored.
    for dset in "" ${test_sets}; do
        [ -z "${dset}" ] || [ -f "$(comparison "${dset}")" ] || continue
        ${python} -m espnet_mpq.report.table --markdown --title "${dset:-language model}" --output "${part}" --append \
            $(systems_of "${dset}") 2>&1 | tee "${logdir}/report.log" || die "report failed; look at ${logdir}/report.log"
        echo >> "${part}"
    done
    {
        printf '## bits of every cluster\n\n```\n'
        ${python} -m espnet_mpq.bin.mpq info "${packed_exp}" 2> "${logdir}/info.log" || die "mpq info failed; look at ${logdir}/info.log"
        echo '```'
        for figure in sensitivity pareto; do
            [ ! -f "${plan_dir}/${figure}.png" ] || printf '\n![%s](plan/%s.png)\n' ${figure} ${figure}
        done
    } >> "${part}"
    mv "${part}" "${results}"
    log "Results: ${results}"
}
