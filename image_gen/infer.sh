#!/usr/bin/env bash
# Draw images with the trained model, or with the shipped one as long as none was trained. First run: sets up (env.sh).
#
#   ./infer.sh                          16 digits -> results/final_samples.png
#   ./infer.sh --label 7                every flag works here; --help lists them
#   LABEL=7 NUM_SAMPLES=36 ./infer.sh   variables are the flags in capitals; a flag wins over its variable
#   MODEL=gan ./infer.sh                digits of the GAN
#   MODEL=gan TASK=interpolate ./infer.sh    other questions to a model go to explore.py; TASK=--help lists them
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$here/../env.sh"

export FLAGS_FROM_ENVIRONMENT=1 # the script reads the variables itself; an empty one counts as not set
if [[ "${TASK:-sample}" != sample ]]; then
    exec "$PYTHON" "$here/explore.py" "$TASK" "$@"
fi
exec "$PYTHON" "$here/image_gen.py" --mode infer "$@"
