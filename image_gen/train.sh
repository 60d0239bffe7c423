#!/usr/bin/env bash
# Train a model and write weights, pictures and measurements. First run: sets up (env.sh), downloads MNIST.
#
#   ./train.sh                          20 epochs on MNIST -> models/, results/
#   EPOCHS=5 SEED=1 ./train.sh          variables are the script's flags in capitals; these are understood:
#       MODEL EPOCHS BATCH_SIZE LEARNING_RATE SEED DATASET DATA_ROOT IMAGE_SIZE CHECKPOINT RESULTS_DIR DEVICE PRECISION
#       OBJECTIVE SCHEDULE NUM_SAMPLES SAMPLE_BATCH LABEL SAMPLER STEPS GUIDANCE EVAL_SAMPLES FID_FEATURES
#       LIKELIHOOD NETWORK LATENT_DIM BETA GAN_LOSS WIDTH
#   NPROC=2 ./train.sh                  data-parallel: as many processes on this machine, one per GPU
#   ./train.sh --resume                 flags work as well and win over variables; --help lists them
#
# A variable that is not set, or empty, leaves the script's own default in force. When no data set is named and MNIST
# can't be downloaded, the 1,797 digits that come with scikit-learn take its place, so that a first try always ends with
# a trained model; a data set that is named is never replaced.
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
data="${DATASET:-}${DATA_ROOT:-}"
for argument in "$@"; do
    case "$argument" in
        --dataset* | --data_root* | --resume | --prepare_data | --mode* | --help | -h) data="$argument" ;;
    esac
done
if [[ -z "$data" ]]; then
    status=0
    # stdout stays visible (what is downloaded, and where to); stderr is kept: it holds the reason
    {
        reason="$("$PYTHON" "$here/image_gen.py" --mode train --prepare_data --dataset mnist 2>&1 >&3)" || status=$?
    } 3>&1
    if ((status == 3)); then # the script's exit code for "can't be downloaded", and for nothing else
        reason="${reason##*$'\n'}"
        cat >&2 <<END
********************************************************************************
* MNIST can't be reached. The reason:
* ${reason#error: }
*
* This trains on the 1,797 digits (8x8 pixels) embedded in scikit-learn INSTEAD.
* The checkpoint and every picture will say so.
********************************************************************************
END
        DATASET=digits
        EPOCHS="${EPOCHS:-150}" # an epoch is 42 times shorter than one of MNIST
    else
        [[ -z "$reason" ]] || printf '%s\n' "$reason" >&2
        ((status == 0)) || exit "$status"
    fi
fi

env_flags MODEL EPOCHS BATCH_SIZE LEARNING_RATE SEED DATASET DATA_ROOT IMAGE_SIZE CHECKPOINT RESULTS_DIR DEVICE \
    PRECISION OBJECTIVE SCHEDULE NUM_SAMPLES SAMPLE_BATCH LABEL SAMPLER STEPS GUIDANCE EVAL_SAMPLES FID_FEATURES \
    LIKELIHOOD NETWORK LATENT_DIM BETA GAN_LOSS WIDTH
start=("$PYTHON")
if ((NPROC > 1)); then
    start+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")
    # torchrun would give each process one thread; they share the cores evenly instead
    cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}"
fi
exec "${start[@]}" "$here/image_gen.py" --mode train ${FLAGS[@]+"${FLAGS[@]}"} "$@"
