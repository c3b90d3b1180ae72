#!/bin/sh
# Usage: demo_model.sh PYTHON [OPTION...]
# Trains the built-in model in runs/demo (an interrupted run continues where it stopped), converts the resulting bf16
# checkpoint in the same way as users convert theirs, and scores the converted model.
# On Linux two processes with one core each and OpenBLAS share the training. On a Mac one process uses the GPU.
set -eu
python=$1
shift
run=runs/demo
mkdir -p "$run"
if [ "$(uname -s)" = Linux ]; then
    LD_PRELOAD=$(sh "$(dirname "$0")/openblas.sh" "training the demo model")
    echo '[["127.0.0.1:32323"], ["127.0.0.1:32324"]]' > "$run/hosts.json"
    export LD_PRELOAD OPENBLAS_NUM_THREADS=1
    MLX_HOSTFILE="$run/hosts.json" MLX_RANK=1 "$python" -m dgemma_mlx.train.demo --run "$run" "$@" &
    trap 'kill $! 2>/dev/null || true' EXIT
    MLX_HOSTFILE="$run/hosts.json" MLX_RANK=0 "$python" -m dgemma_mlx.train.demo --run "$run" "$@"
    wait
else
    "$python" -m dgemma_mlx.train.demo --run "$run" "$@"
fi
"$python" -m dgemma_mlx convert "$run/model" -o "$run/demo" --recipe bf16 --verify --force
"$python" -m dgemma_mlx.train.demo --score "$run/demo"
echo "To release it: cp $run/demo/* dgemma_mlx/demo/" >&2
