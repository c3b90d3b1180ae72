"""``dgemma-mlx fuse``: a checkpoint and an adapter in, one checkpoint out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from dgemma_mlx.cli.loading import fetch
from dgemma_mlx.cli.parameters import ModelName, model_option, output_option
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.settings import Settings

Adapter = Annotated[Path, model_option("--adapter", metavar="FOLDER", help="The adapter to merge into the model.")]
Output = Annotated[Path, output_option("--output", "-o", metavar="FOLDER", help="The folder of the new checkpoint.")]
Unpack = Annotated[bool, output_option("--dequantize", help="Write bfloat16 weights instead of packed ones.")]
Force = Annotated[bool, output_option("--force", help="Replace an output of fuse or convert.")]


def fuse(
    adapter: Adapter, output: Output, model: ModelName = None, dequantize: Unpack = False, force: Force = False
) -> None:
    """Merge an adapter into its model.

    The new checkpoint is packed as the model is, unless `--dequantize` is given. Adapters are in PEFT's format.

    Examples:
        dgemma-mlx fuse -m demo --adapter runs/sudoku/adapter -o runs/sudoku/fused
        dgemma-mlx generate -m runs/sudoku/fused "..."
    """
    from dgemma_mlx.train.fuse import fuse as merge

    def progress(done: int, total: int) -> None:
        if total > 1:
            print(f"shard {done} of {total}", file=sys.stderr)

    name = Settings().pick("model", model)
    fetch(name)
    merge(name, adapter, output, dequantize=dequantize, force=force, progress=progress)
    print(visible(f"wrote {output}; try: dgemma-mlx generate -m {output} \"...\""), file=sys.stderr)
