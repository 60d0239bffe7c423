#!/usr/bin/env bash
# Train a model and write weights, sound, pictures and measurements. First run: sets up (env.sh), downloads MUSDB18.
#
#   ./train.sh                     30 epochs on 7 seconds of each MUSDB18 song (140 MB) -> models/, results/
#   MUSDB=full ./train.sh          the same on the whole songs (4.7 GB; replaces the excerpts); MUSDB=sample: these
#   ./train.sh --resume            every flag works here; --help lists them
#   EPOCHS=5 SEED=1 ./train.sh     variables are the flags in capitals; a flag wins over its variable
#   MODEL=diffusion ./train.sh     learn to say digits (16 MB of recordings) instead of giving music back
#   NPROC=2 ./train.sh             data-parallel: as many processes on this machine, one per GPU
#
# When no data set is named and the usual one can't be downloaded, or ffmpeg is missing, made-up sounds (synthetic) take
# its place, so that a first try always ends with a trained model; one that is named, by MUSDB too, never is replaced.
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$here/../env.sh"
# shellcheck source-path=SCRIPTDIR source=../torchrun.sh
source "$here/../torchrun.sh"
export FLAGS_FROM_ENVIRONMENT=1 # the script reads the variables itself; an empty one counts as not set
script=("$here/audio_gen.py" --mode train)

# Whoever names the data, resumes a run (its checkpoint knows the data) or only asks something gets just that.
named="${DATASET:-}${DATA_ROOT:-}${MUSDB_ROOT:-}" asked="${RESUME:-}${PREPARE_DATA:+--prepare_data}" status=0
[[ -z "${MUSDB:-}" || "${DATASET:-musdb}" != musdb ]] || named="" # says what to download
for word in "$@"; do
    case "$word" in
        --dataset* | --data_root* | --musdb* | --resume | --prepare_data | --mode* | --help | -h) asked="$word" ;;
    esac
done
# ffmpeg listens for keys, which would stop a job in the background: there are none
[[ -n "$named$asked" ]] || "$PYTHON" "${script[@]}" --prepare_data "$@" </dev/null || status=$?
if [[ -z "${MUSDB:-}" && "$status" == [34] ]]; then # the script's exit codes for "can't be downloaded" and "no ffmpeg"
    cat >&2 <<END
********************************************************************************
* The data set can't be used: the reason and the remedy stand in the line above.
*
* This trains on made-up sounds (--dataset synthetic) INSTEAD.
* The checkpoint and every picture will say so.
********************************************************************************
END
    export DATASET=synthetic
elif ((status != 0)); then
    exit "$status"
elif [[ -z "${MUSDB:-}$named$asked" && "$(cat "$here/data/musdb18/.downloaded" 2>/dev/null)" == sample ]]; then
    printf 'These are 7 seconds of each song. The whole songs, 4.7 GB, sound better: MUSDB=full %q\n' "$0" >&2
fi
[[ "$asked $*" == *--prepare_data* ]] || unset MUSDB # it has been heeded

((NPROC == 1)) || run_processes "${script[@]}" "$@"
exec "$PYTHON" "${script[@]}" "$@" </dev/null
