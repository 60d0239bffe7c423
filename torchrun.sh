#!/usr/bin/env bash
# Sourced by both train.sh, after env.sh: checks $NPROC, the number of processes (default: 1), and defines
# `run_processes SCRIPT FLAGS...`, which runs a script of this project with torchrun in so many, and exits.
#
# What torchrun itself does not: the script's one-line error comes last, below the pages that torchrun prints, and the
# exit status is the script's. Both come in the file that $ERROR_FILE names. A stop signal is passed on, once.

if [[ ! "${NPROC:=1}" =~ ^[1-9][0-9]*$ ]]; then
    printf 'error: NPROC=%s is not a number of processes: give 1 or more\n' "$NPROC" >&2
    exit 2
fi

run_processes() {
    local cores status stopped="" code="" text=""
    cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
    # torchrun would give each process one thread; they share the cores evenly instead
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}"
    ERROR_FILE="$(mktemp)"
    export ERROR_FILE
    set -m # in a process group of its own, Ctrl-C reaches it only from here
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" "$@" </dev/null &
    trap 'stopped=129; kill -HUP $!' HUP
    trap 'stopped=130; kill -INT $!' INT
    trap 'stopped=143; kill -TERM $!' TERM
    while status=0; wait $! || status=$?; kill -0 $! 2>/dev/null; do
        : # a signal ended the waiting, not the training
    done
    read -r code text <"$ERROR_FILE" && printf 'error: %s\n' "$text" >&2
    rm -f "$ERROR_FILE"
    ((status == 0)) || status="${code:-${stopped:-$status}}"
    exit "$status"
}
