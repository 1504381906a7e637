# Options for a recipe script: "--some-name value" or "--some_name value" sets the variable some_name.
# To be sourced after the defaults are set. Only names that have a default are known; a repeated option wins;
# a variable that is true or false takes only these two; --help prints ${help_message}.

while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            printf '%s\n' "${help_message}"
            exit 0
            ;;
        --*)
            _name="${1#--}"
            _name="${_name//-/_}"
            if [ -z "${!_name+set}" ]; then
                echo "$0: unknown option $1 (see --help)" >&2
                exit 2
            fi
            if [ $# -lt 2 ]; then
                echo "$0: option $1 needs a value" >&2
                exit 2
            fi
            if [[ "${!_name}" =~ ^(true|false)$ ]] && ! [[ "$2" =~ ^(true|false)$ ]]; then
                echo "$0: option $1 takes true or false, found '$2'" >&2
                exit 2
            fi
            printf -v "${_name}" '%s' "$2"
            shift 2
            ;;
        *)
            echo "$0: unexpected argument '$1' (see --help)" >&2
            exit 2
            ;;
    esac
done
unset _name
