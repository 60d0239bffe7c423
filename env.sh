#!/usr/bin/env bash
# Sourced by every wrapper: afterwards $PYTHON is an interpreter that has all of requirements.txt.
#
# It belongs to the active virtual environment ($VIRTUAL_ENV), else to .venv beside this file, which is created when
# missing. Packages are installed once: a copy of the requirements file inside the environment records what is there
# ("stamp"), so that a later run only compares two small files. To start anew, delete .venv.
#
#   TORCH_INDEX_URL   where torch, torchvision and torchaudio come from (default: PyPI, on Linux with CUDA);
#                     https://download.pytorch.org/whl/cpu has the small wheels, for machines without NVIDIA GPU
#
# All messages go to stderr: stdout belongs to the script that is started afterwards. Works with macOS's bash 3.2.

env_root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
env_venv="${VIRTUAL_ENV:-$env_root/.venv}"
PYTHON="$env_venv/bin/python"

# Only called in sub-shells, so that `source env.sh` by hand never closes the user's terminal.
env_fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# Make FLAGS hold --name=value for each of the variables NAME... that is set and not empty. A variable that is not set
# passes nothing: the script then knows that the user did not choose, and its own default holds.
env_flags() {
    local name
    FLAGS=()
    for name in "$@"; do
        if [[ -n "${!name:-}" ]]; then
            FLAGS+=("--$(tr '[:upper:]' '[:lower:]' <<<"$name")=${!name}")
        fi
    done
}

# Does $PYTHON run at all? (-I -S: a few milliseconds, nothing of the environment is read)
env_starts() {
    "$PYTHON" -ISc '' 2>/dev/null
}

env_stamped() {
    cmp -s "$env_root/$1" "$env_venv/.installed-$1" && env_starts
}

# Print a Python on the PATH that can build the environment.
env_base_python() {
    local name version seen="" bare=""
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        version="$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
        seen="${seen:-$version}"
        [[ "$version" =~ ^3\.1[0-4]$ ]] || continue
        # Debian ships both modules as a package of their own
        if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
        bare="${bare:-$version}"
    done
    if [[ -n "$bare" ]]; then
        env_fail "Python $bare has no venv module: install it (Debian, Ubuntu: sudo apt-get install python$bare-venv)"
    elif [[ -n "$seen" ]]; then
        env_fail "python3 is Python $seen, PyTorch here needs 3.10 to 3.14: install one of these beside it"
    fi
    env_fail "no python3 on the PATH: install Python 3.10 to 3.14 (Debian, Ubuntu: sudo apt-get install python3-venv)"
}

# Build $env_venv, also over the remains of a creation that was interrupted.
env_create() {
    local base
    if compgen -G "$env_venv/.installed-*" >/dev/null; then
        env_fail "$PYTHON no longer starts (was its Python removed?): delete $env_venv and run this again"
    elif [[ ! -e "$env_venv/pyvenv.cfg" && -n "$(ls -A "$env_venv")" ]]; then
        env_fail "$env_venv is not a virtual environment: move it away and run this again"
    fi
    base="$(env_base_python)" || exit 1
    printf 'Creating %s with %s\n' "$env_venv" "$("$base" --version)" >&2
    "$base" -m venv --clear "$env_venv" >&2 \
        || env_fail "$base could not build $env_venv (see above): free some disk space or activate your own environment"
}

# Print each requirement of the file $1, and of what it requires in turn, that the environment does not meet.
env_unmet() {
    "$PYTHON" - "$1" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, distribution

try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        Requirement = None


def unmet(requirement, extra, seen):
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        return
    try:
        found = distribution(requirement.name)
    except PackageNotFoundError:
        yield str(requirement)
        return
    if not requirement.specifier.contains(found.version, prereleases=True):
        yield f"{requirement} (here: {found.version})"
        return
    for extra in ("", *requirement.extras):
        if (requirement.name, extra) not in seen:
            seen.add((requirement.name, extra))
            for line in found.requires or []:
                yield from unmet(Requirement(line), extra, seen)


with open(sys.argv[1]) as file:
    lines = [line.split("#")[0].strip() for line in file]
seen = set()
for line in filter(None, lines):
    for text in unmet(Requirement(line), "", seen) if Requirement else [line]:
        print(text)
PY
}

