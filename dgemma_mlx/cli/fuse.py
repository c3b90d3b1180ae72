"""``dgemma-mlx fuse``: a checkpoint and its adapter made one checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dgemma_mlx.cli.generate import ModelName
from dgemma_mlx.cli.settings import Settings

Adapter = Annotated[Path, typer.Option("--adapter", help="The folder of the adapter.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The new checkpoint's folder.")]
Unpack = Annotated[bool, typer.Option("--dequantize", help="Leave nothing packed: bfloat16 instead.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def fuse(
    adapter: Adapter, output: Output, model: ModelName = None, dequantize: Unpack = False, force: Force = False
) -> None:
    """Merge an adapter into its model and write the result, packed as the model is."""
    from dgemma_mlx.train.fuse import fuse as merge

    def progress(done: int, total: int) -> None:
        if total > 1:
            print(f"shard {done} of {total}", file=sys.stderr)

    merge(Settings().pick("model", model), adapter, output, dequantize=dequantize, force=force, progress=progress)
    print(f"wrote {output}; try: dgemma-mlx generate -m {output} \"...\"", file=sys.stderr)
