#!/usr/bin/env bash
# Draw images with the trained model, or with the shipped one as long as none was trained. First run: sets up (env.sh).
#
#   ./infer.sh                          16 digits -> results/final_samples.png
#   LABEL=7 NUM_SAMPLES=36 ./infer.sh   variables are the script's flags in capitals; these are understood:
#       MODEL TASK DATASET DATA_ROOT OOD_ROOT FRAMES NUM_SAMPLES SAMPLE_BATCH LABEL SEED SAMPLER STEPS GUIDANCE CHECKPOINT
#       DEVICE PRECISION OUTPUT_DIR RESULTS_DIR
#   MODEL=gan ./infer.sh                digits of the GAN
#   MODEL=gan TASK=interpolate ./infer.sh                      tasks beside drawing are listed by --help and the README
#   ./infer.sh --label 7                flags work as well and win over variables; --help lists them
#
# A variable that is not set, or empty, leaves the script's own default in force.
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$here/../env.sh"

env_flags MODEL TASK DATASET DATA_ROOT OOD_ROOT FRAMES NUM_SAMPLES SAMPLE_BATCH LABEL SEED SAMPLER STEPS GUIDANCE \
    CHECKPOINT DEVICE PRECISION OUTPUT_DIR RESULTS_DIR
exec "$PYTHON" "$here/image_gen.py" --mode infer ${FLAGS[@]+"${FLAGS[@]}"} "$@"
