#!/bin/sh
# Usage: demo_model.sh PYTHON
# Trains the built-in model in runs/demo (an interrupted run continues where it stopped), converts the resulting bf16
# checkpoint in the same way as users convert theirs, and scores the converted model.
# On Linux two processes with one core each and OpenBLAS share the training. On a Mac one process uses the GPU.
set -eu
python=$1
run=runs/demo
mkdir -p "$run"
if [ "$(uname -s)" = Linux ]; then
    LD_PRELOAD=$(sh "$(dirname "$0")/openblas.sh" "training the demo model")
    echo '[["127.0.0.1:32323"], ["127.0.0.1:32324"]]' > "$run/hosts.json"
    export LD_PRELOAD OPENBLAS_NUM_THREADS=1
    # Freed memory is kept for the next step: giving it back and asking for it again took a tenth of a step. OpenBLAS
    # does not use AVX-512 of its own accord on some processors that have it, which took another tenth.
    export MALLOC_TOP_PAD_=268435456 MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=1073741824
    if grep -qs avx512f /proc/cpuinfo; then export OPENBLAS_CORETYPE=SKYLAKEX; fi
    MLX_HOSTFILE="$run/hosts.json" MLX_RANK=1 "$python" -m dgemma_mlx.train.demo --run "$run" &
    trap 'kill $! 2>/dev/null || true' EXIT
    MLX_HOSTFILE="$run/hosts.json" MLX_RANK=0 "$python" -m dgemma_mlx.train.demo --run "$run"
    wait
else
    "$python" -m dgemma_mlx.train.demo --run "$run"
fi
rm -rf "$run/demo"  # of an earlier run, with a score card, which `convert` does not replace
"$python" -m dgemma_mlx convert "$run/model" -o "$run/demo" --recipe bf16 --verify
"$python" -m dgemma_mlx.train.demo --score "$run/demo"
echo "To release it: cp $run/demo/* dgemma_mlx/demo/" >&2
