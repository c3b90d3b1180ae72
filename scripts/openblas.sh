#!/bin/sh
# Prints the OpenBLAS library for LD_PRELOAD on Linux, where the MLX wheel's own BLAS is slow; nothing on macOS.
set -eu
[ "$(uname -s)" = Linux ] || exit 0
library=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p | sed -n 's/.*libopenblas[op]*\.so.* => //p' | head -n 1)
if [ -z "$library" ]; then
    echo "training needs OpenBLAS; on Debian and Ubuntu: apt-get install libopenblas0-pthread" >&2
    exit 1
fi
echo "$library"
