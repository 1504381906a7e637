# Runs the stages of a recipe: skips what is finished, goes on where a killed run stopped. To be sourced after parse_options.sh.
#
# The recipe sets stage, stop_stage, nj, python, marks and stages (names, in order), and for each stage NAME:
#   title_NAME          what it does
#   inputs_NAME UNIT    prints the files whose contents decide whether it has to run
#   options_NAME UNIT   prints what else decides (may be missing)
#   outputs_NAME UNIT   prints what it writes (may be missing: the stage runs every time)
#   stage_NAME UNIT     notes commands with job, or does the work
#   after_NAME          prints results once the jobs have succeeded (may be missing)
#   units_NAME          parts that are finished, skipped and repeated each for itself (default: one)
#   threads_NAME        threads of a job (default: 1)
#   marks_NAME          folder of the marks (default: ${marks}); one run at a time works on what is marked in a folder
# Names of files and units hold no white space. force=true repeats finished parts, force=false never does; without it
# they are repeated if one stage is named alone. Of a part, NAME.UNIT.started holds what it depends on while it runs,
# NAME.UNIT.done once it is finished.
# shellcheck shell=bash disable=SC2153,SC2154

log() { echo "$(date '+%H:%M:%S') $*"; }

die() { # die SENTENCE...
    echo "$0: error: $*" >&2
    exit 1
}

defined() { declare -F "$1" > /dev/null; }

current= # number of the stage that runs
say_how_to_repeat() {
    local status=$? words=() i
    [ "${status}" -ne 0 ] && [ -n "${current}" ] || return 0
    for ((i = 0; i < ${#command_line[@]}; i++)); do
        case ${command_line[i]} in
            --stage | --stop_stage | --stop-stage) i=$((i + 1)) ;;
            --stage=* | --stop_stage=* | --stop-stage=*) ;;
            *) words+=("${command_line[i]}") ;;
        esac
    done
    echo "stage ${current} did not finish; this repeats it alone: $(printf '%q ' "${words[@]}")--stage ${current} --stop_stage ${current}" >&2
}
trap say_how_to_repeat EXIT

declare -A held=()
hold() { # hold FOLDER: keep other runs from what is marked there until this run and all its jobs have ended
    local fd holder status=0
    [ -z "${held[$1]:-}" ] || return 0
    mkdir -p "$1"
    exec {fd}>> "$1/lock"
    # A few seconds: the jobs of a run that was just killed are still going. Where there are no locks, none is held.
    ! command -v flock > /dev/null || flock -E 100 -w 3 "${fd}" || status=$?
    if [ "${status}" -eq 100 ]; then
        holder=$(tail -n 1 "$1/lock")
        die "another run${holder:+ (process ${holder})} is at work here, see $1; wait until it has ended"
    fi
    echo "$$" > "$1/lock"
    held[$1]=${fd}
}

