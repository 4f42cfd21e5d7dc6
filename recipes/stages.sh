# Sourced by the recipes of several seeds: what they have in common.
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

# A small model is fastest on one thread, and threads that wait for each other must not spin.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE

# many SCRIPT FLAGS: on NPROC processes, in groups of as many as the checkpoint has shards if that divides them
many() {
    if [ "$NPROC" -gt 1 ]; then torchrun --standalone --nproc_per_node "$NPROC" "$@"; else python "$@"; fi
}

# at_once JOB...: functions of the recipe with their arguments, JOBS of them at a time, each in a shell of its own
at_once() { printf '%s\n' "$@" | xargs -L 1 -P "$JOBS" bash "recipes/$(basename "$0")" --job; }

# for_each_seed JOB: the same of all SEEDS
for_each_seed() {
    local seed jobs=()
    for seed in $SEEDS; do jobs+=("$1 $seed"); done
    at_once "${jobs[@]}"
}

# started_as_job ARGUMENTS: do that job and end, if the recipe was started by at_once
started_as_job() {
    [ "${1:-}" = "--job" ] || return 0
    shift
    job=$*
    # 255: xargs starts no further job
    trap '[ $? -eq 0 ] || { echo "error: $job did not end well; what is finished stays, start the recipe again" >&2; exit 255; }' EXIT
    "$@"
    exit
}
