#!/usr/bin/env bash
# Makes the language model of a recipe that has already been run low-bit, and tests it.
#
# It stands beside the recipe's run.sh, drives that script with options (an option given
# again wins) and edits nothing: new files go to ${expdir}/mpq_<tag>/ and, for decoding, to
# ${asr_exp}/mpq_<tag>_*/. Finished stages are not repeated; a killed one continues.
# shellcheck disable=SC1091,SC2034,SC2086,SC2154
set -e
set -u
set -o pipefail

log() {
    local fname=${BASH_SOURCE[1]##*/}
    echo -e "$(date '+%Y-%m-%dT%H:%M:%S') (${fname}:${BASH_LINENO[0]}:${FUNCNAME[1]}) $*"
}
die() {
    log "Error: $*" 1>&2
    exit 1
}
SECONDS=0

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

# Language model
lm_exp=                          # Trained LM of the recipe, e.g. exp/lm_train_lm_en_bpe5000.
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
    sed -n 's/^\([a-z_]*\)=\([^#]*[^# ]\)\{0,1\} *# \(.*\)$/    --\1 (\2) \3/p' "$0"
)

log "$0 $*"
command_line="$0$(printf " %q" "$@")"
for needed in utils/parse_options.sh path.sh cmd.sh; do
    [ -f "${needed}" ] || die "no ${needed} here: start this in a recipe folder (egs2/<corpus>/asr1)"
done
. utils/parse_options.sh
[ $# -eq 0 ] || die "no positional arguments are needed, found: $*"
. ./path.sh
. ./cmd.sh

[ -n "${lm_exp}" ] || die "--lm_exp is needed: the folder of the trained LM, e.g. exp/lm_..."
case "${sensitivity}" in
    kl | hessian | nas | kl_printed | fisher) ;;
    uniform)
        : "${bits:=2}"
        case "${bits}" in 1 | 2 | 4 | 8) ;; *) die "--sensitivity uniform needs --bits 1, 2, 4 or 8, found: ${bits}" ;; esac
        ;;
    *) die "--sensitivity ${sensitivity} is unknown; known: kl, hessian, nas, uniform, kl_printed, fisher" ;;
esac
case "${lm_type}" in "" | rnn | transformer) ;; *) die "--lm_type ${lm_type} is unknown; known: rnn, transformer" ;; esac
case "${no_train}" in true | false) ;; *) die "--no_train must be true or false" ;; esac
case "${score_unit}" in word | char) ;; *) die "--score_unit must be word or char" ;; esac
if [ "${stage}" -le 8 ] && [ "${stop_stage}" -ge 7 ]; then
    [ -n "${asr_exp}" ] || die "--asr_exp is needed from stage 7 on (or give --stop_stage 6)"
    [ -n "${test_sets}" ] || die "--test_sets is needed from stage 7 on (or give --stop_stage 6)"
fi

lm_exp=${lm_exp%/}
asr_exp=${asr_exp%/}
if [ -z "${tag}" ]; then
    tag="${lm_exp##*/}_${budget}bit"
    case "${sensitivity}" in kl) ;; uniform) tag="${lm_exp##*/}_uniform${bits}bit" ;; *) tag+="_${sensitivity}" ;; esac
    ! "${no_train}" || tag+="_no_train"
fi
mpq_exp="${expdir}/mpq_${tag}"
logdir="${mpq_exp}/log"
marks="${mpq_exp}/marks"
plan_dir="${mpq_exp}/plan"
quantized_exp="${mpq_exp}/lm"
packed_exp="${mpq_exp}/packed"
sensitivity_json="${mpq_exp}/sensitivity.json"
[ "${sensitivity}" != nas ] || sensitivity_json="${mpq_exp}/nas/sensitivity.json"
fp_lm="${lm_exp}/${inference_lm}"
fp_tag=${fp_inference_tag:-mpq_${tag}_fp}
packed_tag="mpq_${tag}_packed"
mpq="${python} -m espnet_mpq.bin.mpq"
launcher="${python} -m espnet_mpq"
mkdir -p "${logdir}" "${marks}"
echo "${command_line}" >> "${logdir}/commands.txt"

# The key of a step: its options and the content of the files it reads (not what it writes).
key_of() {
    local item
    for item; do
        if [ -f "${item}" ]; then sha256sum < "${item}"; else echo "${item}"; fi
    done | sha256sum | cut -d ' ' -f 1
}

# finished STEP KEY: whether the step was done with this key.
finished() {
    if ! "${force}" && [ "$(cat "${marks}/$1.done" 2> /dev/null)" = "$2" ]; then
        log "$1 is finished with the same inputs: skipped"
        return 0
    fi
    return 1
}

