#!/usr/bin/env bash
# Sourced by every wrapper: afterwards $PYTHON is an interpreter that has all of requirements.txt.
#
# It belongs to the active virtual environment ($VIRTUAL_ENV), else to .venv beside this file, which is created when
# missing. Packages are installed once: a copy of the requirements file in the environment ("stamp") says what is there,
# so that a later run only compares two small files. To start anew, delete .venv.
#
#   TORCH_INDEX_URL   where torch, torchvision and torchaudio come from (default: PyPI, on Linux with CUDA);
#                     https://download.pytorch.org/whl/cpu has the small wheels, for machines without NVIDIA GPU
#
# All messages go to stderr: stdout belongs to the script that is started afterwards. Works with macOS's bash 3.2.

env_root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
env_venv="${VIRTUAL_ENV:-$env_root/.venv}"
PYTHON="$env_venv/bin/python"

# Only called in sub-shells, so that `source env.sh` by hand never closes the user's terminal.
env_fail() { printf 'error: %s\n' "$1" >&2 && exit 1; }

# -I -S: a few milliseconds, nothing of the environment is read
env_starts() { "$PYTHON" -ISc 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; }

env_stamped() { cmp -s "$env_root/$1" "$env_venv/.installed-$1" && env_starts; }

env_pip() {
    "$PYTHON" -m pip install --no-input --disable-pip-version-check "$@" >&2 \
        || env_fail "pip failed (its reason stands above): check network and disk space, then run this again"
}

# Print a Python on the PATH that can build the environment.
env_base() {
    local name found apt="Debian, Ubuntu: sudo apt-get install"
    local why="no python3 on the PATH: install Python 3.10 to 3.14 ($apt python3-venv)"
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do # Debian packs both modules apart
        found="$("$name" -c 'import sys; from importlib.util import find_spec as has
print("%d.%d" % sys.version_info[:2], bool(has("venv") and has("ensurepip")))' 2>/dev/null)" || continue
        case "$found" in
            3.1[0-4]' True') printf '%s\n' "$name" && return ;;
            3.1[0-4]*) why="Python ${found% *} has no venv module: install it ($apt python${found% *}-venv)" ;;
            *) why="$name is Python ${found% *}, PyTorch here needs 3.10 to 3.14: install one of these beside it" ;;
        esac
    done
    env_fail "$why"
}

# Bring what the file $1 asks for into the environment. Runs in a sub-shell (round brackets): `exit` ends only this.
env_install() (
    file="$env_root/$1" size="" index="${TORCH_INDEX_URL:-}"
    trap 'exit 130' INT
    mkdir -p "$env_venv" 2>/dev/null \
        || env_fail "can't create $env_venv: use a folder you may write to, or activate your own environment"
    if command -v flock >/dev/null && exec 9<"$env_venv" && ! flock -n 9; then # one installs, the other waits
        printf 'Another process is setting up %s: waiting for it\n' "$env_venv" >&2
        if flock 9 && env_stamped "$1"; then exit 0; fi
    fi
    if [[ -z "$(ls -A "$env_venv")" ]]; then
        base="$(env_base)" || exit 1
        printf 'Creating %s with %s\n' "$env_venv" "$("$base" --version)" >&2
        "$base" -m venv "$env_venv" >&2 || env_fail "$base could not build it (see above): delete $env_venv, try again"
    fi
    env_starts || env_fail "$env_venv has no Python 3.10 to 3.14 that starts: delete it or activate another environment"
    # tools other than venv leave pip out, and so does a creation that was interrupted
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip --upgrade >&2 \
        || env_fail "$env_venv has no pip: install $1 with the tool that made it, then run this again"
    if ! PIP_CONFIG_FILE=/dev/null "$PYTHON" -m pip --isolated install --no-index -r "$file" >/dev/null 2>&1; then
        if [[ "$1" == requirements.txt ]]; then
            [[ "$(uname)" != Linux || "$index" == */cpu ]] || size="5.4 GB (2.8 GB to download); without NVIDIA GPU \
stop, 'export TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu' and start again: "
            printf 'Setting up %s, once. Size on disk: up to %s1.3 GB (0.3 GB to download)\n' "$env_venv" "$size" >&2
            [[ -z "$index" ]] || env_pip --index-url "$index" -r <(grep -E '^torch(vision|audio)?[=<>~!]' "$file")
        fi
        env_pip -r "$file"
    fi # else all of it is there already
    cp "$file" "$env_venv/.installed-$1" 2>/dev/null || true # one that is read-only is examined at each start
)

env_require() { env_stamped "$1" || env_install "$1"; }
# shellcheck disable=SC2317 # `exit` is for ./env.sh, run instead of sourced: it sets up and does nothing else
env_require requirements.txt || { env_status=$?; return "$env_status" 2>/dev/null || exit "$env_status"; }
