# What scripts read with "source": -h or --help prints the comment that they begin with, and nothing else happens.
case ${1:-} in
    -h | --help)
        sed -n '1,/^[^#]/{/^#!/d;s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
esac
