# Sourced by scripts: on -h or --help, prints the comment at the top of the script and exits.
case ${1:-} in
    -h | --help)
        sed -n '1,/^[^#]/{/^#!/d;s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
esac
