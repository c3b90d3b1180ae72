#!/bin/sh
# Usage: run.sh [PYTHON [FOLDER]]
# Writes the puzzles, fine-tunes the demo model, and evaluates it before and after on the same held-out puzzles.
# After an interruption, the same command continues where it stopped. The README explains the training options.
set -eu
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
run=${2:-runs/sudoku}
clues=16-22
if [ "$(uname -s)" = Linux ] && library=$(sh scripts/openblas.sh "training at full speed"); then
    # The BLAS in MLX's Linux wheel is slow. Training uses two cores, with one BLAS thread each.
    export LD_PRELOAD="$library" OPENBLAS_NUM_THREADS=1
fi
[ -e "$run/data/valid.jsonl" ] ||
    "$python" recipes/sudoku/make_data.py "$run/data" --size 6 --clues $clues --train 48000
resume=
[ ! -e "$run/adapter/run.json" ] || resume=--resume
"$python" -m dgemma_mlx train -m demo --data "$run/data" -o "$run/adapter" $resume \
    --steps 3000 --batch-size 16 --canvas-length 48 --causal-weight 0 \
    --rank 32 --targets attention,mlp,experts,self_conditioning --optimizer muon --learning-rate 0.015 \
    --log-every 50 --save-every 250 --valid-every 500 --valid-answers 32
for tuned in "" "--adapter $run/adapter"; do
    echo "${tuned:-without adapter}"
    # shellcheck disable=SC2086
    "$python" -m dgemma_mlx eval -m demo $tuned --task sudoku --size 6 --clues $clues --count 500 --batch-size 25
done
