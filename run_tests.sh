#!/usr/bin/env bash
# Run the tests; arguments go to pytest, e.g. ./run_tests.sh -k resume. First run: sets up (env.sh).
#
#   TEST_PROCESSES           how many run the tests (default: 2; 0: one, which also lets --pdb work)
#   MNIST_ROOT, MUSDB_ROOT   folders with the real data sets, for the tests marked real_data (skipped without them)
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$here/env.sh"
env_require requirements-dev.txt

# Offline: a test that reaches for the network fails at once, on every machine, instead of passing on some.
nowhere=http://127.0.0.1:9
export http_proxy="$nowhere" https_proxy="$nowhere" HTTP_PROXY="$nowhere" HTTPS_PROXY="$nowhere"
export no_proxy=127.0.0.1,localhost NO_PROXY=127.0.0.1,localhost
export MPLBACKEND=Agg PYTHONHASHSEED=0
# The number of threads decides the order in which floats are added: the same everywhere, and fit for a small machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-2}"

cd "$here"
# Two processes, each with whole files: what a file's tests prepare is prepared once.
exec "$PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
