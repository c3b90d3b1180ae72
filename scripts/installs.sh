#!/bin/sh
# Usage: installs.sh
# Installs the program in every way that docs/install.md names for users, from a checkout and from a wheel, each with a
# home of its own, and asks the built-in model a question. pipx and uv go into a temporary environment.
set -eu
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
question="Sort 7 3 5" answer="3 5 7"

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install -qq --disable-pip-version-check build pipx uv
export PATH="$work/tools/bin:$PATH"

# Copy the files that a clone has, so that nothing of this checkout's environments or builds is used.
mkdir "$work/checkout"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | xargs -0 tar cf - 2>/dev/null) | tar xf - -C "$work/checkout"
cd "$work/checkout"
python -m build --quiet --wheel >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
wheel=$(ls dist/*.whl)

# try NAME COMMAND...: runs the command with a new home, then asks the program, whose answer is compared.
try() {
    name=$1
    shift
    export HOME="$work/$name"
    mkdir "$HOME"
    "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; echo "installs: $name failed: $*" >&2; exit 1; }
    PATH="$HOME/.local/bin:$PATH" check "$name" dgemma-mlx
}
check() {
    name=$1
    shift
    given=$("$@" generate -m demo --seed 1 -q "$question") || exit 1
    [ "$given" = "$answer" ] || { echo "installs: $name answered '$given'" >&2; exit 1; }
    "$@" serve --help >/dev/null
    echo "$name: works"
}

unset XDG_DATA_HOME XDG_CONFIG_HOME XDG_CACHE_HOME XDG_BIN_HOME PIPX_HOME PIPX_BIN_DIR UV_TOOL_DIR UV_TOOL_BIN_DIR
for source in . "$wheel"; do
    kind=checkout
    [ "$source" = . ] || kind=wheel
    try "pipx-$kind" pipx install "$source[serve]"
    try "pipx-inject-$kind" sh -c "pipx install '$source' && pipx inject dgemma-mlx msgspec starlette uvicorn"
    try "uv-tool-$kind" uv tool install "$source[serve]"
    HOME="$work/uvx-$kind" check "uvx-$kind" uvx --quiet --from "$source[serve]" dgemma-mlx
    try "pip-$kind" sh -c "python -m venv \"\$HOME/.local\" && \"\$HOME/.local/bin/pip\" install -q '$source[serve]'"
done