# begin STEP KEY FILES...: what the step left behind is used again only if it had the same key.
begin() {
    local step=$1 key=$2
    shift 2
    if "${force}" || [ "$(cat "${marks}/${step}.begun" 2> /dev/null)" != "${key}" ]; then
        rm -rf "$@"
    fi
    rm -f "${marks}/${step}.done"
    echo "${key}" > "${marks}/${step}.begun"
}

# done_with STEP KEY FILES...: mark the step; its files must be there.
done_with() {
    local step=$1 key=$2 file
    shift 2
    for file; do
        [ -s "${file}" ] || die "${step} did not make ${file}; look at ${logdir}/${step}*.log"
    done
    echo "${key}" > "${marks}/${step}.done"
}

# run_recipe STEP OPTIONS...: the recipe's own script with the plugin registered.
run_recipe() {
    local step=$1
    shift
    ${run} "$@" --python "${launcher}" --use_lm true 2>&1 | tee "${logdir}/${step}.log" \
        || die "'${run}' failed in ${step}; look at ${logdir}/${step}.log"
}

# run_job CMD STEP COMMAND...: one job through the recipe's cmd.sh.
run_job() {
    local cmd=$1 step=$2
    shift 2
    ${cmd} "${logdir}/${step}.log" "$@" || { tail -n 20 "${logdir}/${step}.log"; die "${step} failed"; }
}

# setting NAME: first entry of a list in the fp LM's config.yaml, e.g. its training text.
setting() {
    awk -v name="$1:" '$1 == name && NF == 1 { getline; if ($1 == "-") print $NF; exit }' \
        "${lm_exp}/config.yaml" 2> /dev/null || true
}


if [ "${stage}" -le 1 ] && [ "${stop_stage}" -ge 1 ]; then
    log "Stage 1: check the recipe; fp LM: ${lm_exp}"
    ${python} -c "import espnet_mpq" > "${logdir}/check.log" 2>&1 \
        || die "'${python}' cannot import espnet_mpq: pip install espnet_mpq there, or give --python"
    if [ ! -f "${lm_exp}/config.yaml" ]; then
        log "${lm_exp}/config.yaml does not exist: the recipe trains its LM"
        run_recipe fp_lm --stage 6 --stop_stage 8 --ngpu "${ngpu}" \
            --lm_exp "${lm_exp}" --inference_lm "${inference_lm}"
    fi
    [ -f "${fp_lm}" ] || die "no ${fp_lm}; give --inference_lm, there are:" \
        "$(cd "${lm_exp}" 2> /dev/null && echo ./*.pth)"
    lm_class=$(awk '/^lm:/ { print $2; exit }' "${lm_exp}/config.yaml")
    case "${lm_class:-seq_rnn}" in
        seq_rnn | mpq_seq_rnn) found_type=rnn ;;
        transformer | mpq_transformer) found_type=transformer ;;
        *) die "${lm_exp}/config.yaml: lm: ${lm_class} cannot be made low-bit; known: seq_rnn, transformer" ;;
    esac
    [ "${lm_type:-${found_type}}" = "${found_type}" ] \
        || die "--lm_type ${lm_type}, but ${lm_exp}/config.yaml says lm: ${lm_class}; give the right --lm_exp"
    shapes=$(setting train_shape_file)
    # With --num_splits_lm the shapes are a folder.
    if [ -n "${shapes}" ] && [ ! -e "${shapes}" ]; then
        log "${shapes} does not exist: the recipe collects the LM statistics again"
        run_recipe lm_stats --stage 6 --stop_stage 6 --lm_exp "${lm_exp}"
    fi
    for dset in ${test_sets}; do
        [ -f "${data_feats}/${dset}/${ref_text}" ] \
            || die "no ${data_feats}/${dset}/${ref_text}; give --test_sets or --data_feats"
    done
fi

# Texts: as given, as the recipe leaves them, or as the fp LM's configuration names them.
if [ -z "${lm_train_text}" ]; then
    lm_train_text="${data_feats}/lm_train.txt"
    # The configuration names a folder of split texts if the LM was trained with --num_splits_lm.
    _text=$(setting train_data_path_and_name_and_type)
    [ -f "${lm_train_text}" ] || [ ! -f "${_text}" ] || lm_train_text=${_text}
fi
[ -n "${lm_dev_text}" ] || lm_dev_text=$(setting valid_data_path_and_name_and_type)
[ -f "${lm_dev_text}" ] || lm_dev_text=${lm_train_text}
if [ -z "${lm_test_text}" ]; then
    lm_test_text=${lm_dev_text}
    [ -z "${test_sets}" ] || lm_test_text="${data_feats}/${test_sets%% *}/${ref_text}"
