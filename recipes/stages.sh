# Sourced by the recipes of several seeds: what they have in common.
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

# A small model is fastest on one thread, and threads that wait for each other must not spin.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE

# many SCRIPT FLAGS: on NPROC tensor-parallel processes
many() {
    if [ "$NPROC" -gt 1 ]; then torchrun --standalone --nproc_per_node "$NPROC" "$@"; else python "$@"; fi
}
