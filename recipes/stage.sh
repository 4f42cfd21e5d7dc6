# Sourced by the recipes, whose stages are done once.

# stage NAME FILE COMMAND...: run COMMAND unless FILE, which it writes last, is there already
stage() {
    local name=$1 file=$2
    shift 2
    if [ -e "$file" ]; then
        echo "== $name: done before ($file)"
    else
        echo "== $name"
        "$@"
    fi
}