fi


# How the weights are stored: the same for sensitivities and plans.
storage=()
[ -z "${grid}" ] || storage+=(--grid "${grid}")
[ -z "${tying}" ] || storage+=(--tying "${tying}")
common=(--lm_exp "${lm_exp}" --lm_file "${inference_lm}")


if [ "${stage}" -le 2 ] && [ "${stop_stage}" -ge 2 ] && [ "${sensitivity}" = uniform ]; then
    log "Stage 2: a uniform plan needs no sensitivity: skipped"
elif [ "${stage}" -le 2 ] && [ "${stop_stage}" -ge 2 ]; then
    log "Stage 2: ${sensitivity} of every cluster at every bit-width: ${sensitivity_json}"
    [ -f "${lm_train_text}" ] || die "no training text '${lm_train_text}'; give --lm_train_text"
    _opts=("${common[@]}" --text "${lm_train_text}" --text_format kaldi --seed "${seed}")
    # shellcheck disable=SC2206
    [ -z "${bits}" ] || _opts+=(--bits ${bits})
    _opts+=("${storage[@]}")
    if [ "${sensitivity}" = nas ]; then
        _opts+=(--budget "${budget}")
        [ -z "${nas_config}" ] || _opts+=(--config "${nas_config}")
        key=$(key_of "${_opts[@]}" "${lm_exp}/config.yaml" "${fp_lm}" "${lm_train_text}")
        if ! finished nas "${key}"; then
            begin nas "${key}" "${mpq_exp}/nas"
            run_job "${cuda_cmd} --gpu ${ngpu}" nas ${mpq} nas "${_opts[@]}" --ngpu "${ngpu}" \
                --output_dir "${mpq_exp}/nas"
            done_with nas "${key}" "${sensitivity_json}"
        fi
    else
        _opts+=(--max_tokens "${max_tokens}")
        [ "${sensitivity}" = kl ] || _opts+=(--method "${sensitivity}")
        key=$(key_of "${_opts[@]}" "${nj}" "${lm_exp}/config.yaml" "${fp_lm}")
        if ! finished sensitivity "${key}"; then
            begin sensitivity "${key}" "${sensitivity_json%.json}".*json
            _opts+=(--output "${sensitivity_json}")
            ${train_cmd} JOB=1:"${nj}" "${logdir}/sensitivity.JOB.log" \
                ${mpq} sensitivity "${_opts[@]}" --job JOB --n_jobs "${nj}" \
                || { tail -n 20 "${logdir}"/sensitivity.*.log; die "sensitivity failed"; }
            run_job "${train_cmd}" sensitivity_merge ${mpq} sensitivity "${_opts[@]}" --merge "${nj}"
            done_with sensitivity "${key}" "${sensitivity_json}"
        fi
    fi
fi


if [ "${stage}" -le 3 ] && [ "${stop_stage}" -ge 3 ]; then
    _opts=("${common[@]}" --text "${lm_dev_text}" --text_format kaldi --output_dir "${plan_dir}")
    if [ "${sensitivity}" = uniform ]; then
        log "Stage 3: plan with ${bits} bit for every cluster: ${plan_dir}"
        _opts+=(--uniform "${bits}" "${storage[@]}")
    else
        log "Stage 3: plan for ${budget} effective bits: ${plan_dir}"
        _opts+=(--sensitivity "${sensitivity_json}" --budget "${budget}")
    fi
    [ -z "${train_config}" ] || _opts+=(--train_config "${train_config}")
    key=$(key_of "${_opts[@]}" "${lm_exp}/config.yaml" "${fp_lm}")
    if ! finished plan "${key}"; then
        begin plan "${key}" "${plan_dir}"
        run_job "${train_cmd}" plan ${mpq} plan "${_opts[@]}"
        done_with plan "${key}" "${plan_dir}/plan.json" "${plan_dir}/train_lm_mpq.yaml"
    fi
fi


if [ "${stage}" -le 4 ] && [ "${stop_stage}" -ge 4 ] && "${no_train}"; then
    log "Stage 4: --no_train: the fp LM is packed as it is: skipped"
