#!/bin/sh
# Usage: setup.sh VENV MINIMUM_PYTHON EXTRAS [REQUIREMENT...]
# Creates a virtual environment and installs the project into it, in editable mode and with the pinned versions.
# The requirements are installed first, one by one. PYTHON=... selects the interpreter; UV= avoids uv.
set -eu
venv=$1 minimum=$2 extras=$3
shift 3

fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

# uv does not read pip's settings, so pip installs the packages when those settings name a package index.
if [ -n "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}${PIP_NO_INDEX:-}" ]; then
    uv=
else
    uv=${UV-uv}
fi
[ -z "$uv" ] || command -v "$uv" >/dev/null 2>&1 || uv=

# Prints why an interpreter cannot be used: 'missing', 'old', 'intel' or 'venv'. Prints nothing when it can be used.
flaw() {
    "$1" - "$minimum" <<'PYTHON' 2>/dev/null || echo missing
import platform, sys
if sys.version_info < tuple(int(part) for part in sys.argv[1].split(".")):
    print("old")
elif sys.platform == "darwin" and platform.machine() != "arm64":
    print("intel")
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("venv")
PYTHON
}

find_python() {
    flaws=
    for python in ${PYTHON:-python3.13 python3.12 python3.11 python3.10 python3}; do
        command -v "$python" >/dev/null 2>&1 || continue
        found=$(flaw "$python")
        [ -n "$found" ] || return 0
        flaws="$flaws $found"
    done
    [ -z "${PYTHON:-}" ] || fail "$PYTHON is not a Python $minimum or later with venv for this machine"
    case $flaws in
    *venv*) fail "this Python lacks venv; on Debian and Ubuntu: apt-get install python3-venv" ;;
    *intel*) fail "MLX needs Apple silicon and an arm64 Python, but this Python is for Intel Macs: brew install python" ;;
    esac
    case $(uname -s) in
    Darwin) how="brew install python, or install uv (brew install uv), or use the installer from python.org" ;;
    *) how="apt-get install python3 python3-venv (Debian 12, Ubuntu 22.04 or later), or install uv" ;;
    esac
    fail "Python $minimum or later was not found: $how"
}

if [ -n "$uv" ]; then
    "$venv/bin/python" -c '' 2>/dev/null || "$uv" venv --quiet --clear --python "${PYTHON:->=$minimum}" "$venv"
    install() { "$uv" pip install --quiet --python "$venv/bin/python" --constraint constraints.txt "$@"; }
else
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        find_python
        "$python" -m venv --clear "$venv"
    fi
    install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --constraint constraints.txt "$@"; }
fi
echo "Installing into $venv (only now and when requirements change)"
for requirement in "$@"; do
    install "$requirement"
done
install --editable ".${extras:+[$extras]}"
