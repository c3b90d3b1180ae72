#!/bin/sh
# Usage: openblas.sh WHAT WHY
# On Linux, where the BLAS in the MLX wheel is slow, this script prints the path of an OpenBLAS library for LD_PRELOAD.
# On macOS it prints nothing. Where there is no such library, it says what needs it, and why, and fails.
set -eu
[ "$(uname -s)" = Linux ] || exit 0
library=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p | sed -n 's/.*libopenblas[op]*\.so.* => //p' | head -n 1)
if [ -z "$library" ]; then
    echo "${1:-this} needs OpenBLAS, which was not found: ${2:-MLX's own linear algebra is slow on Linux}" >&2
    echo "hint: on Debian and Ubuntu: apt-get install libopenblas0-pthread" >&2
    exit 1
fi
echo "$library"
