# Options for a recipe script: "--some-name value", "--some_name value" or "--some_name=value" sets some_name.
# To be sourced after the defaults are set. The options are the assignments between the lines "# General" and
# "help_message=" of ${script} (default: $0), nothing else; a repeated option wins; a variable that is true or false
# takes only these two; --help prints ${help_message}. Leaves option_names, and command_line: how the script was called.
# shellcheck shell=bash disable=SC2034,SC2154

command_line=("$0" "$@")
option_names=$(sed -n '/^# General/,/^help_message=/ { /^help_message=/ d; s/^\([a-z_][a-z_]*\)=.*/\1/p }' "${script:-$0}")

wrong_option() { # wrong_option SENTENCE...: the end
    echo "$0: $* (see --help)" >&2
    exit 2
}

near_options() { # near_options NAME: known options that are spelt like it, or some of them
    # shellcheck disable=SC2046,SC2086
    ${python:-python3} -c 'import sys; from espnet_mpq.errors import near_matches; print(near_matches(*sys.argv[1:2], sys.argv[2:]))' \
        "$1" $(printf -- '--%s ' ${option_names}) 2> /dev/null \
        || echo "known: --${option_names//$'\n'/ --}"
}

is_option() { # is_option WORD: whether it is --NAME of a known option; sets _name
    _name=${1#--}
    _name=${_name//-/_}
    [[ $1 == --?* && ${_name} =~ ^[a-z_]+$ ]] && grep -qx -- "${_name}" <<< "${option_names}"
}

while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            printf '%s\n' "${help_message}"
            exit 0
            ;;
        --*) ;;
        *) wrong_option "unexpected argument '$1'" ;;
    esac
    _option=${1%%=*}
    is_option "${_option}" || wrong_option "unknown option ${_option}; $(near_options "${_option}")"
    if [[ $1 == *=* ]]; then
        _value=${1#*=}
        shift
    else
        [ $# -ge 2 ] || wrong_option "option $1 needs a value"
        _known=${_name}
        ! is_option "${2%%=*}" || wrong_option "option $1 needs a value, found the option $2"
        _name=${_known}
        _value=$2
        shift 2
    fi
    if [[ "${!_name}" =~ ^(true|false)$ ]] && ! [[ "${_value}" =~ ^(true|false)$ ]]; then
        wrong_option "option ${_option} takes true or false, found '${_value}'"
    fi
    printf -v "${_name}" '%s' "${_value}"
done
unset _name _known _option _value