jobs_file=
job() { # job LOG MODULE ARGUMENTS...: note a command for run_jobs; with ${job_cmd} (run.pl, queue.pl ...) run it by that
    local word log=$1 command
    if [ -n "${job_cmd:-}" ]; then
        command=(-m "${@:2}")
        case $2 in espnet_mpq.*) ;; *) command=(-m espnet_mpq "${command[@]}") ;; esac
        mkdir -p "$(dirname "${log}")"
        # shellcheck disable=SC2086
        ${job_cmd} "${log}" ${python} "${command[@]}" || {
            tail -n 20 ${log//JOB/*} >&2
            die "$2 failed; log: ${log}"
        }
        return
    fi
    {
        for word in "$@"; do printf '%q ' "${word}"; done
        echo
    } >> "${jobs_file}"
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

key_of() { # key_of N NAME UNIT: what this part of a stage depends on
    local file
    ! defined "options_$2" || "options_$2" "$3" || return 1
    defined "inputs_$2" || return 0
    for file in $("inputs_$2" "$3"); do
        if [ ! -f "${file}" ]; then
            echo "$0: error: stage $1 needs ${file}, which does not exist: run the stages before it first" >&2
            return 1
        fi
        sha256sum "${file}" || return 1
    done
}

lost_output() { # lost_output NAME UNIT: the first output that is not there or empty; fails if there is none
    local output
    for output in $("outputs_$1" "$2"); do
        [ -s "${output}" ] || { echo "${output}"; return 0; }
    done
    return 1
}

mark_of() { echo "${folder}/${name}.${1//\//_}"; }

marked() { # marked UNIT started|done: whether the mark is there and stands for what the unit depends on now
    local mark
    mark=$(mark_of "$1").$2
    [ -f "${mark}" ] && [ "${keys[$1]}" = "$(cat "${mark}")" ]
}

find_todo() { # find_todo: of stage ${n} ${name}, the parts that have to run and what they depend on -> todo, keys
    local unit units=units_${name} all=()
    todo=()
    for unit in ${!units:--}; do
        keys[${unit}]=$(key_of "${n}" "${name}" "${unit}") || exit 1
        all+=("${unit}")
        if ! defined "outputs_${name}" || [ "${force:-}" = true ] || lost_output "${name}" "${unit}" > /dev/null \
            || ! marked "${unit}" "done"; then
            todo+=("${unit}")
        fi
    done
    # what is named alone runs again; what is left of it comes first
    if [ ${#todo[@]} -eq 0 ] && [ -z "${force:-}" ] && [ "${stage}" = "${stop_stage}" ]; then todo=("${all[@]}"); fi
}

begin_unit() { # begin_unit UNIT: what a killed run left behind is used again only if it depended on the same
    local mark output
    mark=$(mark_of "$1")
    defined "outputs_${name}" || return 0
    if ! marked "$1" started; then
        # the marks first: half of what they stand for is none of it
        rm -f "${mark}.done" "${mark}.started"
        for output in $("outputs_${name}" "$1"); do rm -rf "${output}"; done
        echo "${keys[$1]}" > "${mark}.new"
        mv "${mark}.new" "${mark}.started"
    fi
    rm -f "${mark}.done"
}

end_unit() { # end_unit UNIT: it is finished, if it made what it should
    local lost mark
    mark=$(mark_of "$1")
    defined "outputs_${name}" || return 0
    ! lost=$(lost_output "${name}" "$1") || die "stage ${n} (${name}) did not make ${lost}"
    mv "${mark}.started" "${mark}.done"
}

run_stage() { # run_stage N NAME
    local n=$1 name=$2 folder=marks_$2 threads=threads_$2 title=title_$2 unit begin=${SECONDS} todo=() noted=()
    local -A keys=()
    folder=${!folder:-${marks}}
    find_todo
    if [ ${#todo[@]} -eq 0 ]; then
        log "stage ${n}: ${!title}: finished before, skipped"
        return
    fi
    if [ -z "${held[${folder}]:-}" ]; then
        hold_all "${n}"
        find_todo # another run may have finished it just now
    fi
    current=${n}
    log "stage ${n}: ${!title}"
    jobs_file=${folder}/${name}.jobs
    : > "${jobs_file}"
    for unit in "${todo[@]}"; do begin_unit "${unit}"; done
    for unit in "${todo[@]}"; do
        "stage_${name}" "${unit}"
        if [ -s "${jobs_file}" ]; then noted+=("${unit}"); else end_unit "${unit}"; fi
    done
    run_jobs "${!threads:-1}"
    for unit in "${noted[@]}"; do end_unit "${unit}"; done
    ! defined "after_${name}" || "after_${name}"
    echo "$((SECONDS - begin))" > "${folder}/${name}.seconds"
    log "stage ${n}: done in $((SECONDS - begin)) s"
    current=
}

hold_all() { # hold_all N: hold the folders of all stages from N on, before a job is started that could outlive this run
    local i=0 name folder
    for name in ${stages}; do
        i=$((i + 1))
        folder=marks_${name}
        if [ "${i}" -ge "$1" ] && [ "${i}" -le "${stop_stage}" ]; then hold "${!folder:-${marks}}"; fi
    done
}

run_stages() {
    local n=0 name n_stages
    n_stages=$(wc -w <<< "${stages}")
    [[ "${stage} ${stop_stage}" =~ ^[0-9]+\ [0-9]+$ ]] || wrong_option "--stage and --stop_stage are numbers, found '${stage}' and '${stop_stage}'"
    [ "${stage}" -le "${n_stages}" ] || wrong_option "--stage ${stage}: there are ${n_stages} stages"
    [ "${stage}" -le "${stop_stage}" ] || wrong_option "--stage ${stage} comes after --stop_stage ${stop_stage}"
    SECONDS=0
    for name in ${stages}; do
        n=$((n + 1))
        if [ "${n}" -ge "${stage}" ] && [ "${n}" -le "${stop_stage}" ]; then run_stage "${n}" "${name}"; fi
    done
    log "finished stages ${stage} to $((stop_stage < n ? stop_stage : n)) in ${SECONDS} s"
}

option_words=()
check_options() { # check_options NAME=VALUE...: check all options of the script, before its first stage (recipe/check.py)
    local checked name
    # a second call checks what was given, not what followed from it
    if [ ${#option_words[@]} -eq 0 ]; then for name in ${option_names}; do option_words+=("${name}=${!name}"); done; fi
    checked=$(${python} -m espnet_mpq.recipe.check "script=$0" "${option_words[@]}" "$@") || exit 2
    eval "${checked}"
}

check_choice() { # check_choice OPTION VALUE KNOWN...: one of the known values, or the end
    local option=$1 value=$2 known
    shift 2
    for known in "$@"; do [ "${value}" != "${known}" ] || return 0; done
    wrong_option "${option} ${value} is unknown; known: $*"
}
