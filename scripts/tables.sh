# Sourced by the scripts of tables and figures: prints help, or sets up .venv and starts tables.py.
set -euo pipefail
folder=$(dirname "$0")
case ${1:-} in
    -h | --help | "")
        sed -n '1,/^[^#]/{/^#!/d;s/^# \{0,1\}//p}' "$0"
        sed -n '1,/^"""$/{s/^"""//;p}' "$folder/tables.py"
        [ -z "${1:-}" ] || exit 0
        echo "error: the folder of the data is missing" >&2
        exit 2
        ;;
esac
QUIET=1 bash "$folder/setup.sh"
exec "$(realpath -s "$folder/../.venv/bin/python")" "$folder/tables.py" "$(basename "$0" .sh)" "$@"
