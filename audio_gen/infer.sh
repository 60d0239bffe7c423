#!/usr/bin/env bash
# Regenerate sound with the trained model, or with the shipped one as long as none was trained. First run: sets up
# (env.sh). No data set is needed.
#
#   ./infer.sh                          the shipped examples -> results/NAME.iag, NAME_reconstructed.wav, a picture
#   ./infer.sh --input song.wav         your own files -> results/song_reconstructed.wav; --help lists all flags
#   INPUT=song.wav MODEL=vae ./infer.sh         variables are the flags in capitals; a flag wins over its variable
#   TASK=interpolate ./infer.sh         other questions to a model go to explore.py; TASK=--help lists them
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$here/../env.sh"

export FLAGS_FROM_ENVIRONMENT=1 # the script reads the variables itself; an empty one counts as not set
if [[ "${TASK:-sample}" != sample ]]; then
    exec "$PYTHON" "$here/explore.py" "$TASK" "$@"
fi
exec "$PYTHON" "$here/audio_gen.py" --mode infer "$@"
