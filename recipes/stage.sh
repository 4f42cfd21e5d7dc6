# Sourced by the recipes, whose stages are done once.

# stage NAME FILE COMMAND...: run COMMAND unless FILE, which it writes last, is there already; it must leave it.
# $means, if set, is what this one is for
stage() {
    local name=$1 file=$2
    shift 2
    if [ -e "$file" ]; then
        echo "== $name: done before ($file)"
    else
        echo "== $name${means:+: $means}"
        "$@"
        # a trainer that was told to stop saves, and ends well
        [ -e "$file" ] || { echo "error: $name ended without $file; start the recipe again to go on" >&2; return 1; }
    fi
    means=
}

# begin RUN_DIR [--fresh]: make the directory of results; --fresh empties it first
begin() {
    local dir=$1
    shift
    case "$*" in
    "") ;;
    --fresh) rm -rf "$dir" ;;
    *) echo "error: found '$*'; $(basename "$0") takes --fresh alone" >&2; exit 1 ;;
    esac
    mkdir -p "$dir"
}
