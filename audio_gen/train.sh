#!/usr/bin/env bash
# Train a model and write weights, sound, pictures and measurements. First run: sets up (env.sh), downloads MUSDB18.
#
#   ./train.sh                          30 epochs on 7 seconds of each MUSDB18 song (140 MB) -> models/, results/
#   MUSDB=full ./train.sh               the same on the whole songs (4.7 GB; replaces the excerpts); MUSDB=sample: these
#   EPOCHS=5 SEED=1 ./train.sh          variables are the script's flags in capitals; these are understood:
#       MODEL EPOCHS CROPS BATCH_SIZE LEARNING_RATE SEED DATASET MUSDB_ROOT STEM DATA_ROOT EXTRA_ROOT NUM_SAMPLES
#       CHECKPOINT RESULTS_DIR DEVICE PRECISION N_MELS WIDTH LATENT_DIM LATENT_FRAMES BETA
#   NPROC=2 ./train.sh                  data-parallel: as many processes on this machine, one per GPU
#   ./train.sh --resume                 flags work as well and win over variables; --help lists them
#
# A variable that is not set, or empty, leaves the script's own default in force. When no data set is named and MUSDB18
# can't be downloaded, or ffmpeg is missing, made-up sounds (--dataset synthetic) take its place, so that a first try
# always ends with a trained model; a data set that is named, by MUSDB too, is never replaced.
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$here/../env.sh"

NPROC="${NPROC:-1}"
if [[ ! "$NPROC" =~ ^[1-9][0-9]*$ ]]; then
    printf 'error: NPROC=%s is not a number of processes: give 1 or more\n' "$NPROC" >&2
    exit 2
fi

# Whoever names the data, resumes a run (its checkpoint knows the data) or only asks something gets just that.
data="${DATASET:-}${DATA_ROOT:-}${MUSDB_ROOT:-}" asked=""
for argument in "$@"; do
    case "$argument" in
        --dataset* | --data_root* | --musdb* | --resume | --prepare_data | --mode* | --help | -h) asked="$argument" ;;
    esac
done
if [[ -z "$asked" && ( -z "$data" || ( -n "${MUSDB:-}" && "${DATASET:-musdb}" == musdb ) ) ]]; then
    status=0
    env_flags MUSDB MUSDB_ROOT STEM
    # ffmpeg listens for keys, which would stop a job in the background: there are none
    "$PYTHON" "$here/audio_gen.py" --mode train --prepare_data --dataset musdb ${FLAGS[@]+"${FLAGS[@]}"} </dev/null \
        || status=$?
    # the script's exit codes for "can't be downloaded" and "no ffmpeg", and for nothing else
    if [[ -z "${MUSDB:-}" ]] && ((status == 3 || status == 4)); then
        cat >&2 <<END_OF_BOX
********************************************************************************
* MUSDB18 can't be used: the reason and the remedy stand in the line above.
*
* This trains on made-up sounds (--dataset synthetic) INSTEAD.
* The checkpoint and every picture will say so.
********************************************************************************
END_OF_BOX
        DATASET=synthetic
    elif ((status != 0)); then
        exit "$status"
    elif [[ -z "${MUSDB:-}" && "$(cat "$here/data/musdb18/.downloaded" 2>/dev/null)" == sample ]]; then
        printf 'These are 7 seconds of each song. The whole songs, 4.7 GB, sound better: MUSDB=full %q\n' "$0" >&2
    fi
fi

env_flags MODEL EPOCHS CROPS BATCH_SIZE LEARNING_RATE SEED DATASET MUSDB_ROOT STEM DATA_ROOT EXTRA_ROOT NUM_SAMPLES \
    CHECKPOINT RESULTS_DIR DEVICE PRECISION N_MELS WIDTH LATENT_DIM LATENT_FRAMES BETA
start=("$PYTHON")
if ((NPROC > 1)); then
    start+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")
    # torchrun would give each process one thread; they share the cores evenly instead
    cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}"
fi
exec "${start[@]}" "$here/audio_gen.py" --mode train ${FLAGS[@]+"${FLAGS[@]}"} "$@" </dev/null