elif [ "${stage}" -le 4 ] && [ "${stop_stage}" -ge 4 ]; then
    log "Stage 4: ADMM training: ${quantized_exp}"
    _opts=(--lm_config "${plan_dir}/train_lm_mpq.yaml" --lm_exp "${quantized_exp}"
        --lm_args "--init_param ${fp_lm}${lm_args:+ ${lm_args}}")
    key=$(key_of "${run}" "${_opts[@]}" "${plan_dir}/train_lm_mpq.yaml" "${fp_lm}" "${lm_train_text}")
    if ! finished admm "${key}"; then
        begin admm "${key}" "${quantized_exp}"
        run_recipe admm --stage 7 --stop_stage 7 --ngpu "${ngpu}" "${_opts[@]}"
        done_with admm "${key}" "${quantized_exp}/config.yaml" "${quantized_exp}/${quantized_lm}"
    fi
fi


if [ "${stage}" -le 5 ] && [ "${stop_stage}" -ge 5 ]; then
    log "Stage 5: pack: ${packed_exp}"
    _opts=(--fp_exp "${lm_exp}" --fp_file "${inference_lm}" --output_dir "${packed_exp}")
    if "${no_train}"; then
        _opts+=("${common[@]}" --plan "${plan_dir}/plan.json")
        key=$(key_of "${_opts[@]}" "${lm_exp}/config.yaml" "${fp_lm}")
    else
        _opts+=(--lm_exp "${quantized_exp}" --lm_file "${quantized_lm}")
        key=$(key_of "${_opts[@]}" "${quantized_exp}/config.yaml" "${quantized_exp}/${quantized_lm}")
    fi
    if ! finished pack "${key}"; then
        begin pack "${key}" "${packed_exp}"
        run_job "${train_cmd}" pack ${mpq} pack "${_opts[@]}"
        done_with pack "${key}" "${packed_exp}"/{config.yaml,packed.safetensors,receipt.json}
    fi
fi


if [ "${stage}" -le 6 ] && [ "${stop_stage}" -ge 6 ]; then
    log "Stage 6: perplexity: ${lm_test_text}"
    [ -f "${lm_test_text}" ] || die "no text '${lm_test_text}'; give --lm_test_text"
    systems="fp quantized packed"
    ! "${no_train}" || systems="fp packed"
    for system in ${systems}; do
        case ${system} in
            fp) exp=${lm_exp} file=${inference_lm} ;;
            quantized) exp=${quantized_exp} file=${quantized_lm} ;;
            packed) exp=${packed_exp} file=packed.safetensors ;;
        esac
        out="${mpq_exp}/ppl_${system}"
        key=$(key_of "${lm_test_text}" "${exp}/config.yaml" "${exp}/${file}")
        if ! finished "ppl_${system}" "${key}"; then
            begin "ppl_${system}" "${key}" "${out}"
            run_job "${cuda_cmd} --gpu ${ngpu}" "ppl_${system}" \
                ${launcher} -m espnet2.bin.lm_calc_perplexity \
                --ngpu "${ngpu}" \
                --data_path_and_name_and_type "${lm_test_text},text,text" \
                --train_config "${exp}/config.yaml" \
                --model_file "${exp}/${file}" \
                --output_dir "${out}"
            done_with "ppl_${system}" "${key}" "${out}/ppl"
        fi
        log "PPL ${system}: $(cat "${out}/ppl")"
    done
fi


if [ "${stage}" -le 7 ] && [ "${stop_stage}" -ge 7 ]; then
    log "Stage 7: decoding with shallow fusion: ${asr_exp}/{${fp_tag},${packed_tag}}"
    [ -f "${asr_exp}/config.yaml" ] || die "no ${asr_exp}/config.yaml; give the trained --asr_exp"
    _opts=(--asr_exp "${asr_exp}")
    [ -z "${inference_asr_model}" ] || _opts+=(--inference_asr_model "${inference_asr_model}")
    [ -z "${inference_config}" ] || _opts+=(--inference_config "${inference_config}")
    [ -z "${inference_args}" ] || _opts+=(--inference_args "${inference_args}")
    [ -z "${inference_nj}" ] || _opts+=(--inference_nj "${inference_nj}")
    asr_model="${asr_exp}/${inference_asr_model:-valid.acc.ave.pth}"
    for system in fp packed; do
        case ${system} in
            fp) exp=${lm_exp} file=${inference_lm} inference_tag=${fp_tag} ;;
            packed) exp=${packed_exp} file=packed.safetensors inference_tag=${packed_tag} ;;
        esac
        if [ "${system}" = fp ] && [ -n "${fp_inference_tag}" ]; then
            log "fp LM: ${asr_exp}/${fp_tag} is used as it is"
            continue
        fi
        # Set by set, so that a killed decoding goes on with the next one.
        for dset in ${test_sets}; do
            step="decode_${system}_${dset//\//_}"
            out="${asr_exp}/${inference_tag}/${dset}"
            key=$(key_of "${run}" "${_opts[@]}" "${inference_config}" "${asr_exp}/config.yaml" \
                "${asr_model}" "${exp}/config.yaml" "${exp}/${file}" "${data_feats}/${dset}/wav.scp")
            if ! finished "${step}" "${key}"; then
                begin "${step}" "${key}" "${out}"
                run_recipe "${step}" --stage 12 --stop_stage 12 "${_opts[@]}" --test_sets "${dset}" \
                    --lm_exp "${exp}" --inference_lm "${file}" --inference_tag "${inference_tag}"
                done_with "${step}" "${key}" "${out}/text"
            fi
        done
    done
