#!/usr/bin/env bash
# Open the studio in the browser: http://127.0.0.1:7860. First run: sets up (env.sh), and gradio beside it.
#
#   ./studio.sh --port 8000 --no-browser                       every flag works here; --help lists them
#   STUDIO_AUTH=name:password ./studio.sh --host 0.0.0.0       for other machines as well; variables are STUDIO_ and
#                                                              the flag in capitals, name and password only a variable
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../env.sh
source "$here/../env.sh"
env_stamped requirements-studio.txt || printf 'The studio needs gradio, once: 0.3 GB (80 MB to download)\n' >&2
env_require requirements-studio.txt

exec "$PYTHON" "$here/studio.py" "$@"
