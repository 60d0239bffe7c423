#!/usr/bin/env bash
# Train a model and write weights, pictures and measurements. First run: sets up (env.sh), downloads MNIST.
#
#   ./train.sh                     2 epochs on MNIST -> models/, results/
#   ./train.sh --resume            every flag works here; --help lists them
#   EPOCHS=5 SEED=1 ./train.sh     variables are the flags in capitals; a flag wins over its variable
#   NPROC=2 ./train.sh             data-parallel: as many processes on this machine, one per GPU
#
# When no data set is named and MNIST can't be downloaded, the 1,797 digits that come with scikit-learn take its place,
# so that a first try always ends with a trained model; a data set that is named is never replaced.
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$here/../env.sh"
# shellcheck source-path=SCRIPTDIR source=../torchrun.sh
source "$here/../torchrun.sh"
export FLAGS_FROM_ENVIRONMENT=1 # the script reads the variables itself; an empty one counts as not set
script=("$here/image_gen.py" --mode train)

# Whoever names the data, resumes a run (its checkpoint knows the data) or only asks something gets just that.
named="${DATASET:-}${DATA_ROOT:-}${RESUME:-}${PREPARE_DATA:-}" status=0
for word in "$@"; do
    case "$word" in --dataset* | --data_root* | --resume | --prepare_data | --mode* | --help | -h) named="$word" ;; esac
done
[[ -n "$named" ]] || "$PYTHON" "${script[@]}" --prepare_data --dataset mnist "$@" || status=$?
if ((status == 3)); then # the script's exit code for "can't be downloaded", and for nothing else
    cat >&2 <<END
********************************************************************************
* MNIST can't be reached: the reason stands in the line above.
*
* This trains on the 1,797 digits (8x8 pixels) embedded in scikit-learn INSTEAD.
* The checkpoint and every picture will say so.
********************************************************************************
END
    export DATASET=digits EPOCHS="${EPOCHS:-150}" # an epoch is 42 times shorter than one of MNIST
elif ((status != 0)); then
    exit "$status"
fi

((NPROC == 1)) || run_processes "${script[@]}" "$@"
exec "$PYTHON" "${script[@]}" "$@"
