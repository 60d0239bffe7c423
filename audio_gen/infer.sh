#!/usr/bin/env bash
# Regenerate sound with the trained model, or with the shipped one as long as none was trained. First run: sets up
# (env.sh). No data set is needed.
#
#   ./infer.sh                          the shipped example -> results/audio_reconstructed_0.wav, _1.wav, a picture
#   ./infer.sh --input song.wav         your own files -> results/song_reconstructed.wav
#   PHASE=original ./infer.sh           variables are the script's flags in capitals; these are understood:
#       MODEL CHECKPOINT PHASE SAMPLE SEED DEVICE PRECISION OUTPUT_DIR RESULTS_DIR
#   ./infer.sh --phase original         flags work as well and win over variables; --help lists them
#
# A variable that is not set, or empty, leaves the script's own default in force.
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$here/../env.sh"

env_flags MODEL CHECKPOINT PHASE SAMPLE SEED DEVICE PRECISION OUTPUT_DIR RESULTS_DIR
exec "$PYTHON" "$here/audio_gen.py" --mode infer ${FLAGS[@]+"${FLAGS[@]}"} "$@"
