# Runs the stages of a recipe: skips what is finished, goes on where a killed run stopped. To be sourced.
#
# The recipe sets stage, stop_stage, nj, python and stages (names, in order), and for each stage NAME:
#   title_NAME          what it does
#   inputs_NAME UNIT    prints the files whose contents decide whether it has to run
#   options_NAME UNIT   prints what else decides (may be missing)
#   outputs_NAME UNIT   prints what it writes
#   stage_NAME UNIT     notes commands with job, or does the work
#   after_NAME          prints results once the jobs have succeeded (may be missing)
#   units_NAME          parts that are finished, skipped and repeated each for itself (default: one)
#   threads_NAME        threads of a job (default: 1)
#   marks_NAME          folder of the marks (default: ${marks})
# shellcheck shell=bash disable=SC2154

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
    [ -s "${jobs_file}" ] || return 0
    if [ -z "${host_pid}" ]; then
        coproc HOST { exec ${python} -m espnet_mpq.recipe.host_jobs; }
        host_pid=${HOST_PID}
    fi
    echo "${nj} $1 ${jobs_file}" >&"${HOST[1]}"
    read -r status <&"${HOST[0]}" || return 1
    : > "${jobs_file}"
    return "${status}"
}

defined() { declare -F "$1" > /dev/null; }

key_of() { # key_of N NAME UNIT: what this part of a stage depends on
    local file
    ! defined "options_$2" || "options_$2" "$3"
    for file in $("inputs_$2" "$3"); do
        if [ ! -f "${file}" ]; then
            echo "stage $1 needs ${file}, which does not exist: run the stages before it first" >&2
            return 1
        fi
        sha256sum "${file}"
    done
}

all_there() { # all_there NAME UNIT: whether all outputs are there
    local output
    for output in $("outputs_$1" "$2"); do [ -e "${output}" ] || return 1; done
}

run_stage() { # run_stage N NAME
    local n=$1 name=$2 unit mark output begin=${SECONDS} todo=()
    local title=title_$2 units=units_$2 threads=threads_$2 folder=marks_$2
    folder=${!folder:-${marks}}
    mkdir -p "${folder}"
    for unit in ${!units:--}; do
        mark=${folder}/${name}.${unit}
        key_of "${n}" "${name}" "${unit}" > "${mark}.new" || exit 1
        if [ "${stage}" != "${stop_stage}" ] && all_there "${name}" "${unit}" && cmp -s "${mark}.new" "${mark}.done"; then
            continue
        fi
        # what a killed run left behind is used again only if it had the same key
        if ! cmp -s "${mark}.new" "${mark}.started"; then
            for output in $("outputs_${name}" "${unit}"); do rm -rf "${output}"; done
        fi
        rm -f "${mark}.done"
        mv "${mark}.new" "${mark}.started"
        todo+=("${unit}")
    done
    if [ ${#todo[@]} -eq 0 ]; then
        log "stage ${n}: ${!title}: finished before, skipped"
        return
    fi
    log "stage ${n}: ${!title}"
    jobs_file=${folder}/${name}.jobs
    : > "${jobs_file}"
    for unit in "${todo[@]}"; do "stage_${name}" "${unit}"; done
    run_jobs "${!threads:-1}"
    ! defined "after_${name}" || "after_${name}"
    for unit in "${todo[@]}"; do mv "${folder}/${name}.${unit}.started" "${folder}/${name}.${unit}.done"; done
    echo "$((SECONDS - begin))" > "${folder}/${name}.seconds"
    log "stage ${n}: done in $((SECONDS - begin)) s"
}

run_stages() {
    local n=0 name
    [[ "${stage} ${stop_stage}" =~ ^[0-9]+\ [0-9]+$ ]] || { echo "$0: --stage and --stop_stage are numbers" >&2; exit 2; }
    SECONDS=0
    for name in ${stages}; do
        n=$((n + 1))
        if [ "${n}" -ge "${stage}" ] && [ "${n}" -le "${stop_stage}" ]; then run_stage "${n}" "${name}"; fi
    done
    log "finished stages ${stage} to $((stop_stage < n ? stop_stage : n)) in ${SECONDS} s"
}

check_choice() { # check_choice OPTION VALUE KNOWN...: one of the known values, or the end
    local option=$1 value=$2 known
    shift 2
    for known in "$@"; do [ "${value}" != "${known}" ] || return 0; done
    echo "$0: ${option} ${value} is unknown; known: $*" >&2
    exit 2
}