# Say what is about to happen and make sure that it fits on the disk. $1: the requirements that are not met.
env_announce() {
    local size="at most a few hundred MB" keep=1 load=0 temporary="${TMPDIR:-/tmp}" here there
    printf 'Setting up %s, once: later runs start at once.\nTo install: %s\n' "$env_venv" "${1//$'\n'/, }" >&2
    if grep -Eq '^torch([^a-z-]|$)' <<<"$1"; then
        if [[ "$(uname -s)" == Linux && "${TORCH_INDEX_URL:-}" != */cpu ]]; then
            size="about 5.4 GB (2.8 GB to download)" keep=6 load=3
            printf 'No NVIDIA GPU? Stop this and take the CPU wheels, about 1.3 GB (0.3 GB to download): %s\n' \
                'export TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu' >&2
        else
            size="about 1.3 GB (0.3 GB to download)" keep=2 load=1
        fi
    fi
    printf 'Size on disk, dependencies included: %s\n' "$size" >&2
    # pip keeps its downloads in the temporary folder until all of them are unpacked; that may be the same disk
    { read -r _ && read -r here && read -r there; } < <(df -Pk "$env_venv" "$temporary" 2>/dev/null) || return 0
    if [[ "$here" == "$there" ]]; then
        keep=$((keep + load)) load=0
    fi
    env_room "$env_venv" "$here" "$keep" "free some disk space, or take the CPU wheels"
    env_room "$temporary" "$there" "$load" "free some disk space there, or set TMPDIR to another folder"
}

# Stop with the remedy $4 if the folder $1, of which df prints the line $2, has not $3 GB free.
env_room() {
    local free
    free="$(awk '{ print int($4 / 1000000) }' <<<"$2")"
    ((free >= $3)) || env_fail "$1 is on a disk with $free GB free, and installing needs $3 GB: $4"
}

env_pip() {
    "$PYTHON" -m pip install --no-input --disable-pip-version-check "$@" >&2 \
        || env_fail "pip failed (its reason stands above): check network and disk space, then run this again"
}

# Bring what the file $1 asks for into the environment. Runs in a sub-shell (round brackets): `exit` ends only this.
env_install() (
    file="$env_root/$1"
    trap 'exit 130' INT
    if [[ -n "${VIRTUAL_ENV:-}" ]] && ! env_starts; then
        env_fail "the active environment $VIRTUAL_ENV has no Python that starts: 'unset VIRTUAL_ENV' or rebuild it"
    fi
    mkdir -p "$env_venv" 2>/dev/null \
        || env_fail "can't create $env_venv: use a folder you may write to, or activate your own environment"
    if command -v flock >/dev/null; then # two wrappers at once: one installs, the other waits
        exec 9<"$env_venv"
        if ! flock -n 9; then
            printf 'Another process is setting up %s: waiting for it\n' "$env_venv" >&2
            flock 9 || true # a file system without locks is no reason to stop
        fi
        if env_stamped "$1"; then
            exit 0
        fi
    fi
    env_starts || env_create
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || env_fail "$env_venv has $("$PYTHON" --version), needed is 3.10 or newer: activate another environment"
    missing="$(env_unmet "$file")" || env_fail "$PYTHON could not list its packages (see above): rebuild $env_venv"
    if [[ -n "$missing" ]]; then
        env_announce "$missing"
        # tools other than venv leave pip out, and so does a creation that was interrupted
        "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip --upgrade >&2 \
            || env_fail "$env_venv has no pip: install $1 with the tool that made it, then run this again"
        wheels=()
        while IFS= read -r line; do
            wheels+=("$line")
        done < <(grep -E '^torch(vision|audio)?[=<>~!]' "$file")
        if [[ -n "${TORCH_INDEX_URL:-}" && ${#wheels[@]} -gt 0 ]]; then
            env_pip --index-url "$TORCH_INDEX_URL" "${wheels[@]}"
        fi
        env_pip -r "$file"
    fi
    # An environment that is complete but read-only works too; it is merely examined at each start.
    cp "$file" "$env_venv/.installed-$1" 2>/dev/null || true
)

env_require() {
    env_stamped "$1" || env_install "$1"
}

# `exit` is for ./env.sh, run instead of sourced: it sets up and does nothing else
# shellcheck disable=SC2317  # it takes `return` for the end in both cases
env_require requirements.txt || { env_status=$?; return "$env_status" 2>/dev/null || exit "$env_status"; }