fi


if [ "${stage}" -le 8 ] && [ "${stop_stage}" -ge 8 ]; then
    log "Stage 8: scoring: ${mpq_exp}/compare/*.json"
    mkdir -p "${mpq_exp}/compare"
    for dset in ${test_sets}; do
        step="score_${dset//\//_}"
        out="${mpq_exp}/compare/${dset//\//_}.json"
        _opts=(--ref "${data_feats}/${dset}/${ref_text}"
            --hyp_a "${asr_exp}/${fp_tag}/${dset}/text"
            --hyp_b "${asr_exp}/${packed_tag}/${dset}/text"
            --text_format kaldi --names fp packed --unit "${score_unit}" --seed "${seed}")
        key=$(key_of "${_opts[@]}")
        if ! finished "${step}" "${key}"; then
            begin "${step}" "${key}" "${out}"
            ${mpq} compare "${_opts[@]}" --json "${out}" 2>&1 | tee "${logdir}/${step}.log" \
                || die "${step} failed; look at ${logdir}/${step}.log"
            done_with "${step}" "${key}" "${out}"
        fi
    done
fi


if [ "${stage}" -le 9 ] && [ "${stop_stage}" -ge 9 ]; then
    log "Stage 9: report: ${mpq_exp}/RESULTS.md"
    results="${mpq_exp}/RESULTS.md"
    {
        if [ "${sensitivity}" = uniform ]; then
            echo "# ${tag}: ${lm_exp} with ${bits} bit for every cluster"
        else
            echo "# ${tag}: ${lm_exp} at ${budget} effective bits (${sensitivity})"
        fi
        echo
        echo "fp LM ${fp_lm}, ASR model ${asr_exp:-none}, perplexity on ${lm_test_text}."
        echo "The p-value is that of MAPSSWE (two-sided) against the fp LM."
        ! "${no_train}" || echo "Quantized after training, without ADMM."
        echo
    } > "${results}.part"
    # The first table without WER, then one for each test set that was scored.
    for dset in "" ${test_sets}; do
        scores="${mpq_exp}/compare/${dset//\//_}.json"
        [ -z "${dset}" ] || [ -f "${scores}" ] || continue
        _opts=(--system name=fp weights="${fp_lm}" bits=32)
        [ ! -f "${mpq_exp}/ppl_fp/ppl" ] || _opts+=(ppl="${mpq_exp}/ppl_fp/ppl")
        [ -z "${dset}" ] || _opts+=(wer="${scores}")
        if [ -z "${dset}" ] && ! "${no_train}" && [ -f "${mpq_exp}/ppl_quantized/ppl" ]; then
            _opts+=(--system name=quantized ppl="${mpq_exp}/ppl_quantized/ppl")
        fi
        _opts+=(--system name=packed receipt="${packed_exp}/receipt.json"
            weights="${packed_exp}/packed.safetensors")
        [ ! -f "${mpq_exp}/ppl_packed/ppl" ] || _opts+=(ppl="${mpq_exp}/ppl_packed/ppl")
        [ -z "${dset}" ] || _opts+=(wer="${scores}")
        ${python} -m espnet_mpq.report.table --markdown --title "${dset:-language model}" \
            --output "${results}.part" --append "${_opts[@]}" \
            2>&1 | tee "${logdir}/report.log" || die "report failed; look at ${logdir}/report.log"
        echo >> "${results}.part"
    done
    {
        echo "## bits of every cluster"
        echo
        echo '```'
        ${mpq} info "${packed_exp}" 2> "${logdir}/info.log" || die "mpq info failed; look at ${logdir}/info.log"
        echo '```'
        for figure in sensitivity pareto; do
            [ ! -f "${plan_dir}/${figure}.png" ] || printf '\n![%s](plan/%s.png)\n' ${figure} ${figure}
        done
    } >> "${results}.part"
    mv "${results}.part" "${results}"
    log "Results: ${results}"
fi

log "Successfully finished. [elapsed=${SECONDS}s]"
