#!/bin/sh
# On Linux, where the BLAS in the MLX wheel is slow, this script prints the path of an OpenBLAS library for LD_PRELOAD.
# On macOS it prints nothing.
set -eu
[ "$(uname -s)" = Linux ] || exit 0
library=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p | sed -n 's/.*libopenblas[op]*\.so.* => //p' | head -n 1)
if [ -z "$library" ]; then
    echo "training needs OpenBLAS, which was not found; on Debian and Ubuntu: apt-get install libopenblas0-pthread" >&2
    exit 1
fi
echo "$library"
